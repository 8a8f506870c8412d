"""Training again: N steps from a checkpoint of a run, in a scratch folder, compared with what the run recorded."""

from __future__ import annotations

import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

from stackgrow import seal
from stackgrow.audit.case import Case
from stackgrow.audit.report import Look, WrongRequest
from stackgrow.plan.checks import world_problems
from stackgrow.plan.stages import TrainStage
from stackgrow.process.logs import log_to
from stackgrow.process.ranks import from_rank0
from stackgrow.recipe.keys import Recipe
from stackgrow.recipe.values import MAX_INT, Duration
from stackgrow.run.engine import stage_job
from stackgrow.run_folder import provenance
from stackgrow.run_folder.folder import METRICS, VALIDATION, StageFolder
from stackgrow.run_folder.lines import iter_records

# Relative, where the run was made on other ranks, another mesh, machine or software: sums in another order.
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "float8": 1e-2}
# ||difference|| / ||tensor|| of every tensor of the model.
WEIGHT_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "float8": 5e-2}
CIRCUMSTANCES = ("world_size", "mesh", "hardware", "packages", "environment")
COMPARED = ("loss", "grad_norm", "lr")


def replay(case: Case, request: str) -> Look:
    """``request``: "STAGE:STEP+N". Step 0 is the stage's input; any other must be a kept checkpoint. Called by every
    rank; the comparison is rank 0's."""
    import torch.distributed as dist

    from stackgrow.titan.session import start, stop
    from stackgrow.titan.trainer import run_stage

    stage, first, last = _requested(case, request)
    if problems := list(world_problems(case.plan, int(os.environ.get("WORLD_SIZE", "1")))):
        raise WrongRequest(f"{request} needs other ranks: {'; '.join(map(': '.join, problems))}")
    recipe = _undisturbed(case.plan.recipe)
    train = replace(stage.train, horizon=Duration(stage.horizon_steps, "steps"))
    short = replace(stage, steps=last, train=train, until=None)
    source = next((case.output(s) for s in case.plan.inputs(stage) if s), None)
    others = _other_circumstances(case, stage, first, last)  # before torchtitan changes the environment
    start(recipe, Path(tempfile.gettempdir()))
    # Rank 0's folder is everyone's: they share its file system. Progress goes where it does not mix with the result.
    with tempfile.TemporaryDirectory(prefix="replay-") as scratch, redirect_stdout(sys.stderr):
        rank, folder = dist.get_rank(), Path(from_rank0(lambda: scratch)) / stage.name
        log_to(Path(scratch) / f"rank-{rank}.log")
        job = stage_job(recipe, short, case.hashes[stage.name], folder, source)
        job.resume = case.folder(stage).checkpoint(first) if first else None
        job.folder.mkdir(exist_ok=True)
        run_stage(job)
        stop()
        return (yield from _compared(case, stage, first, last, job.folder, others)) if rank == 0 else ""


def _requested(case: Case, request: str) -> tuple[TrainStage, int, int]:
    match, stages = re.fullmatch(r"([\w-]+):(\d{1,18})\+(\d{1,18})", request), case.plan.train_stages
    chosen = [stage for stage in stages if match and stage.name == match[1]]
    if not match or not chosen:
        raise WrongRequest(f"{request!r} is not STAGE:STEP+N with one of {', '.join(s.name for s in stages)}")
    stage, first, last = chosen[0], int(match[2]), int(match[2]) + int(match[3])
    kept = [0, *case.folder(stage).sealed_steps()]
    if first not in kept or not first < last <= stage.steps:
        raise WrongRequest(f"{request!r}: {stage.name} has {stage.steps} steps, and can be gone on with at {kept}")
    recorded = iter_records(case.path(stage) / METRICS)
    if last not in kept and not any(first < row["step"] <= last for row in recorded):
        what = f"{stage.name} wrote down none of these steps, and kept no checkpoint of step {last}"
        raise WrongRequest(f"{request!r}: there is nothing to compare with: {what}")
    return stage, first, last


