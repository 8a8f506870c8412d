"""The chain from the recipe to the last stage: recipe, provenance, and what every stage says of itself."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli

from stackgrow import provenance, seal
from stackgrow.audit import contents
from stackgrow.audit.report import Audit, Look, WrongRequest
from stackgrow.changed import DONE, STAGE_FILE, differences
from stackgrow.errors import DamagedError, LockedError
from stackgrow.found import FOUND, plan_of_run
from stackgrow.growth.stage import GROWTH
from stackgrow.load import canonical_hash
from stackgrow.plan import ImportStage, Plan, Stage, TrainStage, identity
from stackgrow.report.summary import counts
from stackgrow.run import LEDGER, output_of
from stackgrow.shared import lock

MAX_BYTES = 1 << 26  # of a file that is read as a whole
WHOLE = (provenance.PROVENANCE, provenance.REQUIREMENTS, LEDGER, DONE, STAGE_FILE, GROWTH, FOUND, seal.MANIFEST)


@dataclass(frozen=True)
class Case:
    """A run folder whose files are all plain, with what its recipe says must be in it."""

    run: Path
    plan: Plan
    record: dict[str, Any]  # provenance.json
    hashes: dict[str, str]  # of the stages
    data_from_recipe: bool = True

    @property
    def own_stages(self) -> list[Stage]:
        """Those whose result this run has made."""
        return [stage for stage in self.plan.stages if not isinstance(stage, ImportStage)]

    def path(self, stage: Stage) -> Path:
        return self.run / stage.name

    def output(self, stage: Stage) -> Path:
        return output_of(stage, self.path(stage))

    def done(self, stage: Stage) -> dict[str, Any] | None:
        return seal.read_json(self.path(stage) / DONE)

    def within(self, path: Path) -> str:
        return str(path.relative_to(self.run))

    def checkpoints(self, stage: Stage) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Every sealed checkpoint of a stage with its manifest, from the first."""
        folder = self.path(stage) / "checkpoint"
        steps = [folder / f"step-{n}" for n in seal.sealed_steps(folder)] if isinstance(stage, TrainStage) else [folder]
        for path in steps:
            if (manifest := seal.read_seal(path)) is not None:
                yield path, manifest


def open_case(run: Path, data: Sequence[Path] = ()) -> Case:
    """``data``: the token stores, where they are no longer at the places that the recipe names.

    Raises RunError for a folder that is no run's, holds anything but plain files, or is at work, and WrongRequest.
    """
    if found := list(_unplain(run)):
        raise DamagedError(f"nothing of {run} is read: {'; '.join(found[:5])}")
    _refuse_running(run)
    record = seal.read_json(run / provenance.PROVENANCE)
    if record is None:
        raise DamagedError(f"{run} is no run folder: it has no {provenance.PROVENANCE}")
    plan = plan_of_run(run)
    hashes, settings = plan.stage_hashes(record["data"]["manifest_hash"]), plan.recipe.data
    if data:
        if len(data) != len(settings.stores):
            raise WrongRequest(f"{run} was trained on {len(settings.stores)} token stores: give --data as often")
        mix = tuple(replace(part, path=str(path)) for part, path in zip(settings.mix, data, strict=False))
        settings = replace(settings, path="" if mix else str(data[0]), mix=mix)
        plan = replace(plan, recipe=replace(plan.recipe, data=settings))
    return Case(run, plan, record, hashes, not data)


def audit_run(
    run: Path, data: Sequence[Path] = (), *, full: bool = False, further: Mapping[str, Callable[[Case], Look]] = {}
) -> Audit:
    """Everything that can be checked without training, and ``further`` checks before it. ``data``: as in
    ``open_case``; ``full``: all of the data's files are read, not a few.

    Raises:
        LockedError: the run is running.
        WrongRequest: a further check cannot be made of this run.
    """
    audit, cases = Audit(str(run)), list[Case]()

    def opened() -> Look:
        cases.append(open_case(run, data))
        return (yield from _recipe(cases[0]))

    audit.look("recipe", opened())
    for case in cases:
        audit.title = f"{case.plan.recipe.name}, {'finished' if (run / LEDGER).is_file() else 'not finished'}"
        for name, check in further.items():
            audit.look(name, check(case))
        audit.look("provenance", _provenance(case))
        audit.look("stages", _stages(case))
        audit.look("checkpoints", contents.checkpoints(case))
        audit.look("records", contents.records(case))
        audit.look("growth", contents.growth(case))
        audit.look("data", contents.data(case, full))
    return audit


def _refuse_running(run: Path) -> None:
    if (file := run / "run.lock").is_file():
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


