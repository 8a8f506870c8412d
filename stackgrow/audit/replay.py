"""Training again: N steps from a checkpoint of a run, in a scratch folder, compared with what the run recorded."""

from __future__ import annotations

import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackgrow import seal
from stackgrow.audit.case import Case
from stackgrow.audit.report import Look, NotChecked, WrongRequest
from stackgrow.data.store import StoreError
from stackgrow.errors import DamagedError
from stackgrow.plan.checks import world_problems
from stackgrow.plan.stages import Plan, TrainStage
from stackgrow.process.logs import log_to
from stackgrow.process.ranks import from_rank0
from stackgrow.recipe.keys import Recipe
from stackgrow.recipe.values import MAX_INT, Duration
from stackgrow.run.engine import stage_job
from stackgrow.run_folder import provenance
from stackgrow.run_folder.extended import counted_from_before
from stackgrow.run_folder.folder import (
    METRICS,
    PROVENANCE,
    VALIDATION,
    RunFolder,
    StageFolder,
)
from stackgrow.run_folder.lines import iter_records
from stackgrow.text import numbered

if TYPE_CHECKING:
    from stackgrow.titan.job import StageJob

# Relative, where the run was made on other ranks, another mesh, machine or software: sums in another order.
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "float8": 1e-2}
# ||difference|| / ||tensor|| of every tensor of the model.
WEIGHT_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "float8": 5e-2}
COMPARED = ("loss", "grad_norm", "lr")


@dataclass(frozen=True)
class Request:
    """Steps ``first`` + 1 to ``last`` of a stage."""

    stage: TrainStage
    first: int
    last: int

    @property
    def count(self) -> int:
        return self.last - self.first

    def holds(self, step: int) -> bool:
        return self.first < step <= self.last


def replay(case: Case, words: str, strict: bool = False) -> Look:
    """``words``: "STAGE:STEP+N". Step 0 is the stage's input; any other must be a kept checkpoint. Called by every
    rank; the comparison is rank 0's. ``strict``: bit for bit, the optimizer's state too, whatever the run claims of the
    machine and the software that it was made with.

    Raises:
        WrongRequest: there is nothing to train again or to compare with, or not on these ranks.
    """
    request = _parsed(case, words)
    if case.run.holds_records_only():
        _require_what_is_kept(case, request)
    _require_data(case)
    problems = list(world_problems(case.plan, int(os.environ.get("WORLD_SIZE", "1"))))
    if problems:
        told = "; ".join(": ".join(problem) for problem in problems)
        raise WrongRequest(f"{words} needs other ranks: {told}")
    import torch.distributed as dist

    from stackgrow.titan.session import start, stop
    from stackgrow.titan.trainer import run_stage

    others = _other_circumstances(
        case, request
    )  # before torchtitan changes the environment
    if strict:
        _require_the_same_ranks(case, request, others)
        others = []

    recipe = _undisturbed(case.plan.recipe)
    start(recipe, Path(tempfile.gettempdir()))
    # Rank 0's folder is everyone's: they share its file system. Progress goes where it does not mix with the result.
    with (
        tempfile.TemporaryDirectory(prefix="replay-") as scratch,
        redirect_stdout(sys.stderr),
    ):
        rank = dist.get_rank()
        run = RunFolder(Path(from_rank0(lambda: scratch)))
        log_to(RunFolder(Path(scratch)).log_file(rank))
        job = _job(case, request, recipe, run)
        run_stage(job)
        stop()
        if rank != 0:
            return ""
        return (
            yield from _compared(case, request, run.stage(request.stage.name), others)
        )


def _parsed(case: Case, words: str) -> Request:
    match = re.fullmatch(r"([\w-]+):(\d{1,18})\+(\d{1,18})", words)
    stages = {stage.name: stage for stage in case.plan.train_stages}
    if match is None or match[1] not in stages:
        raise WrongRequest(
            f"{words!r} is not STAGE:STEP+N with one of {', '.join(stages)}"
        )
    stage, first, count = stages[match[1]], int(match[2]), int(match[3])
    request = Request(stage, first, first + count)
    kept = [0, *case.folder(stage).sealed_steps()]
    if first not in kept or not first < request.last <= stage.steps:
        raise WrongRequest(
            f"{words!r}: {stage.name} has {stage.steps} steps, and can be gone on with at {kept}"
        )
    recorded = [
        record["step"] for record in iter_records(case.folder(stage).metrics_file)
    ]
    if request.last not in kept and not any(request.holds(step) for step in recorded):
        what = f"{stage.name} wrote down none of these steps, and kept no checkpoint of step {request.last}"
        raise WrongRequest(f"{words!r}: there is nothing to compare with: {what}")
    return request


