"""tools/grow_checkpoint.py and tools/bench/growth.py, started as a user would start them."""

import json
import resource
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from families_for_tests import TINY
from growth_for_tests import apply, assert_same, weights
from launch import REPOSITORY, Workplace, environment, run_tool
from launch import weights as sealed_weights

from stackgrow import seal
from stackgrow.checkpoint.hf import export_hf, import_hf
from stackgrow.checkpoint.hf_format import config_of
from stackgrow.growth.depth import interleave_map, stack_map
from stackgrow.growth.operators import growth_rules
from stackgrow.recipe.keys import Model
from stackgrow.run_folder.folder import RunFolder, StageFolder
from stackgrow.seal.tensors import fingerprint

SMALL = Model(
    family="llama2",
    dim=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    ffn_dim=48,
    vocab_size=60,
)
WIDE = replace(SMALL, dim=64, n_heads=8, n_kv_heads=4, ffn_dim=96)
SPLIT = [
    "--operator",
    "split",
    "--dim",
    64,
    "--heads",
    8,
    "--kv-heads",
    4,
    "--ffn-dim",
    96,
]
STACK = ["--operator", "stack", "--factor", 2]


def tool(
    *arguments: object,
    ranks: int = 0,
    code: int = 0,
    cwd: Path | None = None,
    name: str = "grow_checkpoint",
) -> str:
    returned, output = run_tool(name, *arguments, cwd=cwd or Path.cwd(), ranks=ranks)
    assert returned == code, output
    assert ranks or "Traceback" not in output
    return output


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A training checkpoint of nobody's run: no seal, and an optimizer state beside the weights."""
    state = weights(SMALL)
    moments = {f"state.{name}.exp_avg": -tensor for name, tensor in state.items()}
    moments |= {
        f"state.{name}.exp_avg_sq": tensor.square() for name, tensor in state.items()
    }
    moments |= {f"state.{name}.step": torch.tensor(3.0) for name in state}
    dcp.save(
        {**state, "optimizer": moments}, checkpoint_id=tmp_path / "source", no_dist=True
    )
    return tmp_path / "source"


def loaded(folder: Path, model: Model) -> dict[str, torch.Tensor]:
    """What DCP itself reads; the seal must be whole, and know every tensor."""
    state = {
        name: torch.full(shape, torch.nan) for name, shape in model.tensors().items()
    }
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    manifest = seal.read_seal(folder)
    assert manifest is not None
    assert seal.damage(folder, manifest) == []
    assert manifest["tensors"] == {
        name: fingerprint(tensor) for name, tensor in state.items()
    }
    return state


def test_stack_of_an_unsealed_checkpoint_and_of_what_it_became(source: Path) -> None:
    """The grown checkpoint tells its own geometry, so that it can be grown and exported without options."""
    grown, again, hf = (source.with_name(name) for name in ("grown", "again", "hf"))
    told = tool(
        source,
        grown,
        *STACK,
        "--order",
        "interleave",
        "--source-heads",
        4,
        "--optimizer",
        "copy",
    )
    assert "stack: 2 -> 4 layers\n" in told
    assert "source layer of each layer: 0 0 1 1\n" in told
    model = replace(SMALL, n_layers=4)
    want = apply(
        growth_rules("stack", SMALL, model, interleave_map(2, 4)), weights(SMALL)
    )
    assert_same(loaded(grown, model), want)
    record = json.loads(StageFolder(grown).growth_file.read_text())
    moment = "optimizer.state.layers.3.attention.wq.weight.exp_avg"
    assert record["moments"][moment] == fingerprint(
        -want["layers.3.attention.wq.weight"]
    )
    assert record["layer_map"] == [0, 0, 1, 1]
    assert (
        record["map"]["layers.3.attention.wq.weight"] == "layers.1.attention.wq.weight"
    )
    assert record["bytes_written"] < 50_000, "metadata alone"
    (data,) = record["linked_files"]
    assert (grown / data).samefile(source / data)

    tool(
        grown,
        again,
        "--operator",
        "zero",
        "--layer-map",
        "0,1,2,3,3",
        "--noise",
        0.2,
        "--seed",
        5,
    )
    zero = growth_rules("zero", model, replace(SMALL, n_layers=5), (0, 1, 2, 3, 3))
    made = loaded(again, replace(SMALL, n_layers=5))
    assert not torch.equal(
        made["layers.0.attention.wq.weight"],
        apply(zero, want)["layers.0.attention.wq.weight"],
    )
    assert torch.equal(
        made["layers.0.attention_norm.weight"], want["layers.0.attention_norm.weight"]
    )
    tool(again, hf, name="export_hf")
    assert names(source.parent) == ["again", "grown", "hf", "source"]