def _undisturbed(recipe: Recipe) -> Recipe:
    """The same training; every step is logged, and nothing saved before the end."""
    return replace(
        recipe,
        log=replace(recipe.log, interval=Duration(1, "steps"), tensorboard=False),
        checkpoint=replace(recipe.checkpoint, interval=Duration(MAX_INT, "steps"), async_mode="disabled"),
    )


def _compared(case: Case, stage: TrainStage, first: int, last: int, folder: Path, others: list[str]) -> Look:
    loss_limit, weight_limit = (0.0, 0.0)
    if others:
        loss_limit, weight_limit = LOSS_TOLERANCE[stage.train.precision], WEIGHT_TOLERANCE[stage.train.precision]
    losses: list[float] = []
    for name, keys in {METRICS: COMPARED, VALIDATION: ("loss",)}.items():
        again = {row["step"]: row for row in iter_records(folder / name)}
        for row in iter_records(case.path(stage) / name):
            if first < row["step"] <= last and row["step"] in again:
                found = {key: _difference(row[key], again[row["step"]][key]) for key in keys}
                losses += found.values()
                if wrong := {k: f"{row[k]} -> {again[row['step']][k]}" for k, d in found.items() if d > loss_limit}:
                    yield f"{stage.name}/{name}", f"step {row['step']} differs when trained again: {wrong}"
    weights = []
    kept = case.folder(stage).checkpoint(last)
    if seal.read_seal(kept) is not None:
        for tensor, difference in _tensor_differences(
            kept, StageFolder(folder).checkpoint(last), model_only=bool(others)
        ):
            weights.append(difference)
            if difference > weight_limit:
                yield case.within(kept), f"{tensor} differs by {difference:.1e} when trained again"
    worst = max([*losses, *weights], default=0.0)
    what = f"{len(losses)} numbers, {len(weights)} tensors of {kept.name}" if weights else f"{len(losses)} numbers"
    limits = f"; allowed are {loss_limit:g} and for weights {weight_limit:g}, since {', '.join(others)} differ"
    return (
        f"{stage.name} {first} to {last}: {what}; "
        + (f"largest difference {worst:.1e}" if worst else "equal bit for bit")
        + (limits if others else "")
    )


def _other_circumstances(case: Case, stage: TrainStage, first: int, last: int) -> list[str]:
    """In what the sessions that made these steps differ from this one; nothing: equality bit for bit is due."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    now = {
        "world_size": world_size,
        "mesh": provenance.mesh(case.plan, world_size)[stage.name],
        "hardware": provenance.hardware(),
        "packages": provenance.versions(),
        "environment": provenance.environment(os.environ),
    }
    starts = [s.get("stages", {}).get(stage.name, {}).get("start_step", MAX_INT) for s in case.record["sessions"]]
    makers = {max(i for i, start in enumerate(starts) if start < step) for step in range(first + 1, last + 1)}
    sessions = [case.record["sessions"][i] for i in sorted(makers)]
    sessions = [{**session, "mesh": session["mesh"].get(stage.name)} for session in sessions]
    return [name for name in CIRCUMSTANCES if any(session[name] != now[name] for session in sessions)]


def _difference(old: float, new: float) -> float:
    if old == new:
        return 0.0
    return abs(new / old - 1) if old and math.isfinite(new / old) else math.inf


def _tensor_differences(old: Path, new: Path, *, model_only: bool) -> Iterator[tuple[str, float]]:
    """||new - old|| / ||old|| of every tensor, the optimizer's included or not; 0 only where all bits are equal."""
    import torch

    from stackgrow.checkpoint.dcp import is_model_key, read_metadata, read_tensor, tensor_shapes

    before, after = read_metadata(old), read_metadata(new)
    for name in tensor_shapes(before):
        if model_only and not is_model_key(name):
            continue
        a, b = read_tensor(old, before, name), read_tensor(new, after, name)
        if torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8)):
            yield name, 0.0
        else:
            a, b = a.double(), b.double()
            yield name, float((b - a).norm() / a.norm().clamp(min=1e-300))
