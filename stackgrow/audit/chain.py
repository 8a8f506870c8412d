"""The chain from the recipe to the last stage: recipe, provenance, and what every stage says of itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli

from stackgrow import seal
from stackgrow.audit import contents
from stackgrow.audit.case import Case, open_case
from stackgrow.audit.longer import extended, was_extended
from stackgrow.audit.report import Audit, Look, NotChecked, RestsOn
from stackgrow.plan.stages import Stage, TrainStage
from stackgrow.recipe.load import Problem
from stackgrow.recipe.write import canonical_hash
from stackgrow.run_folder import provenance
from stackgrow.run_folder.folder import (
    DONE,
    LEDGER,
    PROVENANCE,
    RECIPE,
    REQUIREMENTS,
    STAGE_FILE,
)
from stackgrow.run_folder.ledger import counts
from stackgrow.text import differences, numbered


def audit_run(
    run: Path,
    data: Sequence[Path] = (),
    *,
    full: bool = False,
    further: Mapping[str, Callable[[Case], Look]] = {},
) -> Audit:
    """Everything that can be checked without training, and ``further`` checks before it. ``data``: as in
    ``open_case``; ``full``: all of the data's files are read, not a few.

    Raises:
        LockedError: the run is running.
        WrongRequest: a further check cannot be made of this run.
        PermissionError: something in it may not be read.
    """
    audit = Audit(str(run))
    opened: list[Case] = []
    audit.look("recipe", _open_and_check_recipe(run, data, opened))
    if not opened:  # a finding says why
        return audit
    case = opened[0]
    if "replay" not in further:
        audit.not_checked.append("losses: no step was trained again (--replay)")
    audit.title = f"{case.plan.recipe.name}, {_state(case)}"
    for name, check in further.items():
        audit.look(name, check(case))
    if case.run.holds_records_only():
        _look_at_kept_records(audit, case, full)
    else:
        _look_at_run(audit, case, full)
    audit.rests_on.append(
        "nobody having written the whole folder anew: no signature is looked at (SECURITY.md)"
    )
    return audit


def _state(case: Case) -> str:
    if case.run.holds_records_only():
        return "records that were kept without their run"
    return "finished" if case.run.ledger_file.is_file() else "not finished"


def _look_at_kept_records(audit: Audit, case: Case, full: bool) -> None:
    """Without checkpoints there are no seals: the records are held against the recipe alone."""
    audit.look("sessions", _kept_sessions(case))
    audit.look("records", contents.kept_records(case))
    audit.look("eval", contents.evaluations(case))
    audit.look("data", contents.data(case, full))


def _look_at_run(audit: Audit, case: Case, full: bool) -> None:
    audit.look("provenance", _provenance(case))
    audit.look("stages", _stages(case))
    if was_extended(case):
        audit.look("extended", extended(case))
    audit.look("checkpoints", contents.checkpoints(case))
    audit.look("records", contents.records(case))
    audit.look("growth", contents.growth(case))
    audit.look("eval", contents.evaluations(case))
    audit.look("data", contents.data(case, full))


def _open_and_check_recipe(run: Path, data: Sequence[Path], opened: list[Case]) -> Look:
    """The case goes into ``opened``, whatever is then found in its recipe."""
    case = open_case(run, data)
    opened.append(case)
    recipe = tomli.loads(case.run.recipe_file.read_text(encoding="utf-8"))
    recipe_hash = canonical_hash(recipe)
    sessions = case.record["sessions"]
    if not sessions and case.run.holds_records_only():
        if recipe_hash != case.record["recipe_hash"]:
            yield RECIPE, f"is not the recipe of {PROVENANCE} ({recipe_hash[:12]})"
        return f"{recipe_hash[:12]}, as in provenance.json"
    hashes = [session["recipe_hash"] for session in sessions]
    if recipe_hash not in hashes:
        yield RECIPE, f"is not the recipe of any session ({recipe_hash[:12]})"
        # What was changed is seen against the last one, whose text stands in provenance.json.
        text_hash = sessions[-1]["texts"]["recipe"]
        last_text = case.record.get("texts", {}).get(text_hash)
        if last_text is not None:
            for change in differences(tomli.loads(last_text), recipe):
                yield RECIPE, change
    return f"{recipe_hash[:12]}, as in provenance.json"


def _provenance(case: Case) -> Look:
    """Sessions are chained to each other and to the checkpoints that they made."""
    sessions = case.record["sessions"]
    yield from _session_chain(sessions)
    yield from _texts(case, sessions)
    for stage in case.plan.own_stages:
        yield from _makers_of_checkpoints(case, stage, sessions)
    packages = case.run.requirements_file.read_text(encoding="utf-8")
    if provenance.text_hash(packages) != sessions[-1]["texts"]["packages"]:
        yield REQUIREMENTS, "is not that of the last session"
    for name in ("recipe_hash", "data"):
        if case.record[name] != sessions[-1][name]:
            yield (
                PROVENANCE,
                "does not begin with the recipe and the data of its last session",
            )
            break

    yield from _same_data(sessions)
    yield from _code(sessions)
    yield RestsOn(
        "what provenance.json says of machines, packages and environment, which nobody can measure afterwards"
    )
    end = sessions[-1].get("ended", {}).get("how", "killed, or running")
    return f"{numbered(len(sessions), 'session')}; the last: {end}"


def _same_data(sessions: list[dict[str, Any]]) -> Iterator[Problem]:
    """All sessions had the same tokens, to train on and to be measured by."""
    trained_on = {session["data"]["manifest_hash"] for session in sessions}
    if len(trained_on) > 1:
        yield PROVENANCE, "the sessions trained on different data"
    validated_on = {session["data"]["validation_hash"] for session in sessions}
    if len(validated_on) > 1:
        yield PROVENANCE, "the sessions validated on different data"


def _kept_sessions(case: Case) -> Look:
    """What is known of the sessions that wrote kept records; of some runs none were written down."""
    sessions = case.record["sessions"]
    yield from _session_chain(sessions)
    if "texts" in case.record:
        yield from _texts(case, sessions)
    elif sessions:
        yield NotChecked(
            "the texts of recipe and packages that the sessions name: they were not kept"
        )
    yield from _same_data(sessions)
    yield RestsOn(f"what provenance.json says of these records: {case.record['kept']}")
    return numbered(len(sessions), "session") if sessions else "none is known"


def _session_chain(sessions: list[dict[str, Any]]) -> Iterator[Problem]:
    before: dict[str, Any] | None = None
    for number, session in enumerate(sessions):
        if session["previous"] != provenance.link(before, session.get("chain")):
            yield (
                PROVENANCE,
                f"session {number} does not follow the one before it: one of them was edited",
            )
        before = session


def _texts(case: Case, sessions: list[dict[str, Any]]) -> Iterator[Problem]:
    """The recipe, the packages and what else ran as text, against the hashes in the sessions."""
    for number, session in enumerate(sessions):
        for name, text_hash in session["texts"].items():
            text = case.record["texts"].get(text_hash, "")
            if provenance.text_hash(text) != text_hash:
                yield (
                    PROVENANCE,
                    f"session {number}: the text of {name} is not the one that ran",
                )


def _makers_of_checkpoints(
    case: Case, stage: Stage, sessions: list[dict[str, Any]]
) -> Iterator[Problem]:
    """A checkpoint's seal names its session; of a train stage, that is the last one that began before its step."""
    identities = [provenance.identity(session) for session in sessions]
    for checkpoint in case.checkpoints(stage):
        where, identity = (
            case.within(checkpoint.path),
            checkpoint.manifest.get("session"),
        )
        if identity not in identities:
            yield (
                where,
                "was made by no session of provenance.json: one of the two was edited",
            )
        elif stage.trains:
            step = checkpoint.manifest["step"]
            maker = provenance.maker(sessions, stage.name, step)
            if maker is None or identities[maker] != identity:
                yield (
                    PROVENANCE,
                    f"its sessions' start_step of {stage.name} are not those that made step {step}",
                )


