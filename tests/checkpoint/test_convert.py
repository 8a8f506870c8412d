import hashlib
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from warm import in_ranks

from stackgrow.checkpoint.convert import begin, commit, grow_checkpoint, write_part
from stackgrow.checkpoint.dcp import (
    METADATA,
    CheckpointError,
    SafePlanner,
    SafeReader,
    read_metadata,
)
from stackgrow.growth.depth import depth_rules, interleave_map, stack_map
from stackgrow.growth.rules import Compute, Rule, Rules
from stackgrow.recipe.keys import Model
from stackgrow.seal import link

SMALL = Model(dim=8, n_layers=3, n_heads=2, n_kv_heads=1, ffn_dim=10, vocab_size=7)
LAYER = [
    name.removeprefix("layers.0.")
    for name in SMALL.tensors()
    if name.startswith("layers.0.")
]
MAPS = {
    "stack": stack_map(3, 6),
    "interleave": interleave_map(3, 6),
    "partial": [0, 1, 1, 1, 2],
    "drop": [2, 0],
}
Tensors = dict[str, torch.Tensor]


def weights(model: Model = SMALL, dtype: torch.dtype = torch.float32) -> Tensors:
    """Values that tell the tensor (hundreds) and the element in it (1/256); all exact in float32."""
    shapes = model.tensors()
    return {
        name: (
            100.0 * i + torch.arange(torch.Size(shape).numel()).reshape(shape) / 256
        ).to(dtype)
        for i, (name, shape) in enumerate(shapes.items())
    }


def training_state(model: Tensors) -> dict[str, Any]:
    """What torchtitan saves: the model's tensors flat, the rest nested."""
    optimizer: dict[str, Any] = {
        f"state.{name}.exp_avg": -tensor for name, tensor in model.items()
    }
    optimizer |= {f"param_groups.{name}.lr": 0.1 for name in model}
    rest = {
        "optimizer": optimizer,
        "lr_scheduler": {"last_epoch": 3},
        "dataloader": {"consumed": 12},
    }
    return {**model, **rest, "train_state": {"step": torch.tensor(3)}}


def save(folder: Path, model: Tensors) -> Path:
    dcp.save(training_state(model), checkpoint_id=folder, no_dist=True)
    return folder


def depth(layer_map: list[int], source: Model = SMALL) -> Rules:
    return depth_rules(layer_map, source, replace(source, n_layers=len(layer_map)))


def stacked(layer_map: list[int], source: Tensors) -> Tensors:
    """The definition, written apart from the library's."""
    kept = {
        name: tensor
        for name, tensor in source.items()
        if not name.startswith("layers.")
    }
    layers = {
        f"layers.{i}.{t}": source[f"layers.{j}.{t}"]
        for i, j in enumerate(layer_map)
        for t in LAYER
    }
    return kept | layers


def load(folder: Path, like: Tensors) -> Tensors:
    fresh = {name: torch.full_like(tensor, torch.nan) for name, tensor in like.items()}
    dcp.load(
        fresh, storage_reader=SafeReader(folder), planner=SafePlanner(), no_dist=True
    )
    plain = {name: torch.full_like(tensor, torch.nan) for name, tensor in like.items()}
    dcp.load(plain, checkpoint_id=folder, no_dist=True)
    assert_same(plain, fresh)
    return fresh


def assert_same(have: Tensors, want: Tensors) -> None:
    assert set(have) == set(want)
    for name in want:
        assert have[name].dtype == want[name].dtype
        assert torch.equal(have[name], want[name]), name


def hashes(folder: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.iterdir()
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tmp_path / "source", weights())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer_map", MAPS.values(), ids=MAPS.keys())
def test_depth_growth_equals_its_definition(
    tmp_path: Path, layer_map: list[int], dtype: torch.dtype
) -> None:
    small = weights(dtype=dtype)
    record = grow_checkpoint(
        save(tmp_path / "source", small), tmp_path / "grown", depth(layer_map)
    )
    want = stacked(layer_map, small)
    assert_same(load(tmp_path / "grown", want), want)
    assert set(read_metadata(tmp_path / "grown").state_dict_metadata) == set(want), (
        "the model, and only it"
    )
    for i, j in enumerate(layer_map):
        assert (
            record["map"][f"layers.{i}.ffn_norm.weight"]
            == f"layers.{j}.ffn_norm.weight"
        )


