"""Stages that had ended and went on to more steps: what was extended, when, from where, and what is kept of before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stackgrow import seal
from stackgrow.audit.case import Case
from stackgrow.audit.report import Look
from stackgrow.plan.stages import TrainStage
from stackgrow.recipe.load import Problem
from stackgrow.run_folder.extended import Extension, that_led_to
from stackgrow.run_folder.folder import PROVENANCE
from stackgrow.run_folder.lines import prefix_hash


def extended(case: Case) -> Look:
    """Every extension against the sessions, the records and the end that it replaced."""
    told = []
    for stage in case.plan.train_stages:
        led = that_led_to(case.folder(stage), case.hashes[stage.name])
        yield from _named_by_sessions(case, stage, led)
        for number, extension in enumerate(led):
            # A later one that began earlier has written what follows anew.
            if all(extension.from_step <= later.from_step for later in led[number:]):
                yield from _prefix(case, stage, extension)
            yield from _ended(case, stage, extension)
            told.append(f"{stage.name}: {extension}, on {extension.decided}")
    return "; ".join(told)


def was_extended(case: Case) -> bool:
    """Whether there is anything to look at: a file of extensions, or a session that tells of one."""
    return any(
        case.folder(stage).extended_file.exists() or _told_by(case, stage)
        for stage in case.plan.train_stages
    )


def _told_by(case: Case, stage: TrainStage) -> dict[str, str]:
    """The extensions of which sessions tell, by their hashes -> the hash of the recipe that then ran."""
    recipes: dict[str, str] = {}
    for session in case.record["sessions"]:
        named = session.get("stages", {}).get(stage.name, {}).get("extended")
        if named is not None:
            recipes[named] = session["recipe_hash"]
    return recipes


def _named_by_sessions(
    case: Case, stage: TrainStage, led: list[Extension]
) -> Iterator[Problem]:
    """The session that went on longer names the extension, and ran the longer recipe."""
    told = _told_by(case, stage)
    recipes = {session["recipe_hash"] for session in case.record["sessions"]}
    where = case.within(case.folder(stage).extended_file)
    for extension in led:
        if told.get(extension.hash) != extension.new_recipe_hash:
            yield where, f"{extension}: no session of {PROVENANCE} tells of it"
        if extension.recipe_hash not in recipes:
            yield where, f"{extension}: no session ran the recipe that it replaces"
    if led and led[-1].new_steps != stage.steps:
        yield where, f"{led[-1]}: the recipe has {stage.steps}"
    if told and not led:
        yield where, f"is missing, or another: {PROVENANCE} tells of an extension"


def _prefix(case: Case, stage: TrainStage, extension: Extension) -> Iterator[Problem]:
    """What was written down up to the checkpoint that was gone on from stands there unchanged."""
    for name, stated in extension.records.items():
        file = case.folder(stage).record_file(name)
        if not file.is_file() and stated["bytes"] == 0:
            continue
        if prefix_hash(file, stated["bytes"]) != stated["sha256"]:
            yield (
                case.within(file),
                f"is not what it was up to step {extension.from_step}, when the stage was extended",
            )


def _ended(case: Case, stage: TrainStage, extension: Extension) -> Iterator[Problem]:
    """The end that was there before: its DONE, and the checkpoint that DONE names."""
    ended = case.folder(stage).ended_at(extension.steps)
    where = case.within(ended.path)
    done = ended.done()
    if done is None:
        yield where, "has no DONE, which an extension keeps"
        return
    due: dict[str, Any] = {
        "stage_hash": extension.stage_hash,
        "steps": extension.steps,
    }
    stated = {name: done.get(name) for name in due}
    if seal.sha256(ended.done_file) != extension.done_sha256 or stated != due:
        yield case.within(ended.done_file), "is not the one that was kept"
        return
    checkpoint = ended.final_checkpoint()
    for fault in seal.damage(checkpoint, seal.read_seal(checkpoint) or {}):
        yield case.within(checkpoint), fault
