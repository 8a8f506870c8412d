"""How far a run has come, read from its folder without touching it, and what of it can be spared."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stackgrow import seal
from stackgrow.errors import LockedError, RunError
from stackgrow.process.ranks import lock
from stackgrow.run_folder.folder import RunFolder, StageFolder
from stackgrow.run_folder.found import plan_of_run
from stackgrow.run_folder.lines import iter_records

FINISHED = "finished"
RUNNING = "running"
STOPPED = "stopped"
DAMAGED = "damaged"
RECORDS_ONLY = "records only"  # kept without the run: there is nothing to go on from


@dataclass(frozen=True)
class RunState:
    """One run as its folder shows it. ``stage`` is the one at work, or the last; ``steps`` how many it has."""

    folder: Path
    state: str
    stage: str = ""
    step: int = 0
    steps: int = 0
    tokens: int = 0
    budget_tokens: int = 0
    loss: float | None = None
    why: str = ""  # how the last session ended, or what is damaged
    disk_bytes: int = 0


def runs_in(folder: Path) -> list[Path]:
    """The run folders in ``folder``, itself one or not, by name."""
    if RunFolder(folder).recipe_file.is_file():
        return [folder]
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _looks_like_a_run(path))


def _looks_like_a_run(path: Path) -> bool:
    """Whether a recipe lies in it; a folder that may not be read can be one, and stops no list of the others."""
    try:
        return RunFolder(path).recipe_file.is_file()
    except PermissionError:
        return True


def state_of(folder: Path) -> RunState:
    """What ``folder``, a run's, shows. A folder that cannot be read is ``DAMAGED``, with the reason."""
    run = RunFolder(folder)
    disk_bytes = bytes_in(folder)
    try:
        plan = plan_of_run(folder)
        sessions = run.provenance().get("sessions", [])
        last = None
        for stage in plan.train_stages:
            stage_folder = run.stage(stage.name)
            if stage_folder.metrics_file.is_file() or stage_folder.is_done():
                last = stage
        if run.holds_records_only():
            state, why = RECORDS_ONLY, ""
        elif run.ledger_file.is_file():
            state, why = FINISHED, ""
        elif holder_of(run) is not None:
            state, why = RUNNING, ""
        else:
            state = STOPPED
            why = (
                sessions[-1].get("ended", {}).get("how", "killed")
                if sessions
                else "never started"
            )
        if last is None:
            return RunState(
                folder, state, budget_tokens=plan.tokens, why=why, disk_bytes=disk_bytes
            )
        step, tokens, loss = _last_record(run.stage(last.name))
    except (
        RunError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        return RunState(
            folder, DAMAGED, why=" ".join(str(error).split()), disk_bytes=disk_bytes
        )
    return RunState(
        folder,
        state,
        last.name,
        step,
        last.steps,
        tokens,
        plan.tokens,
        loss,
        why,
        disk_bytes,
    )


def _last_record(stage: StageFolder) -> tuple[int, int, float | None]:
    """Step, tokens of the whole run, and loss of the newest record; zeros where there is none yet."""
    newest = None
    for record in iter_records(stage.metrics_file):
        newest = record
    if newest is None:
        return 0, 0, None
    return int(newest["step"]), int(newest["tokens"]), float(newest["loss"])


def holder_of(run: RunFolder) -> str | None:
    """Who works in the run folder, on this machine or on one that shares its locks; None if nobody does."""
    if not run.lock_file.is_file():
        return None
    with run.lock_file.open(encoding="utf-8") as file:
        try:
            lock(file, fcntl.LOCK_SH)
        except BlockingIOError:
            return file.read(200).strip()
    return None


def bytes_in(folder: Path) -> int:
    """Bytes on disk of everything below ``folder``; a file with several names, as grown checkpoints have, once."""
    seen = set()
    total = 0
    for path in folder.rglob("*"):
        facts = path.lstat()
        if path.is_file() and not path.is_symlink() and facts.st_ino not in seen:
            seen.add(facts.st_ino)
            total += facts.st_size
    return total


def spare(folder: Path) -> Iterator[Path]:
    """The folders of a run that nothing needs any more: checkpoints of finished stages but the last, and what was set
    aside as torn or damaged. What DONE names, and all of an unfinished stage, stays.

    Raises:
        LockedError: the run is running.
    """
    run = RunFolder(folder)
    if holder_of(run) is not None:
        raise LockedError(f"{folder} is running; wait for it or stop it first")
    for stage in run.stages():
        if stage.quarantine.is_dir():
            yield stage.quarantine
        done = stage.done()
        if done is None:
            continue
        kept = stage.path / str(done.get("checkpoint"))
        for step in stage.sealed_steps():
            if stage.checkpoint(step) != kept:
                yield stage.checkpoint(step)


def delete(path: Path) -> None:
    """Deletes one of what ``spare`` names; the seal goes first, so that a half-deleted checkpoint is never taken for a
    whole one."""
    (path / seal.MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path)