def _require_what_is_kept(case: Case, request: Request) -> None:
    """Of records that were kept without their run, only what begins with new weights can be trained again, and it can
    be judged only where the session is known. In a whole run both are there, or it is damaged."""
    source, _ = case.plan.inputs(request.stage)
    if source is not None:
        raise WrongRequest(
            f"{case.run.path} are records alone: the weights that {request.stage.name} begins with were not kept"
        )
    if not case.record["sessions"]:
        raise WrongRequest(
            f"{case.run.path} are records alone, their sessions were not kept: on which ranks, machine and packages it "
            "was trained is not known, and so not how equal a training of today must be"
        )


def _require_data(case: Case) -> None:
    """That its tokens are on this machine, where they may be read; that they are not is no fault of the run."""
    from stackgrow.data.loader import WindowDataset

    outside = case.stores_outside()
    if outside:
        raise WrongRequest(
            f"{', '.join(outside)} leaves the working directory; name every store with --data to train on it again"
        )
    recipe = case.plan.recipe
    try:
        WindowDataset.open(recipe.data, recipe.seed)
    except StoreError as error:
        raise WrongRequest(
            f"nothing can be trained again: {error}; or name the stores with --data"
        ) from error


def _undisturbed(recipe: Recipe) -> Recipe:
    """The same training; every step is logged, and nothing saved before the end."""
    return replace(
        recipe,
        log=replace(recipe.log, interval=Duration(1, "steps"), tensorboard=False),
        checkpoint=replace(
            recipe.checkpoint,
            interval=Duration(MAX_INT, "steps"),
            async_mode="disabled",
        ),
    )


def _job(case: Case, request: Request, recipe: Recipe, scratch: RunFolder) -> StageJob:
    """The stage up to the last step that is asked for, with the learning rates of the whole stage."""
    stage = request.stage
    train = replace(stage.train, horizon=Duration(stage.horizon_steps, "steps"))
    shorter = replace(stage, steps=request.last, train=train, until=None)
    source, _ = case.plan.inputs(stage)
    folder = scratch.stage(stage.name)
    job = stage_job(
        recipe,
        shorter,
        case.hashes[stage.name],
        folder,
        case.output(source) if source else None,
    )
    job.shorter = counted_from_before(case.folder(stage), case.hashes[stage.name])
    if request.first:
        job.resume = case.folder(stage).checkpoint(request.first)
    folder.path.mkdir(exist_ok=True)
    return job


def _compared(
    case: Case, request: Request, again: StageFolder, others: list[str]
) -> Look:
    """The run against ``again``, the stage's folder of the replay; ``others``: circumstances that differ."""
    stage, last = request.stage, request.last
    loss_limit = weight_limit = 0.0
    if others:
        loss_limit = LOSS_TOLERANCE[stage.train.precision]
        weight_limit = WEIGHT_TOLERANCE[stage.train.precision]

    # What was written down of each step, where both have written it.
    numbers: list[float] = []
    for name, keys in {METRICS: COMPARED, VALIDATION: ("loss",)}.items():
        file = case.folder(stage).record_file(name)
        for step, differences in _record_differences(
            file, again.record_file(name), keys, request
        ):
            numbers += [difference.size for difference in differences]
            wrong = {
                d.name: f"{d.before} -> {d.after}"
                for d in differences
                if d.size > loss_limit
            }
            if wrong:
                yield (
                    case.within(file),
                    f"step {step} differs when trained again: {wrong}",
                )

    # The weights at the end, where the run has kept them; AdamW's state too, where all bits must be equal.
    tensors: list[float] = []
    kept = case.folder(stage).checkpoint(last)
    if seal.read_seal(kept) is not None:
        for name, size in _tensor_differences(
            kept, again.checkpoint(last), model_only=bool(others)
        ):
            tensors.append(size)
            if size > weight_limit:
                yield (
                    case.within(kept),
                    f"{name} differs by {size:.1e} when trained again",
                )

    return (yield from in_words(case.plan, request, numbers, tensors, others))


def in_words(
    plan: Plan,
    request: Request,
    numbers: Sequence[float],
    tensors: Sequence[float],
    others: Sequence[str],
) -> Look:
    """What a replay has compared, and what it leaves open. ``numbers``, ``tensors``: the relative differences that it
    saw; ``others``: circumstances that differ."""
    stage = request.stage
    what = f"{stage.name} {request.first} to {request.last}: {numbered(len(numbers), 'number')}"
    if tensors:
        what += (
            f", {numbered(len(tensors), 'tensor')} of {seal.step_name(request.last)}"
        )
    worst = max([*numbers, *tensors], default=0.0)
    what += f"; largest difference {worst:.1e}" if worst else "; equal bit for bit"

    # What differs in no bit has used no tolerance.
    if others and worst:
        loss_limit = LOSS_TOLERANCE[stage.train.precision]
        weight_limit = WEIGHT_TOLERANCE[stage.train.precision]
        what += f"; allowed are {loss_limit:g} and for weights {weight_limit:g}, since {', '.join(others)} differ"
        yield NotChecked(
            f"equality bit for bit: {', '.join(others)} differ, and a tolerance was used"
        )
    elif others:
        what += f", though {', '.join(others)} differ"

    # The rest of the run.
    if request.count < sum(stage.steps for stage in plan.train_stages):
        yield NotChecked(
            f"the losses of the steps that were not trained again: all but {request.first + 1} to {request.last} of "
            f"{stage.name}"
        )
    if not tensors:
        yield NotChecked(
            f"the weights after the steps that were trained again: {seal.step_name(request.last)} of {stage.name} is "
            "not kept"
        )
    elif others:
        yield NotChecked("the optimizer's state")
    return what


