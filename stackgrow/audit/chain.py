"""The chain from the recipe to the last stage: recipe, provenance, and what every stage says of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli

from stackgrow import seal
from stackgrow.audit import contents
from stackgrow.audit.case import Case, open_case
from stackgrow.audit.report import Audit, Look
from stackgrow.plan.stages import Stage
from stackgrow.recipe.write import canonical_hash
from stackgrow.run_folder import provenance
from stackgrow.run_folder.folder import DONE, LEDGER, PROVENANCE, RECIPE, REQUIREMENTS, STAGE_FILE, RunFolder
from stackgrow.run_folder.ledger import counts
from stackgrow.text import differences


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


def _recipe(case: Case) -> Look:
    text, sessions = (RunFolder(case.run).recipe_file).read_text(), case.record["sessions"]
    mark = canonical_hash(tomli.loads(text))
    if mark not in [session["recipe_hash"] for session in sessions]:
        yield RECIPE, f"is not the recipe of any session ({mark[:12]})"
        resolved = tomli.loads(case.record["texts"][sessions[-1]["texts"]["recipe"]])
        yield from ((RECIPE, change) for change in differences(resolved, tomli.loads(text)))
    return f"{mark[:12]}, as in provenance.json"


def _provenance(case: Case) -> Look:
    """Sessions are chained to each other and to the checkpoints that they made."""
    sessions, previous, known = case.record["sessions"], None, set()
    for number, session in enumerate(sessions):
        if session["previous"] != previous:
            yield PROVENANCE, f"session {number} does not follow the one before it: one of them was edited"
        known.add(previous := provenance.identity(session))
        for name, mark in session["texts"].items():
            if provenance.text_hash(case.record["texts"].get(mark, "")) != mark:
                yield PROVENANCE, f"session {number}: the text of {name} is not the one that ran"
    for stage in case.plan.own_stages:
        for path, manifest in case.checkpoints(stage):
            if manifest.get("session") not in known:
                yield case.within(path), "was made by no session of provenance.json: one of the two was edited"
    lock = (case.run / REQUIREMENTS).read_text()
    if provenance.text_hash(lock) != sessions[-1]["texts"]["packages"]:
        yield REQUIREMENTS, "is not that of the last session"
    if any(case.record[name] != sessions[-1][name] for name in ("recipe_hash", "data")):
        yield PROVENANCE, "does not begin with the recipe and the data of its last session"
    if len({session["data"]["manifest_hash"] for session in sessions}) > 1:
        yield PROVENANCE, "the sessions trained on different data"
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
        for change in differences(stored["stage"], stage.identity()):
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
    for folder in RunFolder(case.run).stages():
        if folder.name not in case.hashes:
            yield folder.name, "is no stage of the recipe"
    finished = f"{len(case.plan.stages) - len(missing)} of {len(case.plan.stages)} done"
    return f"{finished}; {due['total']['tokens']:,} tokens trained, {case.plan.tokens:,} planned"


def _done(case: Case, stage: Stage, before: str | None) -> dict[str, Any]:
    """What a stage's DONE must state, after a stage with the hash ``before``."""
    return {
        "stage_hash": case.hashes[stage.name],
        "parent_hash": before,
        "checkpoint": str(case.output(stage).relative_to(case.path(stage))),
        "manifest_sha256": seal.manifest_hash(case.output(stage)),
        **({name: getattr(stage, name) for name in ("steps", "tokens", "flops")} if stage.trains else {}),
    }


def _by_stage(ledger: dict[str, Any]) -> dict[str, Any]:
    return {**ledger, "stages": {row["stage"]: row for row in ledger["stages"]}}
