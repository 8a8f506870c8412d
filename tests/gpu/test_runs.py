"""Runs on one device: base, growth and target; resumed bit for bit in bf16; the same curve with every kernel."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from launch import (
    REPOSITORY,
    Workplace,
    environment,
    losses,
    records,
    steps_logged,
    weights,
)
from shapes import Case, stage_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from stackgrow import seal
from stackgrow.checkpoint.dcp import SafePlanner, SafeReader
from stackgrow.plan.memory import Layout, stage_memory
from stackgrow.recipe.load import load_recipe
from stackgrow.run_folder.folder import RunFolder
from stackgrow.titan.model import Llama, model_args
from stackgrow.titan.shards import fingerprints

EXACT = ("train.precision=bf16", "train.deterministic=true")
# bf16 losses of the same curve, computed in another order.
BF16 = 2e-2


@pytest.fixture(scope="session")
def whole(workplace: Workplace) -> Path:
    """The undisturbed run, base, growth and target."""
    workplace.run(*EXACT, "run.folder=whole", ranks=1)
    return workplace.folder / "whole"


def test_base_growth_target(whole: Path, device: str) -> None:
    seen = losses(whole)
    assert list(seen) == [
        (s, i) for s in ("stage-0-train-2L", "stage-2-train-4L") for i in range(1, 21)
    ]
    assert all(math.isfinite(loss) for loss in seen.values())
    assert all(record["memory_gib"] > 0 for record in records(whole).values())
    if device == "cuda":
        assert all(0 < record["mfu"] < 1 for record in records(whole).values())


def test_killed_and_run_again_is_bit_exact(
    workplace: Workplace, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    sets = [*EXACT, f"run.folder={run}"]
    for stage, step in (("stage-0-train-2L", 6), ("stage-2-train-4L", 10)):
        workplace.kill_when(
            lambda stage=stage, step=step: logged(run, stage) >= step, *sets, ranks=1
        )
    workplace.run(*sets, ranks=1)
    assert losses(run) == losses(whole)
    for stage in ("stage-0-train-2L", "stage-2-train-4L"):
        assert weights(RunFolder(run).stage(stage).checkpoint(20)) == weights(
            RunFolder(whole).stage(stage).checkpoint(20)
        )


def logged(run: Path, stage: str) -> int:
    has_begun = RunFolder(run).stage(stage).metrics_file.exists()
    return steps_logged(run, stage) if has_begun else 0


@pytest.mark.parametrize(
    "sets",
    [
        ["train.attention=flash_attn"],
        ["train.attention=flex"],
        ["train.compile=true"],
        [
            "train.compile=true",
            "train.attention=flash_attn",
            "train.activation_checkpoint=selective",
        ],
        ["train.loss_chunk=100", "train.activation_checkpoint=selective"],
        ["train.loss_chunk=128", "train.compile=true"],
        ["train.optimizer=for-loop"],
    ],
    ids=" ".join,
)
def test_the_same_curve(
    workplace: Workplace, whole: Path, tmp_path: Path, sets: list[str], device: str
) -> None:
    kernels = {s.split("=")[1] for s in sets if s.startswith("train.attention=")}
    if kernels and device == "cpu":
        pytest.skip("has kernels for CUDA alone")
    if "flash_attn" in kernels:
        pytest.importorskip("flash_attn")
    workplace.run(*sets, "train.precision=bf16", f"run.folder={tmp_path}/run", ranks=1)
    expected, found = losses(whole), losses(tmp_path / "run")
    assert found.keys() == expected.keys()
    assert max(abs(found[k] / expected[k] - 1) for k in expected) < BF16


@pytest.mark.usefixtures("process_group")
def test_growth_loads_straight_into_shards(whole: Path, device: str) -> None:
    """The grown checkpoint, whose tensors share bytes, into FSDP shards on the device; the fingerprints, which growth
    computed on the CPU, are those of the shards."""
    grown = RunFolder(whole).stage("stage-1-grow").checkpoints
    recipe = load_recipe(RunFolder(whole).recipe_file, trusted=True)
    with torch.device("meta"):
        model = Llama(model_args(recipe.model, recipe.seed))
    mesh = init_device_mesh(device, (1,))
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=device)
    state = dict(model.state_dict())
    assert {tensor.device.type for tensor in state.values()} == {device}
    dcp.load(state, storage_reader=SafeReader(str(grown)), planner=SafePlanner())
    manifest = seal.read_seal(grown)
    assert manifest is not None
    assert fingerprints(state) == manifest["tensors"]


def tool(name: str, *arguments: str, folder: Path) -> str:
    """Standard output of a script of tools/ in a process of its own: one that was forked could not use CUDA."""
    command = [sys.executable, str(REPOSITORY / "tools" / f"{name}.py"), *arguments]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("mode", "activation_checkpoint", "loss_chunk"),
    [
        ("eager", "none", 0),
        ("eager", "selective", 0),
        ("compiled", "none", 0),
        ("compiled", "selective", 4096),
    ],
)
def test_memory_is_what_the_planner_says(
    tmp_path: Path, device: str, mode: str, activation_checkpoint: str, loss_chunk: int
) -> None:
    if device == "cpu":
        pytest.skip("what a CPU process holds is not what tensors take")
    case = Case(
        shape="410M",
        kernel="sdpa",
        mode=mode,
        precision="bf16",
        activation_checkpoint=activation_checkpoint,
        loss_chunk=loss_chunk,
        step_tokens=2**15,
        steps=3,
        micro_batch=4,
        pair=False,
    )
    output = tool(
        "bench/gpu", "--work", json.dumps(dataclasses.asdict(case)), folder=tmp_path
    )
    peak = json.loads(output.splitlines()[-1])["peak_gib"]
    _, stage = stage_of(case, steps=3, folder=tmp_path)
    estimate = stage_memory(stage, Layout(1, 1, 1), 4).total
    assert abs(peak / (estimate / 2**30) - 1) < 0.15


def test_handover_is_split(workplace: Workplace) -> None:
    """Growth itself takes less than a second; what the rest takes, tools/bench/handover.py says."""
    assert (
        json.loads(
            tool("bench/handover", "tiny.toml", "--json", folder=workplace.folder)
        )["grow"]
        < 1
    )
