"""Executes a Plan stage by stage in a run folder, which is a state machine on disk: any interruption, at any moment,
is followed by the same command again.

A stage is done when its ``DONE`` stands, naming its hash and its parent's. A train stage goes on from its newest
sealed checkpoint, or from its stated input; a grow stage is done again from the start. No stage ever starts from
anything else.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackgrow import seal
from stackgrow.data.order import Order
from stackgrow.errors import ChangedError, DamagedError, RunError, disk_error
from stackgrow.plan.resolve import make_plan
from stackgrow.plan.stages import GrowStage, ImportStage, Plan, Stage, TrainStage
from stackgrow.process import alerts, signals
from stackgrow.process.logs import log_to
from stackgrow.process.progress import say
from stackgrow.process.ranks import from_rank0, wait_for
from stackgrow.recipe.keys import Recipe
from stackgrow.report.html import finish_report
from stackgrow.report.summary import render_summary
from stackgrow.run.changed import ENGINE
from stackgrow.run.claim import claim
from stackgrow.run.preflight import check, held_out_note
from stackgrow.run_folder import provenance
from stackgrow.run_folder.extended import counted_from_before
from stackgrow.run_folder.folder import RunFolder, StageFolder
from stackgrow.run_folder.found import with_found, write_found
from stackgrow.run_folder.ledger import ledger
from stackgrow.text import human

if TYPE_CHECKING:
    from stackgrow.titan.job import StageJob

PR_SET_PDEATHSIG = 1


def run(file: str, sets: Sequence[str] = ()) -> None:
    """Runs, or goes on with, the recipe in ``file``. Every rank calls this.

    Raises:
        RecipeError: anything wrong with the recipe, the data or the ranks, before anything is created on disk.
        RunError: the run cannot go on; its exit code and message say why.
    """
    die_with_parent()
    signals.watch()
    try:
        _run(file, sets, int(os.environ.get("RANK", "0")))
    except OSError as error:
        raise disk_error(error) from error


@dataclass
class _Session:
    """A session of a run, on one rank."""

    run: RunFolder
    plan: Plan  # which settles as stages find things out
    order: Order
    rank: int
    identity: str = ""  # in the run's provenance; rank 0 knows it

    @property
    def world_size(self) -> int:
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def hashes(self) -> dict[str, str]:
        """Of the stages, by their names."""
        return self.plan.stage_hashes(self.order.data_hash)

    def folder(self, stage: Stage) -> StageFolder:
        return self.run.stage(stage.name)


def _run(file: str, sets: Sequence[str], rank: int) -> None:
    plan, order = check(file, sets)
    run = RunFolder(Path(plan.recipe.folder).absolute())
    session = _Session(run, plan, order, rank)
    with ExitStack() as held:
        refusal = None
        if rank == 0:  # which alone looks at the run folder: see process/ranks.py
            try:
                session.plan, session.identity = claim(held, plan, order, file, sets)
                note = held_out_note(session.plan.recipe)
            except (RunError, OSError) as error:
                refusal = disk_error(error) if isinstance(error, OSError) else error
                if session.world_size == 1:
                    raise refusal from error
            else:
                _watch(session)
                if note:
                    logging.getLogger(__name__).warning(note)
        try:
            _run_stages(session, refusal)
        except Exception as error:
            alerts.tell("stop", str(error))
            raise
        finally:
            alerts.end()


def _watch(session: _Session) -> None:
    """Whoever is named by run.on_event is told of what happens, from now on."""
    keys = session.plan.recipe.run
    if keys.on_event:
        alerts.start(
            keys.on_event, session.run.path, session.run.alerts_log, keys.stall_seconds
        )


def _run_stages(session: _Session, refusal: RunError | None) -> None:
    """``refusal``: why rank 0 cannot begin, which ends all ranks."""
    from stackgrow.titan.session import agree, at, start, stop, together

    start(session.plan.recipe, session.run.logs)
    signals.started()
    try:
        with together():
            agree(refusal)
            if session.rank != 0:
                log_to(session.run.log_file(session.rank))
            session.plan = _same_everywhere(session)
            for index in range(len(session.plan.stages)):
                stage = session.plan.stages[index]  # of the plan as it is by now
                at(stage.name)
                _run_stage_unless_done(session, stage)
    finally:
        stop()
    if session.rank == 0:
        _finish(session)


def _finish(session: _Session) -> None:
    run, plan = session.run, session.plan
    seal.write_json(run.ledger_file, ledger(plan, run, session.order))
    say(render_summary(plan, run.path, session.order))
    say(finish_report(run.path))
    alerts.tell(
        "done", f"{plan.recipe.name}: done, {human(plan.tokens)} tokens; {run.path}"
    )


def _same_everywhere(session: _Session) -> Plan:
    """The plan with what its stages have found, which rank 0 has read; refuses a rank that would train another one."""
    all_versions = provenance.versions()
    versions = {name: all_versions[name] for name in ENGINE if name in all_versions}
    found, hashes, versions_of_rank0 = from_rank0(
        lambda: (session.plan.found, session.hashes, versions)
    )
    plan = make_plan(session.plan.recipe, found=found)
    if (
        plan.stage_hashes(session.order.data_hash) != hashes
        or versions != versions_of_rank0
    ):
        what = "the recipe, the token stores or the versions of torch and torchtitan"
        raise ChangedError(
            f"on {platform.node()} {what} are not those of rank 0; give every node the same"
        )
    return plan


def _run_stage_unless_done(session: _Session, stage: Stage) -> None:
    from stackgrow.titan.session import stop_if_asked

    if not from_rank0(lambda: session.folder(stage).done() is not None):
        stop_if_asked()
        _run_stage(session, stage)
    elif session.rank == 0:
        say(f"{stage.name}  done before")


def _open_stage(plan: Plan, stage: Stage, folder: StageFolder, stage_hash: str) -> None:
    """Makes the stage's folder, and states in it what the stage is."""
    folder.path.mkdir(exist_ok=True)
    seal.sync_folder(folder.run.path)
    if stage.trains:
        folder.checkpoints.mkdir(
            exist_ok=True
        )  # its name is on disk with that of stage.json
    stored = {
        "stage_hash": stage_hash,
        "seed": plan.recipe.seed,
        "stage": stage.identity(),
    }
    seal.write_json(folder.stage_file, stored)