def _other_circumstances(case: Case, request: Request) -> list[str]:
    """In what the sessions that made these steps differ from this one; nothing: equality bit for bit is due."""
    name = request.stage.name
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    now: dict[str, Any] = {
        "world_size": world_size,
        "mesh": provenance.mesh(case.plan, world_size)[name],
        "hardware": provenance.hardware(),
        "packages": provenance.versions(),
        "environment": provenance.environment(os.environ),
    }
    different: dict[str, str] = {}
    for session in _makers(case, request):
        then = {**session, "mesh": session["mesh"].get(name)}
        for circumstance in now:
            if then[circumstance] != now[circumstance]:
                different.setdefault(circumstance, circumstance)

        # The one difference between two CPUs that a variable undoes.
        kernels = then["hardware"].get("cpu_capability")  # not known of earlier runs
        kernels_now = now["hardware"]["cpu_capability"]
        if kernels not in (None, kernels_now):
            different["hardware"] = _other_kernels(kernels, kernels_now)
    return [
        different[circumstance] for circumstance in now if circumstance in different
    ]


def _other_kernels(then: str, now: str) -> str:
    """``then``, ``now``: torch's CPU capability."""
    return (
        f"hardware (torch's CPU kernels for {now}, the run's were for {then}: "
        f"ATEN_CPU_CAPABILITY={then.lower()} takes those where the CPU has them)"
    )


def _require_the_same_ranks(case: Case, request: Request, others: list[str]) -> None:
    """Other ranks sum in another order: no two such trainings are equal bit for bit."""
    if "world_size" in others or "mesh" in others:
        ranks = sorted({session["world_size"] for session in _makers(case, request)})
        told = ", ".join(map(str, ranks))
        raise WrongRequest(
            f"--strict compares bit for bit, on the ranks that the run states for these steps: {told}"
        )


def _makers(case: Case, request: Request) -> list[dict[str, Any]]:
    """The sessions that made the steps.

    Raises:
        DamagedError: no session says that it made one of them.
    """
    sessions = case.record["sessions"]
    makers = set()
    for step in range(request.first + 1, request.last + 1):
        maker = provenance.maker(sessions, request.stage.name, step)
        if maker is None:
            raise DamagedError(
                f"{PROVENANCE}: no session says that it made step {step} of {request.stage.name}"
            )
        makers.add(maker)
    return [sessions[index] for index in sorted(makers)]


@dataclass(frozen=True)
class Difference:
    """Of one number in a record: relative, 0 only where both are equal."""

    name: str
    before: float
    after: float

    @property
    def size(self) -> float:
        if self.before == self.after:
            return 0.0
        if self.before and math.isfinite(self.after / self.before):
            return abs(self.after / self.before - 1)
        return math.inf


def _record_differences(
    before: Path, after: Path, keys: Sequence[str], request: Request
) -> Iterator[tuple[int, list[Difference]]]:
    """Per step that is asked for and stands in both files."""
    records_after = {record["step"]: record for record in iter_records(after)}
    for record in iter_records(before):
        step = record["step"]
        if request.holds(step) and step in records_after:
            yield (
                step,
                [
                    Difference(key, record[key], records_after[step][key])
                    for key in keys
                ],
            )


def _tensor_differences(
    old: Path, new: Path, *, model_only: bool
) -> Iterator[tuple[str, float]]:
    """||new - old|| / ||old|| of every tensor, the optimizer's included or not; 0 only where all bits are equal."""
    import torch

    from stackgrow.checkpoint.dcp import (
        is_model_key,
        read_metadata,
        read_tensor,
        tensor_shapes,
    )

    before, after = read_metadata(old), read_metadata(new)
    for name in tensor_shapes(before):
        if model_only and not is_model_key(name):
            continue
        a = read_tensor(old, before, name)
        b = read_tensor(new, after, name)
        if torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8)):
            yield name, 0.0
        else:
            a, b = a.double(), b.double()
            yield name, float((b - a).norm() / a.norm().clamp(min=1e-300))