def test_stacking_moves_no_weight_bytes(source: Path, tmp_path: Path) -> None:
    before = hashes(source)
    record = grow_checkpoint(source, tmp_path / "grown", depth(MAPS["stack"]))
    grown = tmp_path / "grown"
    assert {file.name for file in grown.iterdir()} == {METADATA, "__0_0.distcp"}
    assert (grown / "__0_0.distcp").stat().st_ino == (
        source / "__0_0.distcp"
    ).stat().st_ino
    assert record["linked_files"] == ["__0_0.distcp"]
    assert record["copied_files"] == []
    assert record["bytes_written"] == (grown / METADATA).stat().st_size
    assert hashes(source) == before
    assert not grown.with_name("grown.tmp").exists()


def test_the_grown_checkpoint_outlives_its_source(source: Path, tmp_path: Path) -> None:
    grow_checkpoint(source, tmp_path / "grown", depth(MAPS["stack"]))
    shutil.rmtree(source)
    want = stacked(MAPS["stack"], weights())
    assert_same(load(tmp_path / "grown", want), want)


def test_a_grown_checkpoint_grows_again(source: Path, tmp_path: Path) -> None:
    first = with_compute(depth([0, 1, 2, 0]))
    grow_checkpoint(source, tmp_path / "four", first)
    second = with_compute(depth([0, 1, 2, 3, 1, 0], replace(SMALL, n_layers=4)))
    grow_checkpoint(tmp_path / "four", tmp_path / "six", second)
    want = computed(
        stacked([0, 1, 2, 3, 1, 0], computed(stacked([0, 1, 2, 0], weights())))
    )
    assert_same(load(tmp_path / "six", want), want)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
def test_a_real_copy_where_the_file_system_cannot_link(
    source: Path, tmp_path: Path
) -> None:
    other = Path("/dev/shm") / f"{tmp_path.parent.name}-{tmp_path.name}"
    if Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("/dev/shm is no second file system here")
    try:
        record = grow_checkpoint(source, other / "grown", depth(MAPS["stack"]))
        assert record["linked_files"] == []
        assert record["copied_files"] == ["__0_0.distcp"]
        data, metadata = other / "grown" / "__0_0.distcp", other / "grown" / METADATA
        assert record["bytes_written"] == data.stat().st_size + metadata.stat().st_size
        want = stacked(MAPS["stack"], weights())
        assert_same(load(other / "grown", want), want)
    finally:
        shutil.rmtree(other, ignore_errors=True)