def _run_stage(session: _Session, stage: Stage) -> None:
    """Runs one stage to its DONE, and settles the plan with what it has found out."""
    started = time.monotonic()
    folder = session.folder(stage)
    hashes = session.hashes
    if session.rank == 0:
        _open_stage(session.plan, stage, folder, hashes[stage.name])
    inputs = _inputs(session, stage)
    if isinstance(stage, TrainStage):
        output = _train(session, stage, inputs)
    elif isinstance(stage, ImportStage):
        output = _import(session, stage)
    else:
        output = _grow(session, stage, inputs)

    # What it has found is part of the plan before DONE says that it is finished; then all ranks learn of it.
    if session.rank == 0:
        session.plan = with_found(session.plan, session.run, session.order.data_hash)
        stage = session.plan.stages[
            stage.index
        ]  # with the number of steps that it has had in the end
        seconds = time.monotonic() - started
        seal.write_json(
            folder.done_file,
            _done_record(session.plan, stage, folder, output, hashes, seconds),
        )
    session.plan = make_plan(
        session.plan.recipe, found=from_rank0(lambda: session.plan.found)
    )


@dataclass(frozen=True)
class _Inputs:
    """The sealed checkpoints that a stage begins with."""

    source: Path | None  # whose weights; None: random ones
    network: Path | None  # the maps that a "learn" growth folds in


def _inputs(session: _Session, stage: Stage) -> _Inputs:
    """As rank 0 sees them; every rank then waits until it sees them, and its stage's folder, too."""
    from stackgrow.checkpoint.dcp import METADATA

    source_stage, network_stage = session.plan.inputs(stage)

    def final_checkpoint(before: Stage | None) -> Path | None:
        return None if before is None else session.folder(before).final_checkpoint()

    inputs = from_rank0(
        lambda: _Inputs(final_checkpoint(source_stage), final_checkpoint(network_stage))
    )
    wait_for(session.folder(stage).stage_file)
    for checkpoint in (inputs.source, inputs.network):
        if checkpoint is not None:
            wait_for(checkpoint / METADATA, checkpoint / seal.MANIFEST)
    return inputs