def test_two_ranks_make_what_one_makes(source: Path) -> None:
    one, two = source.with_name("one"), source.with_name("two")
    options = [*SPLIT, "--factor", 2, "--seed", 7, "--source-heads", 4]
    tool(source, one, *options)
    told = tool(source, two, *options, ranks=2)
    assert (
        told.count(
            "split: 2 -> 4 layers, dim 32 -> 64, n_heads 4 -> 8, n_kv_heads 2 -> 4, ffn_dim 48 -> 96"
        )
        == 1
    )
    model = replace(WIDE, n_layers=4)
    want = apply(
        growth_rules("split", SMALL, model, stack_map(2, 4), 7), weights(SMALL)
    )
    assert_same(loaded(one, model), want)
    assert_same(loaded(two, model), want)
    manifests = [seal.read_seal(folder) for folder in (one, two)]
    assert manifests[0]["stage_hash"] == manifests[1]["stage_hash"]  # type: ignore[index]
    assert len(list(two.glob("__grown*"))) == 2, "both ranks wrote"


@pytest.mark.parametrize("ranks", [0, 2])
def test_hugging_face_folder(source: Path, ranks: int) -> None:
    hf, grown, back = (source.with_name(name) for name in ("hf", "grown", "back"))
    export_hf(source, hf, SMALL)
    tool(hf, grown, *SPLIT, "--seed", 7, ranks=ranks)
    want = apply(growth_rules("split", SMALL, WIDE, None, 7), weights(SMALL))
    assert_same(loaded(grown, WIDE), want)
    tool(grown, back, name="export_hf")
    import_hf(back, source.with_name("imported"))
    assert_same(loaded(source.with_name("imported"), WIDE), want)
    assert names(source.parent) == ["back", "grown", "hf", "imported", "source"]


@pytest.mark.parametrize(
    "case", [case for case, model in TINY.items() if model.family != "llama2"]
)
def test_hugging_face_folder_of_a_family(case: str, tmp_path: Path) -> None:
    """Grown and exported by its own account: no option says what it is."""
    model = TINY[case]
    deep = replace(model, n_layers=4)
    dcp.save(dict(weights(model)), checkpoint_id=tmp_path / "source", no_dist=True)
    export_hf(tmp_path / "source", tmp_path / "hf", model)
    tool("hf", "grown", *STACK, cwd=tmp_path)
    tool("grown", "back", name="export_hf", cwd=tmp_path)
    back = import_hf(tmp_path / "back", tmp_path / "imported")
    want = apply(growth_rules("stack", model, deep, [0, 1, 0, 1]), weights(model))
    assert_same(loaded(tmp_path / "imported", back), want)


def test_checkpoint_of_a_run(
    workplace: Workplace, reference: Path, tmp_path: Path
) -> None:
    """The geometry is the run's, and the fingerprints those of its seal."""
    step = RunFolder(reference).stage("stage-0-train-2L").checkpoint(16)
    assert "2 -> 6 layers" in tool(
        step, tmp_path / "grown", "--operator", "stack", "--factor", 3
    )
    have, want = sealed_weights(tmp_path / "grown"), sealed_weights(step)
    assert have["layers.4.attention.wq.weight"] == want["layers.0.attention.wq.weight"]
    before, after = seal.read_seal(step), seal.read_seal(tmp_path / "grown")
    assert before is not None
    assert after is not None
    assert after["position"] == before["position"]
    linked = json.loads(RunFolder(tmp_path).stage("grown").growth_file.read_text())[
        "linked_files"
    ]
    assert {name: after["files"][name] for name in linked} == {
        name: before["files"][name] for name in linked
    }
    assert "6 -> 12 layers" in tool(tmp_path / "grown", tmp_path / "more", *STACK)
    told = tool(
        tmp_path / "grown", tmp_path / "no", *STACK, "--optimizer", "copy", code=2
    )
    assert "has no optimizer state to grow" in told
    told = tool(step, tmp_path / "no", *STACK, "--source-heads", 4, code=2)
    assert "tells its own geometry" in told


REFUSALS = {
    "give --source-heads": STACK,
    "5 attention heads do not fit": [*STACK, "--source-heads", 5],
    "nothing grows": ["--operator", "stack", "--source-heads", 4],
    "does not grow in width": [*SPLIT[2:], "--operator", "stack", "--source-heads", 4],
    "must not shrink": ["--operator", "zero", "--dim", 16, "--source-heads", 4],
    "names layers [2]": [
        "--operator",
        "stack",
        "--layer-map",
        "0,1,2",
        "--source-heads",
        4,
    ],
    "--order has a meaning": ["--operator", "stack", "--order", "stack"],
    "must be 1 or more": ["--operator", "stack", "--factor", "0"],
    "noise ratio": [*STACK, "--noise", 2, "--source-heads", 4],
    "more than 4096 layers": [
        "--operator",
        "stack",
        "--factor",
        99999,
        "--source-heads",
        4,
    ],
}


