"""What a run refuses: one message, its own exit code, and nothing lost."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from launch import (
    BASE,
    GROW,
    RECIPE,
    RUN_RECIPE,
    TARGET,
    Workplace,
    environment,
    stage_of,
    steps_logged,
)
from warm import REPOSITORY, Warm

from stackgrow import seal
from stackgrow.data.store import MANIFEST
from stackgrow.run_folder.folder import DONE, STAGE_FILE, RunFolder
from stackgrow.run_folder.lines import read_records


def test_edited_recipe_does_not_go_on_in_the_old_folder(
    workplace: Workplace, reference: Path
) -> None:
    output = workplace.run("run.folder=reference", "train.learning_rate=1e-3", code=65)
    assert "train.learning_rate: 0.003 -> 0.001" in output
    assert BASE in output
    assert "Traceback" not in output


def test_checkpoint_of_another_recipe_is_not_taken_over(
    workplace: Workplace, reference: Path, tmp_path: Path
) -> None:
    """stage.json is gone, but every checkpoint names the stage that it belongs to."""
    run = tmp_path / "run"
    shutil.copytree(
        reference,
        run,
        ignore=shutil.ignore_patterns(GROW, TARGET, DONE, STAGE_FILE),
    )
    output = workplace.run(f"run.folder={run}", "train.learning_rate=1e-3", code=65)
    assert "step-20 was made by another recipe" in output


def test_done_of_another_stage_is_noticed(
    workplace: Workplace, reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    shutil.copy(stage_of(run, GROW).done_file, stage_of(run, TARGET).done_file)
    assert "disagree" in workplace.run(f"run.folder={run}", code=65)


def test_free_keys_may_change(workplace: Workplace, reference: Path) -> None:
    output = workplace.run(
        "run.folder=reference", "log.interval=5 steps", "train.compile=true"
    )
    assert output.count("done before") == 3


def test_held_out_data_do_not_change_within_a_run(
    workplace: Workplace, reference: Path, tmp_path: Path
) -> None:
    """Neither how many sequences are taken nor the text: two curves would stand in one file."""
    output = workplace.run("run.folder=reference", "validation.sequences=3", code=65)
    assert (
        "was begun with other held-out data: validation.sequences: 11 -> 3." in output
    )
    output = workplace.run("run.folder=reference", "validation.take=spread", code=65)
    assert "validation.take: first -> spread" in output
    store = tmp_path / "store"
    shutil.copytree(workplace.folder / "store", store)
    shard = next(store.glob("validation-*.npy"))
    content = bytearray(shard.read_bytes())
    content[-2] ^= 1
    shard.write_bytes(content)
    edit_json(
        store / MANIFEST,
        lambda m: m["splits"]["validation"]["shards"][0].update(
            sha256=seal.sha256(shard)
        ),
    )
    output = workplace.run("run.folder=reference", f"data.path={store}", code=65)
    assert "validates on other held-out data, with the hash" in output
    assert "Traceback" not in output
    assert (
        workplace.run("run.folder=reference", "validation.interval=2 steps").count(
            "done before"
        )
        == 3
    )


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def test_two_runs_on_one_folder(workplace: Workplace, tmp_path: Path) -> None:
    place = f"run.folder={tmp_path}/run"
    long = ("budget.tokens=1B", "train.horizon=stage")
    first = Warm(
        Path(RUN_RECIPE),
        workplace.arguments(place, *long),
        workplace.folder,
        environment(),
    )
    try:
        deadline = time.monotonic() + 300
        while steps_logged(tmp_path / "run", BASE) < 2:
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        output = workplace.run(place, *long, code=73)
        assert f"in use by process {first.processes[0].pid}" in output
        assert first.poll() is None, "the first run goes on"
    finally:
        first.kill()
    workplace.run(
        place, "budget.tokens=24Ki", code=65
    )  # the lock is free; the recipe is another one


def test_nan_stops_the_run_and_is_never_saved(
    workplace: Workplace, tmp_path: Path
) -> None:
    output = workplace.run(
        f"run.folder={tmp_path}/run", "train.learning_rate=1e30", code=76
    )
    assert "stage-0-train-2L: loss or gradient is not finite at step" in output
    last = read_records(stage_of(tmp_path / "run", BASE).metrics_file)[-1]
    assert (last["event"], last["action"]) == ("nonfinite", "stop")
    assert not list(tmp_path.glob("run/**/MANIFEST.json"))


def test_nan_between_logged_steps_is_never_saved(
    workplace: Workplace, tmp_path: Path
) -> None:
    place = f"run.folder={tmp_path}/run"
    output = workplace.run(
        place, "train.learning_rate=1e30", "log.interval=1000 steps", code=76
    )
    assert "loss or gradient is not finite at step" in output
    assert not list(tmp_path.glob("run/**/MANIFEST.json"))


def test_lost_input_stops_the_grown_stage(
    workplace: Workplace, reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference, run, ignore=shutil.ignore_patterns(TARGET))
    shutil.rmtree(stage_of(run, GROW).checkpoints)
    output = workplace.run(f"run.folder={run}", code=65)
    assert f"{GROW}/checkpoint is missing" in output
    assert not stage_of(run, TARGET).metrics_file.exists()


def test_exchanged_weights_are_noticed_after_loading(
    workplace: Workplace, reference: Path, tmp_path: Path
) -> None:
    """Valid files, a valid seal, but not the weights that growth.json and the manifest state."""
    run = tmp_path / "run"
    shutil.copytree(reference, run, ignore=shutil.ignore_patterns(TARGET))
    grown = stage_of(run, GROW).checkpoints
    manifest = seal.read_seal(grown)
    assert manifest is not None
    tensors = manifest["tensors"]
    tensors["layers.0.attention.wq.weight"] = tensors["layers.1.attention.wq.weight"]
    seal.write_json(grown / seal.MANIFEST, manifest)
    done = seal.read_json(stage_of(run, GROW).done_file)
    assert done is not None
    done["manifest_sha256"] = seal.file_records(grown, [seal.MANIFEST])[seal.MANIFEST][
        "sha256"
    ]
    seal.write_json(stage_of(run, GROW).done_file, done)
    output = workplace.run(f"run.folder={run}", code=65)
    assert "layers.0.attention.wq.weight" in output


def test_bad_recipe_is_told_once_under_torchrun(
    workplace: Workplace, tmp_path: Path
) -> None:
    bad = RECIPE.replace("n_heads = 4", "n_heads = 5").replace(
        "[train]", "[train]\nlr = 1"
    )
    (workplace.folder / "bad.toml").write_text(bad)
    output = workplace.run(
        f"run.folder={tmp_path}/run", ranks=2, code=1, recipe="bad.toml"
    )
    assert output.count("bad.toml: ") == 2, (
        "once by itself, and once more below torchrun's own traceback"
    )
    assert output.index("train.lr: unknown key") < output.index(
        "torch.distributed.elastic"
    )
    assert output.rindex("train.lr: unknown key") > output.rindex("File ")
    assert "exitcode  : 2" in output
    assert not list(tmp_path.iterdir())


def test_missing_store_and_wrong_vocabulary(
    workplace: Workplace, tmp_path: Path
) -> None:
    output = workplace.run(f"run.folder={tmp_path}/run", "data.path=nowhere", code=2)
    assert "data.path" in output
    assert "tools/prepare_data.py" in output
    output = workplace.run(
        f"run.folder={tmp_path}/run", "model.vocab_size=1000", code=2
    )
    assert "model.vocab_size: 1000 is not the vocabulary of the store" in output
    shutil.copytree(workplace.folder / "store", tmp_path / "torn")
    shard = next((tmp_path / "torn").glob("validation-*.npy"))
    for damage in (lambda: os.truncate(shard, 1), shard.unlink):
        damage()
        output = workplace.run(
            f"run.folder={tmp_path}/run", f"data.path={tmp_path}/torn", code=2
        )
        assert f"data.path: {shard}" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("local", [0, 1])
def test_each_node_tells_what_is_wrong_with_it(
    workplace: Workplace, local: int
) -> None:
    """Its first rank does: rank 0 may be on another node, where nothing is wrong."""
    ranks = {"RANK": str(2 + local), "LOCAL_RANK": str(local), "WORLD_SIZE": "4"}
    command = [sys.executable, RUN_RECIPE, "absent.toml"]
    env = {**environment(), **ranks}
    done = subprocess.run(
        command,
        cwd=workplace.folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2
    assert done.stderr.count("absent.toml: 1 problem") == 1 - local


def test_store_made_with_another_tokenizer(
    workplace: Workplace, tmp_path: Path
) -> None:
    output = workplace.run(
        f"run.folder={tmp_path}/run", f"data.tokenizer={'0' * 64}", code=2
    )
    assert "data.path: store was made with the tokenizer" in output
    assert not list(tmp_path.iterdir())


def test_ranks_that_do_not_fit(workplace: Workplace, tmp_path: Path) -> None:
    output = workplace.run(f"run.folder={tmp_path}/run", "parallel.tensor=2", code=2)
    assert "does not make 1 ranks" in output
    output = workplace.run(f"run.folder={tmp_path}/run", "parallel.pipeline=2", code=2)
    assert "gradients" in output
    assert not list(tmp_path.iterdir())


def provenance_of_another_form(run: Path) -> None:
    RunFolder(run).provenance_file.write_text('{"sessions": 5}', encoding="utf-8")


def recipe_that_is_a_pipe(run: Path) -> None:
    RunFolder(run).recipe_file.unlink()
    os.mkfifo(RunFolder(run).recipe_file)


def line_that_is_a_number(run: Path) -> None:
    file = stage_of(run, BASE).metrics_file
    file.write_text("5\n" + file.read_text(encoding="utf-8"), encoding="utf-8")


def loss_that_is_a_word(run: Path) -> None:
    file = stage_of(run, BASE).metrics_file
    file.write_text(
        file.read_text(encoding="utf-8").replace(
            '"loss": ', '"loss": "low", "was": ', 1
        ),
        encoding="utf-8",
    )


@pytest.mark.parametrize(
    ("damage", "tool", "message"),
    [
        (
            provenance_of_another_form,
            "run_recipe",
            "provenance.json is damaged: it lists no sessions",
        ),
        (
            provenance_of_another_form,
            "report",
            "provenance.json is damaged: it lists no sessions",
        ),
        (recipe_that_is_a_pipe, "report", "is not a run: it has no recipe.toml"),
        (
            line_that_is_a_number,
            "report",
            "metrics.jsonl:1: '5' is no record of a step",
        ),
        (loss_that_is_a_word, "report", "metrics.jsonl:1: loss is 'low'"),
    ],
)
def test_files_of_another_form_are_told_in_a_line(
    workplace: Workplace,
    reference: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    tool: str,
    message: str,
) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    damage(run)
    arguments = (
        ["tiny.toml", "--set", f"run.folder={run}"] if tool == "run_recipe" else [run]
    )
    code, output = workplace.tool(tool, *arguments)
    assert code == 65, output
    assert message in output
    assert "Traceback" not in output


# What of a run is closed to the user -> the tools that need it. A page needs no weights, a model no records.
CLOSED: dict[str, tuple[Callable[[RunFolder], Path], Sequence[str]]] = {
    "the run": (lambda run: run.path, ("report", "compare_runs", "export_hf", "audit_run")),
    "recipe": (lambda run: run.recipe_file, ("report", "compare_runs", "export_hf", "audit_run")),
    "a stage": (lambda run: run.stage(TARGET).path, ("report", "compare_runs", "export_hf", "audit_run")),
    "records": (lambda run: run.stage(TARGET).metrics_file, ("report", "compare_runs", "audit_run")),
    "benchmarks": (lambda run: run.eval, ("report", "compare_runs", "audit_run")),
    "a checkpoint": (lambda run: run.stage(TARGET).checkpoint(20), ("export_hf", "audit_run")),
    "metadata": (lambda run: run.stage(TARGET).checkpoint(20) / ".metadata", ("export_hf", "audit_run")),
    "weights": (lambda run: run.stage(TARGET).checkpoint(20) / "__0_0.distcp", ("export_hf", "audit_run")),
}  # fmt: skip


@pytest.mark.parametrize(("closed", "tools"), CLOSED.values(), ids=CLOSED)
def test_what_may_not_be_read_is_named_in_a_line(
    workplace: Workplace,
    reference: Path,
    tmp_path: Path,
    closed: Callable[[RunFolder], Path],
    tools: Sequence[str],
) -> None:
    """Neither passed over, as an empty folder would be, nor called damaged."""
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    RunFolder(run).eval.mkdir()
    path = closed(RunFolder(run))
    mode = path.stat().st_mode
    for tool in tools:
        arguments = {
            "report": [run, "--out", tmp_path / "page.html"],
            "compare_runs": [reference, run],
            "export_hf": [run, tmp_path / "exported"],
            "audit_run": [run],
        }[tool]
        path.chmod(0)
        try:
            code, output = without_access(workplace, tool, *arguments)
        finally:
            path.chmod(mode)
        assert code == 74, output
        (line,) = output.splitlines()
        assert str(path) in line
        assert "Permission denied" in line
    assert sorted(tmp_path.iterdir()) == [run], "nothing was written"


def test_a_checkpoint_that_may_not_be_read_is_not_set_aside_as_damaged(
    workplace: Workplace, reference: Path, tmp_path: Path
) -> None:
    """The run would go on from an older one, and train again what is there."""
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    stage = stage_of(run, TARGET)
    stage.done_file.unlink()
    weights = stage.checkpoint(20) / "__0_0.distcp"
    weights.chmod(0)
    code, output = without_access(
        workplace, "run_recipe", "tiny.toml", "--set", f"run.folder={run}"
    )
    assert code == 74, output
    assert f"{weights}: Permission denied; restore access to it" in output
    assert "Traceback" not in output
    assert stage.sealed_steps() == [16, 20]
    assert not stage.quarantine.exists()


def without_access(
    workplace: Workplace, tool: str, *arguments: object
) -> tuple[int, str]:
    """A tool as a user runs it who is not root."""
    script = REPOSITORY / "tools" / f"{tool}.py"
    process = Warm(
        Path(__file__).with_name("unprivileged.py"),
        [str(script), *map(str, arguments)],
        workplace.folder,
        environment(),
    )
    return process.wait(100), process.output()


def test_a_run_that_may_not_be_read_stops_no_list_of_the_others(
    workplace: Workplace, reference: Path, tmp_path: Path
) -> None:
    shutil.copytree(reference, tmp_path / "open")
    (tmp_path / "closed").mkdir(mode=0)
    code, output = without_access(workplace, "runs", tmp_path)
    assert code == 0, output
    assert re.search("^closed +damaged .*Permission denied", output, re.MULTILINE)
    assert re.search("^open +finished ", output, re.MULTILINE)


def test_a_folder_that_cannot_be_written_is_told_in_a_line(
    workplace: Workplace, reference: Path
) -> None:
    code, output = workplace.tool(
        "report", reference, "--out", "/proc/nowhere/report.html"
    )
    assert code == 74, output
    assert "/proc/nowhere" in output
    assert "Traceback" not in output