def _train(session: _Session, stage: TrainStage, inputs: _Inputs) -> Path:
    """Returns the stage's last checkpoint."""
    from stackgrow.evaluate.evaluation import Evaluation
    from stackgrow.titan.trainer import run_stage

    recipe = session.plan.recipe
    folder = session.folder(stage)
    stage_hash = session.hashes[stage.name]
    job = stage_job(recipe, stage, stage_hash, folder, inputs.source)
    job.session = session.identity
    job.shorter = from_rank0(lambda: counted_from_before(folder, stage_hash))
    job.finds_end = stage.until is not None and stage.name not in session.plan.found
    if recipe.eval and not stage.learns_maps:
        job.after_step = Evaluation(recipe, stage_hash, session.run.path).after_step
    job.on_resume = partial(_note_resumed, folder)
    job.on_end_found = partial(_note_end, folder, stage_hash)
    run_stage(job)
    return folder.output(job.stage)


def _note_resumed(folder: StageFolder, step: int) -> None:
    provenance.add(folder.run, folder.name, start_step=step)


def _note_end(folder: StageFolder, stage_hash: str, step: int, fall: float) -> None:
    write_found(folder, stage_hash, step, loss_fell_per_billion_tokens=fall)


def _import(session: _Session, stage: ImportStage) -> Path:
    """Returns the checkpoint with the weights that were taken over."""
    from stackgrow.checkpoint.take_over import take_over

    folder = session.folder(stage)
    output = folder.output(stage)
    weights_hash = take_over(
        stage, output, rank=session.rank, world_size=session.world_size
    )
    if session.rank == 0:
        write_found(folder, session.hashes[stage.name], weights_hash)
        provenance.add(
            session.run, stage.name, folder=stage.folder, weights_hash=weights_hash
        )
        say(f"{stage.name}  {stage.change}")
    return output


def _grow(session: _Session, stage: GrowStage, inputs: _Inputs) -> Path:
    """Returns the grown checkpoint."""
    from torch.distributed import barrier

    from stackgrow.checkpoint.grow import grow

    assert inputs.source is not None
    output = session.folder(stage).output(stage)
    line = f"{stage.name}  grown before"
    if from_rank0(lambda: seal.read_seal(output) is None):
        line = grow(
            stage,
            session.hashes[stage.name],
            inputs.source,
            output,
            network=inputs.network,
            session=session.identity,
            barrier=barrier,
            rank=session.rank,
            world_size=session.world_size,
        )
    if session.rank == 0:
        say(line)
        alerts.tell("growth", line)
        manifests = {
            "input": inputs.source,
            "network": inputs.network,
            "output": output,
        }
        hashes = {
            name: seal.manifest_hash(path)
            for name, path in manifests.items()
            if path is not None
        }
        provenance.add(session.run, stage.name, **hashes)
    return output


def stage_job(
    recipe: Recipe,
    stage: TrainStage,
    stage_hash: str,
    folder: StageFolder,
    source: Path | None,
) -> StageJob:
    """The job of a train stage that starts from checkpoint ``source``, or learns maps of it."""
    from stackgrow.data.loader import WindowDataset
    from stackgrow.titan.job import StageJob

    data = WindowDataset.open(recipe.data, recipe.seed)
    job = StageJob(recipe, stage, stage_hash, folder.path, data)
    if stage.learns_maps:
        job.source = source
    else:
        job.parent = source
    return job


def _done_record(
    plan: Plan,
    stage: Stage,
    folder: StageFolder,
    output: Path,
    hashes: dict[str, str],
    seconds: float,
) -> dict[str, Any]:
    """What DONE states of a stage that has handed on the checkpoint ``output``."""
    manifest = seal.read_seal(output)
    if manifest is None:
        raise DamagedError(
            f"{output}: the stage ended without a sealed checkpoint; run the command again"
        )
    parent = plan.stages[stage.index - 1] if stage.index else None
    record: dict[str, Any] = {
        "stage_hash": hashes[stage.name],
        "parent_hash": hashes[parent.name] if parent else None,
        "checkpoint": str(output.relative_to(folder.path)),
        "manifest_sha256": seal.manifest_hash(output),
        "seconds": round(seconds, 3),
    }
    if isinstance(stage, TrainStage):  # what was trained, whatever the plan says
        steps = manifest["step"]
        record["steps"] = steps
        record["tokens"] = stage.batches.tokens(steps)
        record["flops"] = stage.flops_after(steps)
    return record


def die_with_parent() -> None:
    """A killed torchrun leaves its workers running and writing; the kernel is asked to kill them with it."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1 and b"python" not in Path("/proc/1/cmdline").read_bytes():
            os.kill(
                os.getpid(), signal.SIGKILL
            )  # it was killed before; in a container torchrun may be process 1