@pytest.fixture
def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """The tool in this process, since there are many cases: what it tells."""

    def run(*arguments: object, code: int) -> str:
        monkeypatch.setattr(sys, "argv", ["grow_checkpoint", *map(str, arguments)])
        with pytest.raises(SystemExit, match=f"^{code}$"):
            runpy.run_path(
                str(REPOSITORY / "tools" / "grow_checkpoint.py"), run_name="__main__"
            )
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals_leave_nothing_behind(
    source: Path, message: str, refused: Callable[..., str]
) -> None:
    assert message in refused(
        source, source.with_name("grown"), *REFUSALS[message], code=2
    )
    assert names(source.parent) == ["source"]


def test_what_is_damaged_or_in_the_way(
    source: Path, refused: Callable[..., str]
) -> None:
    folder = source.parent
    assert "exists already" in refused(
        source, source, *STACK, "--source-heads", 4, code=65
    )
    assert "lies in" in refused(source, source / "inside", *STACK, code=65)
    assert "is no folder" in refused(
        folder / "nothing", folder / "grown", *STACK, code=65
    )
    assert "there is no folder" in refused(
        source, folder / "a" / "grown", *STACK, "--source-heads", 4, code=65
    )
    export_hf(source, folder / "hf", SMALL)
    assert "has weights alone" in refused(
        folder / "hf", folder / "grown", *STACK, "--optimizer", "copy", code=2
    )
    (folder / "hf" / "model-00001-of-00001.safetensors").unlink()
    assert "is missing; download it again" in refused(
        folder / "hf", folder / "grown", *STACK, code=65
    )
    prints = {name: fingerprint(tensor) for name, tensor in weights(SMALL).items()}
    manifest = {
        "step": 0,
        "position": 0,
        "stage_hash": "",
        "tensors": prints,
        "config": config_of(SMALL),
    }
    shutil.copytree(source, folder / "sealed")
    seal.seal(
        folder / "sealed", seal.file_records(source, seal.contents(source)), manifest
    )
    data = next((folder / "sealed").glob("*.distcp"))
    value = weights(SMALL)["layers.1.attention.wq.weight"].numpy().tobytes()
    data.write_bytes(data.read_bytes().replace(value, bytes(len(value))))
    told = refused(folder / "sealed", folder / "grown", *SPLIT, code=65)
    assert (
        "layers.1.attention.wq.weight is not what was saved; restore the checkpoint"
        in told
    )
    told = tool(folder / "sealed", folder / "grown", *SPLIT, ranks=2, code=65)
    assert told.count("is not what was saved") == 1, (
        "told once, though one rank alone finds it"
    )
    assert names(folder) == ["hf", "sealed", "source"]


def test_a_full_disk_is_told_in_one_line(source: Path) -> None:
    """A limit on the size of files stands in for the disk."""
    grown = source.with_name("grown")
    command = [
        sys.executable,
        str(REPOSITORY / "tools" / "grow_checkpoint.py"),
        str(source),
        str(grown),
    ]
    done = subprocess.run(
        [*command, *map(str, SPLIT), "--source-heads", "4"], env=environment(), capture_output=True, text=True,
        timeout=100, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5)),
    )  # fmt: skip
    assert done.returncode == 74
    assert done.stderr.startswith("disk full: ")
    assert done.stderr.endswith(
        "File too large; make room, then give the same command again\n"
    )
    assert names(source.parent) == ["source"]


def test_the_benchmark_of_growth_reports_bytes_and_seconds(tmp_path: Path) -> None:
    report = json.loads(
        tool(
            "--small", "--runs", 1, "--json", "--folder", tmp_path, name="bench/growth"
        )
    )
    by_case = {r["case"]: r for r in report}
    assert list(by_case) == ["stack", "zero-depth", "split-width"]
    assert by_case["stack"]["weight_bytes_written"] == 0
    assert by_case["stack"]["ratio"] is None
    split = by_case["split-width"]
    assert split["weight_bytes_written"] > 4 * split["target_parameters"] - 1
    assert split["ratio"] == split["seconds"] / split["cp_seconds"]
    assert 10**8 < split["peak_bytes"] < 1.5 * 10**9
    assert names(tmp_path) == []