def _recipe(case: Case) -> Look:
    text, sessions = (case.run / "recipe.toml").read_text(), case.record["sessions"]
    mark = canonical_hash(tomli.loads(text))
    if mark not in [session["recipe_hash"] for session in sessions]:
        yield "recipe.toml", f"is not the recipe of any session ({mark[:12]})"
        resolved = tomli.loads(case.record["texts"][sessions[-1]["texts"]["recipe"]])
        yield from (("recipe.toml", change) for change in differences(resolved, tomli.loads(text)))
    return f"{mark[:12]}, as in provenance.json"


def _provenance(case: Case) -> Look:
    """Sessions are chained to each other and to the checkpoints that they made."""
    sessions, previous, known = case.record["sessions"], None, set()
    for number, session in enumerate(sessions):
        if session["previous"] != previous:
            yield "provenance.json", f"session {number} does not follow the one before it: one of them was edited"
        known.add(previous := provenance.identity(session))
        for name, mark in session["texts"].items():
            if provenance.text_hash(case.record["texts"].get(mark, "")) != mark:
                yield "provenance.json", f"session {number}: the text of {name} is not the one that ran"
    for stage in case.own_stages:
        for path, manifest in case.checkpoints(stage):
            if manifest.get("session") not in known:
                yield case.within(path), "was made by no session of provenance.json: one of the two was edited"
    lock = (case.run / provenance.REQUIREMENTS).read_text()
    if provenance.text_hash(lock) != sessions[-1]["texts"]["packages"]:
        yield provenance.REQUIREMENTS, "is not that of the last session"
    if any(case.record[name] != sessions[-1][name] for name in ("recipe_hash", "data")):
        yield "provenance.json", "does not begin with the recipe and the data of its last session"
    if len({session["data"]["manifest_hash"] for session in sessions}) > 1:
        yield "provenance.json", "the sessions trained on different data"
    ended = [session.get("ended", {}).get("how", "killed, or running") for session in sessions]
    return f"{len(sessions)} sessions; the last: {ended[-1]}"


def _stages(case: Case) -> Look:
    parent = canonical_hash({"seed": case.plan.recipe.seed, "data": case.record["data"]["manifest_hash"]})
    before, missing = None, []
    for stage in case.plan.stages:
        wanted, where = case.hashes[stage.name], f"{stage.name}/"
        stored, done = seal.read_json(case.path(stage) / STAGE_FILE), case.done(stage)
        if done is None:
            missing.append(stage.name)
        elif missing:
            yield f"{where}{DONE}", f"is there, but {missing[0]} before it is not finished"
        if stored is None:
            if done is not None:
                yield f"{where}{STAGE_FILE}", "is missing"
            continue
        for change in differences(stored["stage"], identity(stage)):
            yield f"{where}{STAGE_FILE}", f"is of another recipe: {change}"
        rederived = canonical_hash({"parent": parent, "stage": stored["stage"]})
        if len({stored["stage_hash"], rederived, wanted}) > 1 or stored["seed"] != case.plan.recipe.seed:
            yield f"{where}{STAGE_FILE}", f"stage hash {stored['stage_hash'][:12]}, from the recipe {wanted[:12]}"
        if done is not None:
            for change in differences(done, {"seconds": done.get("seconds"), **_done(case, stage, before)}):
                yield f"{where}{DONE}", f"{change}, as found"
        parent = before = wanted
        if stage.name in case.plan.found:
            parent = canonical_hash({"parent": parent, "found": case.plan.found[stage.name]})
    due = counts(case.plan, case.run)
    if stored := seal.read_json(case.run / LEDGER):
        stated = {name: value for name, value in stored.items() if name != "data"}
        yield from ((LEDGER, f"{change}, as in {DONE}") for change in differences(_by_stage(stated), _by_stage(due)))
        if missing:
            yield LEDGER, f"is there, though {', '.join(missing)} is not finished"
    for path in sorted(case.run.glob("stage-*")):
        if path.name not in case.hashes:
            yield path.name, "is no stage of the recipe"
    finished = f"{len(case.plan.stages) - len(missing)} of {len(case.plan.stages)} done"
    return f"{finished}; {due['total']['tokens']:,} tokens trained, {case.plan.tokens:,} planned"


def _done(case: Case, stage: Stage, before: str | None) -> dict[str, Any]:
    """What a stage's DONE must state, after a stage with the hash ``before``."""
    train = isinstance(stage, TrainStage)
    return {
        "stage_hash": case.hashes[stage.name],
        "parent_hash": before,
        "checkpoint": str(case.output(stage).relative_to(case.path(stage))),
        "manifest_sha256": seal.manifest_hash(case.output(stage)),
        **({name: getattr(stage, name) for name in ("steps", "tokens", "flops")} if train else {}),
    }


def _by_stage(ledger: dict[str, Any]) -> dict[str, Any]:
    return {**ledger, "stages": {row["stage"]: row for row in ledger["stages"]}}