def _code(sessions: list[dict[str, Any]]) -> Iterator[NotChecked | RestsOn]:
    codes = [session.get("code", {}) for session in sessions]
    commits: list[str] = []
    for code in codes:
        commit = code.get("commit", "")[:12]
        if commit and commit not in commits:
            commits.append(commit)
    if commits:
        yield RestsOn(f"the code of commit {', '.join(commits)}")
    if not all("commit" in code for code in codes):
        yield NotChecked("code: a session names no commit")
    if any("dirty_sha256" in code for code in codes):
        yield NotChecked(
            "code: a session ran files that differ from their commit, of which only a hash is kept"
        )


def _stages(case: Case) -> Look:
    """Every stage's own files against the plan and the stage before it; then their sums in the ledger."""
    parent = canonical_hash(
        {"seed": case.plan.recipe.seed, "data": case.record["data"]["manifest_hash"]}
    )
    stage_before: Stage | None = None
    unfinished: list[str] = []
    for stage in case.plan.stages:
        folder = case.folder(stage)
        stored = seal.read_json(folder.stage_file)
        done = folder.done()

        # Stages are finished in their order.
        if done is None:
            unfinished.append(stage.name)
        elif unfinished:
            yield (
                case.within(folder.done_file),
                f"is there, but {unfinished[0]} before it is not finished",
            )
        if stored is None:
            if done is not None:
                yield case.within(folder.stage_file), "is missing"
            continue

        # What the stage says of itself, at its beginning and at its end.
        yield from _stage_file(case, stage, stored, parent)
        if done is not None:
            due = _due_in_done(case, stage, stage_before)
            due["seconds"] = done.get("seconds")  # which nothing else states
            for change in differences(done, due):
                yield case.within(folder.done_file), f"{change}, as found"

        # What the next stage's hash is made of.
        stage_before = stage
        parent = case.hashes[stage.name]
        if stage.name in case.plan.found:
            parent = canonical_hash(
                {"parent": parent, "found": case.plan.found[stage.name]}
            )

    trained = counts(case.plan, case.run)
    yield from _ledger(case, trained, unfinished)
    for folder in case.run.stages():
        if folder.name not in case.hashes:
            yield folder.name, "is no stage of the recipe"

    all_stages = len(case.plan.stages)
    finished = all_stages - len(unfinished)
    tokens = trained["total"]["tokens"]
    return f"{finished} of {all_stages} done; {tokens:,} tokens trained, {case.plan.tokens:,} planned"


