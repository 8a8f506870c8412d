"""TODO"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stackgrow import seal
from stackgrow.audit.report import WrongRequest
from stackgrow.errors import DamagedError, LockedError
from stackgrow.plan.stages import Plan, Stage
from stackgrow.process.ranks import lock
from stackgrow.run_folder.folder import (
    DONE,
    FOUND,
    GROWTH,
    LEDGER,
    PROVENANCE,
    REQUIREMENTS,
    STAGE_FILE,
    RunFolder,
    StageFolder,
)
from stackgrow.run_folder.found import plan_of_run

MAX_BYTES = 1 << 26  # of a file that is read as a whole


WHOLE = (PROVENANCE, REQUIREMENTS, LEDGER, DONE, STAGE_FILE, GROWTH, FOUND, seal.MANIFEST)


@dataclass(frozen=True)
class Case:
    """A run folder whose files are all plain, with what its recipe says must be in it."""

    run: Path
    plan: Plan
    record: dict[str, Any]  # provenance.json
    hashes: dict[str, str]  # of the stages
    data_from_recipe: bool = True

    def path(self, stage: Stage) -> Path:
        return self.run / stage.name

    def folder(self, stage: Stage) -> StageFolder:
        return StageFolder(self.path(stage))

    def output(self, stage: Stage) -> Path:
        return self.folder(stage).output(stage)

    def done(self, stage: Stage) -> dict[str, Any] | None:
        return self.folder(stage).done()

    def within(self, path: Path) -> str:
        return str(path.relative_to(self.run))

    def checkpoints(self, stage: Stage) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Every sealed checkpoint of a stage with its manifest, from the first."""
        folder = self.folder(stage)
        if stage.trains:
            paths = [folder.checkpoint(step) for step in folder.sealed_steps()]
        else:
            paths = [folder.checkpoints]
        for path in paths:
            if (manifest := seal.read_seal(path)) is not None:
                yield path, manifest


def open_case(run: Path, data: Sequence[Path] = ()) -> Case:
    """``data``: the token stores, where they are no longer at the places that the recipe names.

    Raises RunError for a folder that is no run's, holds anything but plain files, or is at work, and WrongRequest.
    """
    if found := list(_unplain(run)):
        raise DamagedError(f"nothing of {run} is read: {'; '.join(found[:5])}")
    _refuse_running(run)
    record = seal.read_json(run / PROVENANCE)
    if record is None:
        raise DamagedError(f"{run} is no run folder: it has no {PROVENANCE}")
    plan = plan_of_run(run)
    hashes, settings = plan.stage_hashes(record["data"]["manifest_hash"]), plan.recipe.data
    if data:
        if len(data) != len(settings.stores):
            raise WrongRequest(f"{run} was trained on {len(settings.stores)} token stores: give --data as often")
        mix = tuple(replace(part, path=str(path)) for part, path in zip(settings.mix, data, strict=False))
        settings = replace(settings, path="" if mix else str(data[0]), mix=mix)
        plan = replace(plan, recipe=replace(plan.recipe, data=settings))
    return Case(run, plan, record, hashes, not data)


def _refuse_running(run: Path) -> None:
    file = RunFolder(run).lock_file
    if file.is_file():
        with file.open() as stream:
            try:
                lock(stream, fcntl.LOCK_SH)
            except BlockingIOError:
                raise LockedError(f"{run} is in use by {stream.read(200).strip()}; audit it afterwards") from None


def _unplain(run: Path) -> Iterator[str]:
    """Before anything is opened: a link could lead anywhere, and a pipe or a device never ends."""
    for folder, names, files in os.walk(run):
        for path in (Path(folder, name) for name in [*names, *files]):
            found = path.lstat()
            if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
                yield f"{path.relative_to(run)} is a link or a special file"
            elif found.st_size > MAX_BYTES and path.name in WHOLE:
                yield f"{path.relative_to(run)} has {found.st_size} bytes"
