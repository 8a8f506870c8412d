"""The run that is audited: its folder, once all in it is known to be plain files, and the plan that must be in it."""

from __future__ import annotations

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
from stackgrow.run_folder.extended import (
    counted_from_before,
    is_announced_only,
    is_made_by,
)
from stackgrow.run_folder.folder import (
    DONE,
    EXTENDED,
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
from stackgrow.run_folder.state import holder_of

MAX_BYTES = 1 << 26  # of a file that is read as a whole
READ_AS_A_WHOLE = (
    PROVENANCE,
    REQUIREMENTS,
    LEDGER,
    DONE,
    STAGE_FILE,
    GROWTH,
    FOUND,
    EXTENDED,
    seal.MANIFEST,
)
MOST_FAULTS = 5  # that a message names


@dataclass(frozen=True)
class Sealed:
    """A checkpoint with its seal."""

    path: Path
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A run folder whose files are all plain, with what its recipe says must be in it."""

    run: RunFolder
    plan: Plan
    record: dict[str, Any]  # provenance.json
    hashes: dict[str, str]  # of the stages, by their names
    data_from_recipe: bool = True

    def folder(self, stage: Stage) -> StageFolder:
        return self.run.stage(stage.name)

    def output(self, stage: Stage) -> Path:
        return self.folder(stage).output(stage)

    def done(self, stage: Stage) -> dict[str, Any] | None:
        return self.folder(stage).done()

    def made(self, stage: Stage, manifest: dict[str, Any]) -> bool:
        """Whether a sealed checkpoint is one that ``stage`` makes, or made when it was shorter."""
        stage_hash = self.hashes[stage.name]
        shorter = counted_from_before(self.folder(stage), stage_hash)
        return is_made_by(manifest, stage_hash, shorter)

    def stores_outside(self) -> list[str]:
        """The token stores that the recipe, which may be a stranger's, names outside of the working directory: these
        are not read. Those that the user has named are."""
        if not self.data_from_recipe:
            return []
        paths = [Path(path) for path, _ in self.plan.recipe.data.stores]
        return [str(path) for path in paths if path.is_absolute() or ".." in path.parts]

    def within(self, path: Path) -> str:
        return str(path.relative_to(self.run.path))

    def checkpoints(self, stage: Stage) -> Iterator[Sealed]:
        """Every sealed checkpoint of a stage, from the first."""
        folder = self.folder(stage)
        if stage.trains:
            paths = [folder.checkpoint(step) for step in folder.sealed_steps()]
        else:
            paths = [folder.checkpoints]
        for path in paths:
            manifest = seal.read_seal(path)
            if manifest is not None:
                yield Sealed(path, manifest)


def open_case(path: Path, data: Sequence[Path] = ()) -> Case:
    """``data``: the token stores, where they are no longer at the places that the recipe names.

    Raises RunError for a folder that is no run's, holds anything but plain files, or is at work, and WrongRequest;
    OSError for what cannot be read.
    """
    run = RunFolder(path)
    faults = list(_unplain(path))
    if faults:
        raise DamagedError(
            f"nothing of {path} is read: {'; '.join(faults[:MOST_FAULTS])}"
        )
    _refuse_running(run)
    record = seal.read_json(run.provenance_file)
    if record is None:
        raise DamagedError(f"{path} is no run folder: it has no {PROVENANCE}")
    plan = plan_of_run(path)
    hashes = plan.stage_hashes(record["data"]["manifest_hash"])
    for name, stage_hash in hashes.items():
        if is_announced_only(run.stage(name), stage_hash):
            raise WrongRequest(
                f"{path} was killed as {name} was about to be extended: give the same command again, then audit it"
            )
    if data:
        plan = _with_stores(path, plan, data)
    return Case(run, plan, record, hashes, data_from_recipe=not data)


def _with_stores(run: Path, plan: Plan, stores: Sequence[Path]) -> Plan:
    """The plan with its token stores at other places. It is another recipe by its hash, and trains the same."""
    settings = plan.recipe.data
    if len(stores) != len(settings.stores):
        raise WrongRequest(
            f"{run} was trained on {len(settings.stores)} token stores: give --data as often"
        )
    if settings.mix:
        mix = []
        for part, store in zip(settings.mix, stores, strict=True):
            mix.append(replace(part, path=str(store)))
        settings = replace(settings, path="", mix=tuple(mix))
    else:
        settings = replace(settings, path=str(stores[0]))
    return replace(plan, recipe=replace(plan.recipe, data=settings))


def _refuse_running(run: RunFolder) -> None:
    holder = holder_of(run)
    if holder is not None:
        raise LockedError(f"{run.path} is in use by {holder}; audit it afterwards")


def _unplain(run: Path) -> Iterator[str]:
    """Before anything is opened: a link could lead anywhere, and a pipe or a device never ends. Raises PermissionError
    for a folder that may not be read."""
    for folder, names, files in os.walk(run, onerror=_raise):
        for name in [*names, *files]:
            path = Path(folder, name)
            facts = path.lstat()
            is_plain = stat.S_ISREG(facts.st_mode) or stat.S_ISDIR(facts.st_mode)
            if not is_plain:
                yield f"{path.relative_to(run)} is a link or a special file"
            elif facts.st_size > MAX_BYTES and name in READ_AS_A_WHOLE:
                yield f"{path.relative_to(run)} has {facts.st_size} bytes"


def _raise(error: OSError) -> None:
    raise error