def _stage_file(
    case: Case, stage: Stage, stored: dict[str, Any], parent: str
) -> Iterator[Problem]:
    """What a stage says that it is, in stage.json, against the recipe; ``parent``: the hash that its own is made of."""
    where = f"{stage.name}/{STAGE_FILE}"
    for change in differences(stored["stage"], stage.identity()):
        yield where, f"is of another recipe: {change}"
    stated_hash = stored["stage_hash"]
    recipe_hash = case.hashes[stage.name]
    own_hash = canonical_hash({"parent": parent, "stage": stored["stage"]})
    if (
        not stated_hash == own_hash == recipe_hash
        or stored["seed"] != case.plan.recipe.seed
    ):
        yield (
            where,
            f"stage hash {stated_hash[:12]}, from the recipe {recipe_hash[:12]}",
        )


def _due_in_done(
    case: Case, stage: Stage, stage_before: Stage | None
) -> dict[str, Any]:
    """What a stage's DONE must state."""
    output = case.output(stage)
    due: dict[str, Any] = {
        "stage_hash": case.hashes[stage.name],
        "parent_hash": case.hashes[stage_before.name] if stage_before else None,
        "checkpoint": str(output.relative_to(case.folder(stage).path)),
        "manifest_sha256": seal.manifest_hash(output),
    }
    if isinstance(stage, TrainStage):
        due["steps"] = stage.steps
        due["tokens"] = stage.tokens
        due["flops"] = stage.flops
    return due


def _ledger(
    case: Case, trained: dict[str, Any], unfinished: list[str]
) -> Iterator[Problem]:
    """The ledger against the sums of what the stages' DONE state."""
    stored = seal.read_json(case.run.ledger_file)
    if not stored:
        return
    stated = {name: value for name, value in stored.items() if name != "data"}
    for change in differences(_by_stage(stated), _by_stage(trained)):
        yield LEDGER, f"{change}, as in {DONE}"
    if unfinished:
        yield LEDGER, f"is there, though {', '.join(unfinished)} is not finished"


def _by_stage(ledger: dict[str, Any]) -> dict[str, Any]:
    """The ledger with its rows by their stages, for messages that name these."""
    rows = {row["stage"]: row for row in ledger["stages"]}
    return {**ledger, "stages": rows}