def test_a_link_that_fails_for_another_reason_is_no_copy(tmp_path: Path) -> None:
    (tmp_path / "source").write_text("source")
    (tmp_path / "target").write_text("target")
    with pytest.raises(FileExistsError):
        link(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").read_text() == "target"


# Compute rules of one source, of two (one of them overwritten), and of none.
W2 = "layers.{}.feed_forward.w2.weight"


def join(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.cat([left[:4], right.mul_(0.5)[4:]])


def with_compute(rules: Rules) -> Rules:
    made: dict[str, Rule] = {
        "tok_embeddings.weight": Compute(
            ("tok_embeddings.weight",), lambda t: t * 2, "double"
        ),
        "norm.weight": Compute(("norm.weight",), lambda t: t.flip(0), "reverse"),
        W2.format(1): Compute((W2.format(0), W2.format(1)), join, "join"),
        "output.weight": Compute((), lambda: torch.ones(7, 16)[:, ::2], "ones"),
    }
    return replace(
        rules,
        targets={**rules.targets, **made},
        dropped=rules.dropped | {"output.weight"},
    )


def computed(want: Tensors) -> Tensors:
    """What ``with_compute`` makes, from whole tensors; for maps that begin with 0, 1."""
    return want | {
        "tok_embeddings.weight": want["tok_embeddings.weight"] * 2,
        "norm.weight": want["norm.weight"].flip(0),
        W2.format(1): torch.cat([want[W2.format(0)][:4], want[W2.format(1)][4:] * 0.5]),
        "output.weight": torch.ones(7, 8),
    }


@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_computed_tensors_equal_the_direct_computation(
    source: Path, tmp_path: Path, world_size: int
) -> None:
    rules, grown = with_compute(depth(MAPS["stack"])), tmp_path / "grown"
    begin(source, grown, rules)
    for rank in reversed(range(world_size)):
        write_part(source, grown, rules, rank, world_size)
    record = commit(source, grown, rules, world_size)
    want = computed(stacked(MAPS["stack"], weights()))
    assert_same(load(grown, want), want)
    parts = {file.name for file in grown.iterdir()} - {METADATA, "__0_0.distcp"}
    assert len(parts) == min(world_size, 4), "the ranks share the four tensors"
    assert record["bytes_written"] == sum(
        (grown / name).stat().st_size for name in {METADATA, *parts}
    )
    assert record["map"][W2.format(1)] == f"join({W2.format(0)}, {W2.format(1)})"


def test_files_that_are_only_computed_from_are_not_linked(
    source: Path, tmp_path: Path
) -> None:
    shapes = SMALL.tensors()
    negate: dict[str, Rule] = {
        name: Compute((name,), torch.neg, "negate") for name in shapes
    }
    record = grow_checkpoint(source, tmp_path / "grown", Rules(negate, shapes, shapes))
    assert record["linked_files"] == record["copied_files"] == []
    assert_same(
        load(tmp_path / "grown", weights()),
        {name: -tensor for name, tensor in weights().items()},
    )


def test_a_view_is_written_without_the_rest_of_its_storage(tmp_path: Path) -> None:
    save(tmp_path / "source", {"t": torch.arange(1e5)})
    half = Compute(("t",), lambda t: t[:50_000], "half")
    record = grow_checkpoint(
        tmp_path / "source",
        tmp_path / "grown",
        Rules({"h": half}, {"t": (100_000,)}, {"h": (50_000,)}),
    )
    assert 200_000 < record["bytes_written"] < 210_000
    assert_same(
        load(tmp_path / "grown", {"h": torch.zeros(50_000)}), {"h": torch.arange(5e4)}
    )


@pytest.mark.parametrize(
    "fn", [lambda t: t[:4], lambda t: t.double()], ids=["shape", "dtype"]
)
def test_a_result_of_the_wrong_shape_or_dtype_is_refused(
    source: Path, tmp_path: Path, fn: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    rules = depth(MAPS["stack"])
    wrong = {**rules.targets, "norm.weight": Compute(("norm.weight",), fn, "wrong")}
    told = r"norm.weight must be \(8,\) in the dtype of its sources, torch.float32: wrong gave"
    with pytest.raises(CheckpointError, match=told):
        grow_checkpoint(source, tmp_path / "grown", replace(rules, targets=wrong))
    assert not (tmp_path / "grown").exists()


def change(model: Tensors, **changed: torch.Tensor | None) -> Tensors:
    """``model`` with tensors replaced, added, or (None) removed; ``__`` stands for the dot in names."""
    names = {key.replace("__", "."): tensor for key, tensor in changed.items()}
    return {
        name: tensor
        for name, tensor in {**model, **names}.items()
        if tensor is not None
    }


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (
            change(weights(), norm__weight=None),
            r"norm.weight is missing, the source model has \(8,\)",
        ),
        (
            change(weights(), bias=torch.ones(2)),
            r"bias is \(2,\), the source model has no such tensor",
        ),
        (
            change(weights(), norm__weight=torch.ones(9)),
            r"norm.weight is \(9,\), the source model has \(8,\)",
        ),
        (
            change(weights(), norm__weight=torch.ones(8).half()),
            "dtypes, torch.float16, torch.float32",
        ),
        (
            weights(replace(SMALL, n_layers=4)),
            r"layers.3.attention.wk.weight is \(4, 8\), .* and 1 more",
        ),
        (
            weights(replace(SMALL, n_layers=2)),
            "layers.2.attention.wk.weight is missing",
        ),
    ],
    ids=["missing", "extra", "shape", "dtype", "more layers", "fewer layers"],
)
def test_another_model_is_refused_before_anything_is_written(
    tmp_path: Path, model: Tensors, told: str
) -> None:
    save(tmp_path / "source", model)
    with pytest.raises(CheckpointError, match=told):
        grow_checkpoint(tmp_path / "source", tmp_path / "grown", depth(MAPS["stack"]))
    assert {folder.name for folder in tmp_path.iterdir()} == {"source"}


def test_a_source_with_a_chunk_missing_is_refused_before_anything_is_written(
    source: Path, tmp_path: Path
) -> None:
    metadata = read_metadata(source)
    del metadata.storage_data[MetadataIndex("layers.1.attention.wq.weight", (0, 0))]
    (source / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(
        CheckpointError,
        match=r"layers\.1\.attention\.wq\.weight: its 1 stored chunks do not fill",
    ):
        grow_checkpoint(source, tmp_path / "grown", depth(MAPS["stack"]))
    assert {folder.name for folder in tmp_path.iterdir()} == {"source"}


def test_an_existing_target_is_never_replaced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "grown").mkdir()
    (tmp_path / "grown" / "mine").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        grow_checkpoint(source, tmp_path / "grown", depth(MAPS["stack"]))
    assert [file.name for file in (tmp_path / "grown").iterdir()] == ["mine"]


def test_a_missing_part_stops_the_commit(source: Path, tmp_path: Path) -> None:
    rules, grown = with_compute(depth(MAPS["stack"])), tmp_path / "grown"
    begin(source, grown, rules)
    write_part(source, grown, rules, rank=0, world_size=2)
    with pytest.raises(CheckpointError, match="rank 1 of 2 has not written its part"):
        commit(source, grown, rules, world_size=2)
    with pytest.raises(CheckpointError, match="rank 0 of 1 has not written its part"):
        commit(source, grown, rules, world_size=1)
    assert not grown.exists()
    grow_checkpoint(source, grown, rules)
    want = computed(stacked(MAPS["stack"], weights()))
    assert_same(load(grown, want), want)


def killed_growth(_: int, folder: Path) -> None:
    rules = depth(MAPS["stack"])
    kill = Compute(
        ("norm.weight",), lambda t: os.kill(os.getpid(), signal.SIGKILL), "kill"
    )
    later = Compute(
        ("output.weight",), lambda t: t, "same"
    )  # larger, so written before
    targets = {**rules.targets, "norm.weight": kill, "output.weight": later}
    grow_checkpoint(
        folder / "source", folder / "grown", replace(rules, targets=targets)
    )


def test_a_killed_growth_leaves_no_target_and_runs_again(
    source: Path, tmp_path: Path
) -> None:
    before = hashes(source)
    with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
        mp.spawn(killed_growth, (tmp_path,))
    assert not (tmp_path / "grown").exists()
    assert (tmp_path / "grown.tmp").exists(), "it was stopped in the middle"
    grow_checkpoint(source, tmp_path / "grown", depth(MAPS["stack"]))
    assert {folder.name for folder in tmp_path.iterdir()} == {"source", "grown"}
    assert {file.name for file in (tmp_path / "grown").iterdir()} == {
        METADATA,
        "__0_0.distcp",
    }
    want = stacked(MAPS["stack"], weights())
    assert_same(load(tmp_path / "grown", want), want)
    assert hashes(source) == before


def sharded(tensors: Tensors) -> dict[str, DTensor]:
    mesh = init_device_mesh("cpu", (2,))
    return {
        name: distribute_tensor(tensor, mesh, [Shard(0)])
        for name, tensor in tensors.items()
    }


def save_and_grow(rank: int, folder: Path) -> None:
    dcp.save(training_state(sharded(weights())), checkpoint_id=folder / "two-ranks")
    rules = with_compute(depth(MAPS["stack"]))
    if rank == 0:
        begin(folder / "two-ranks", folder / "computed", rules)
    dist.barrier()
    write_part(folder / "two-ranks", folder / "computed", rules, rank, 2)
    dist.barrier()
    if rank == 0:
        commit(folder / "two-ranks", folder / "computed", rules, 2)


def load_sharded(rank: int, folder: Path) -> None:
    want = stacked(MAPS["stack"], weights())
    for name, model in [
        ("from-two", want),
        ("from-one", want),
        ("computed", computed(want)),
    ]:
        fresh = sharded(
            {key: torch.zeros_like(tensor) for key, tensor in model.items()}
        )
        dcp.load(fresh, storage_reader=SafeReader(folder / name), planner=SafePlanner())
        assert_same({key: tensor.full_tensor() for key, tensor in fresh.items()}, model)
    (folder / f"loaded-{rank}").touch()


def run_ranks(rank: int, folder: Path, job: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / job}.store", rank=rank, world_size=2
    )
    {"save_and_grow": save_and_grow, "load_sharded": load_sharded}[job](rank, folder)
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_save_grow_and_load(source: Path, tmp_path: Path) -> None:
    in_ranks(run_ranks, 2, tmp_path, "save_and_grow")
    for name, start in [("from-two", tmp_path / "two-ranks"), ("from-one", source)]:
        record = grow_checkpoint(start, tmp_path / name, depth(MAPS["stack"]))
        assert len(record["linked_files"]) == {"from-two": 2, "from-one": 1}[name]
    want = stacked(MAPS["stack"], weights())
    assert_same(load(tmp_path / "from-two", want), want)
    assert_same(load(tmp_path / "computed", want), computed(want))
    in_ranks(run_ranks, 2, tmp_path, "load_sharded")
    assert (tmp_path / "loaded-0").exists()
    assert (tmp_path / "loaded-1").exists()


