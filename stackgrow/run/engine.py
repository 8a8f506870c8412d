"""Executes a Plan stage by stage in a run folder, which is a state machine on disk: any interruption, at any moment,
is followed by the same command again.

A stage is done when its ``DONE`` stands, naming its hash and its parent's. A train stage goes on from its newest
sealed checkpoint, or from its stated input; a grow stage is done again from the start. No stage ever starts from
anything else.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackgrow import seal
from stackgrow.data.order import Order
from stackgrow.errors import ChangedError, DamagedError, RunError, disk_error
from stackgrow.plan.resolve import make_plan
from stackgrow.plan.stages import ImportStage, Plan, Stage, TrainStage
from stackgrow.process import signals
from stackgrow.process.logs import log_to
from stackgrow.process.ranks import from_rank0, wait_for
from stackgrow.recipe.keys import Recipe
from stackgrow.report.html import finish_report
from stackgrow.report.summary import render_summary
from stackgrow.run.changed import ENGINE
from stackgrow.run.claim import claim
from stackgrow.run.preflight import check
from stackgrow.run_folder import provenance
from stackgrow.run_folder.folder import DONE, STAGE_FILE, RunFolder, StageFolder
from stackgrow.run_folder.found import with_found, write_found
from stackgrow.run_folder.ledger import ledger

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


def _run(file: str, sets: Sequence[str], rank: int) -> None:
    plan, order = check(file, sets)
    with ExitStack() as held:
        session, refusal = "", None
        if rank == 0:  # which alone looks at the run folder: see shared.py
            try:
                plan, session = claim(held, plan, order, file, sets)
            except (RunError, OSError) as error:
                refusal = disk_error(error) if isinstance(error, OSError) else error
                if os.environ.get("WORLD_SIZE", "1") == "1":
                    raise refusal from error
        _run_stages(plan, order, rank, session, refusal)


def _run_stages(plan: Plan, order: Order, rank: int, session: str, refusal: RunError | None) -> None:
    from stackgrow.titan.session import agree, at, start, stop, stop_if_asked, together

    folder = Path(plan.recipe.folder).absolute()
    start(plan.recipe, RunFolder(folder).logs)
    signals.started()
    try:
        with together():
            agree(refusal)
            if rank:
                log_to(RunFolder(folder).log_file(rank))
            plan = _same_everywhere(plan, order.data_hash)
            for index in range(len(plan.stages)):
                stage = plan.stages[index]
                path = folder / stage.name
                at(stage.name)
                if from_rank0(partial(_is_done, path)):
                    if rank == 0:
                        print(f"{stage.name}  done before", flush=True)
                else:
                    stop_if_asked()
                    plan = _run_stage(plan, stage, path, order.data_hash, rank, session)
    finally:
        stop()
    if rank == 0:
        seal.write_json(RunFolder(folder).ledger_file, ledger(plan, folder, order))
        print(render_summary(plan, folder, order), flush=True)
        print(finish_report(folder), flush=True)


def _same_everywhere(plan: Plan, data_hash: str) -> Plan:
    """``plan`` with what its stages have found, which rank 0 has read; refuses a rank that would train another one."""
    versions = {name: version for name, version in provenance.versions().items() if name in ENGINE}
    known = from_rank0(lambda: (plan.found, plan.stage_hashes(data_hash), versions))
    plan = make_plan(plan.recipe, found=known[0])
    if (plan.stage_hashes(data_hash), versions) != known[1:]:
        what = "the recipe, the token stores or the versions of torch and torchtitan"
        raise ChangedError(f"on {platform.node()} {what} are not those of rank 0; give every node the same")
    return plan


def _is_done(path: Path) -> bool:
    return seal.read_json(path / DONE) is not None


def _open_stage(plan: Plan, stage: Stage, path: Path, hashes: dict[str, str]) -> None:
    path.mkdir(exist_ok=True)
    stored = {"stage_hash": hashes[stage.name], "seed": plan.recipe.seed, "stage": stage.identity()}
    seal.write_json(path / STAGE_FILE, stored)


def _run_stage(plan: Plan, stage: Stage, path: Path, data_hash: str, rank: int, session: str) -> Plan:
    """Runs one stage, and returns the plan with what it has found out."""
    from torch.distributed import barrier

    from stackgrow.checkpoint.dcp import METADATA
    from stackgrow.checkpoint.grow import grow
    from stackgrow.checkpoint.take_over import take_over
    from stackgrow.evaluate.evaluation import Evaluation
    from stackgrow.titan.trainer import run_stage

    started, hashes = time.monotonic(), plan.stage_hashes(data_hash)
    ranks = {"rank": rank, "world_size": int(os.environ.get("WORLD_SIZE", "1"))}
    if rank == 0:
        _open_stage(plan, stage, path, hashes)
    inputs = from_rank0(
        lambda: [StageFolder(path.parent / s.name).final_checkpoint() if s else None for s in plan.inputs(stage)]
    )
    wait_for(path / STAGE_FILE, *(folder / name for folder in inputs if folder for name in (METADATA, seal.MANIFEST)))
    source, network = inputs
    output = StageFolder(path).output(stage)
    if isinstance(stage, TrainStage):
        finds_end = stage.until is not None and stage.name not in plan.found
        job = stage_job(plan.recipe, stage, hashes[stage.name], path, source, session, finds_end)
        if plan.recipe.eval and not stage.learns_maps:
            job.after_step = Evaluation(plan.recipe, hashes[stage.name], path.parent).after_step
        job.on_resume = partial(_note_resumed, path)
        job.on_end_found = partial(_note_end, path, hashes[stage.name])
        run_stage(job)
        output = StageFolder(path).output(job.stage)
    elif isinstance(stage, ImportStage):
        weights = take_over(stage, output, **ranks)
        if rank == 0:
            write_found(path, hashes[stage.name], weights)
            provenance.add(path.parent, stage.name, folder=stage.folder, weights_hash=weights)
            print(f"{stage.name}  {stage.change}", flush=True)
    else:
        assert source is not None
        line = f"{stage.name}  grown before"
        if from_rank0(lambda: seal.read_seal(output) is None):
            how: dict[str, Any] = {"network": network, "session": session, "barrier": barrier, **ranks}
            line = grow(stage, hashes[stage.name], source, output, **how)
        if rank == 0:
            print(line, flush=True)
            made = {"input": source, "network": network, "output": output}
            provenance.add(path.parent, stage.name, **{k: seal.manifest_hash(v) for k, v in made.items() if v})
    if rank == 0:
        plan = with_found(plan, path.parent, data_hash)
        done = _done_record(plan, plan.stages[stage.index], path, output, hashes, time.monotonic() - started)
        seal.write_json(path / DONE, done)
    return make_plan(plan.recipe, found=from_rank0(lambda: plan.found))


def _note_resumed(path: Path, step: int) -> None:
    provenance.add(path.parent, path.name, start_step=step)


def _note_end(path: Path, stage_hash: str, step: int, fall: float) -> None:
    write_found(path, stage_hash, step, loss_fell_per_billion_tokens=fall)


def stage_job(
    recipe: Recipe,
    stage: TrainStage,
    stage_hash: str,
    path: Path,
    source: Path | None,
    session: str = "",
    finds_end: bool = False,
) -> StageJob:
    """The job of a train stage that starts from checkpoint ``source``, or learns maps of it."""
    from stackgrow.data.loader import WindowDataset
    from stackgrow.titan.job import StageJob

    data = WindowDataset.open(recipe.data, recipe.seed)
    start: dict[str, Any] = {"source": source} if stage.learns_maps else {"parent": source}
    return StageJob(recipe, stage, stage_hash, path, data, session=session, finds_end=finds_end, **start)


def _done_record(
    plan: Plan, stage: Stage, path: Path, output: Path, hashes: dict[str, str], seconds: float
) -> dict[str, Any]:
    index = plan.stages.index(stage)
    manifest = seal.read_seal(output)
    if manifest is None:
        raise DamagedError(f"{output}: the stage ended without a sealed checkpoint; run the command again")
    counts = {}
    if isinstance(stage, TrainStage):  # what was trained, whatever the plan says
        steps = manifest["step"]
        counts = {"steps": steps, "tokens": stage.batches.tokens(steps), "flops": stage.flops_after(steps)}
    return {
        "stage_hash": hashes[stage.name],
        "parent_hash": hashes[plan.stages[index - 1].name] if index else None,
        "checkpoint": str(output.relative_to(path)),
        "manifest_sha256": seal.manifest_hash(output),
        "seconds": round(seconds, 3),
        **counts,
    }


def die_with_parent() -> None:
    """A killed torchrun leaves its workers running and writing; the kernel is asked to kill them with it."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1 and b"python" not in Path("/proc/1/cmdline").read_bytes():
            os.kill(os.getpid(), signal.SIGKILL)  # it was killed before; in a container torchrun may be process 1