BIG = {f"t{i}": (1 << 19,) for i in range(192)}  # 2 MiB each, 384 MiB in all
# glibc gives each thread an arena of 64 MiB and keeps freed blocks of this size in it, however many tensors follow.
ARENA_MIB = 64


def grow_and_measure(_: int, folder: Path) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = peak_mib()
    negate: dict[str, Rule] = {
        name: Compute((name,), torch.neg, "negate") for name in BIG
    }
    grow_checkpoint(folder / "source", folder / "grown", Rules(negate, BIG, BIG))
    (folder / "peak").write_text(str(peak_mib() - before))


def peak_mib() -> float:
    line = next(
        s
        for s in Path("/proc/self/status").read_text().splitlines()
        if s.startswith("VmHWM")
    )
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")
def test_memory_is_bounded_by_the_largest_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # glibc returns the memory of tensors from 32 MiB on at once; of smaller ones only where it is told so.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 20))
    model = {name: torch.ones(shape) for name, shape in BIG.items()}
    dcp.save(model, checkpoint_id=tmp_path / "source", no_dist=True)
    mp.spawn(grow_and_measure, (tmp_path,))
    assert float((tmp_path / "peak").read_text()) < 24 + ARENA_MIB


def test_the_metadata_is_dcp_s_own(source: Path, tmp_path: Path) -> None:
    grow_checkpoint(source, tmp_path / "grown", depth(MAPS["stack"]))
    metadata = pickle.loads((tmp_path / "grown" / METADATA).read_bytes())
    old = pickle.loads((source / METADATA).read_bytes())
    assert metadata.planner_data == {
        name: (name,) for name in metadata.state_dict_metadata
    }
    assert metadata.version == old.version
    assert {index.fqn for index in metadata.storage_data} == set(
        metadata.state_dict_metadata
    )
