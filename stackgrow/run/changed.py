"""What may not change between two sessions of one run: the recipe's identity, the data, the engine's versions."""

from __future__ import annotations

from typing import Any

from stackgrow import seal
from stackgrow.errors import ChangedError, DamagedError
from stackgrow.plan.stages import Plan, Stage, TrainStage
from stackgrow.recipe.keys import LossSlope, Validation
from stackgrow.recipe.load import load_recipe
from stackgrow.recipe.values import Duration
from stackgrow.run.extend import find_extension
from stackgrow.run_folder import provenance
from stackgrow.run_folder.extended import Extension
from stackgrow.run_folder.folder import RunFolder, StageFolder
from stackgrow.text import differences

ENGINE = ("torch", "torchtitan")  # whose minor versions change numerics and formats
MOST_CHANGES = 6  # that a message names


def refuse_changed(
    plan: Plan, run: RunFolder, hashes: dict[str, str]
) -> Extension | None:
    """An edited recipe must not go on in the folder of the old one, unless all that was edited is how long the last
    stage is, which then is extended. ``hashes``: of the plan's stages, by their names.

    Raises:
        ChangedError: naming the stage and the values that differ.
        DamagedError: a stage's own files contradict each other.
    """
    stages = {stage.name: stage for stage in plan.stages}
    extension = None
    for folder in run.stages():
        stored = _stored(folder)
        if stored is None or stored.get("stage_hash") == hashes.get(folder.name):
            continue
        if folder.name == plan.stages[-1].name:
            extension = find_extension(plan, run, hashes[folder.name])
        if extension is None:
            raise _changed(plan, folder, stored, stages.get(folder.name))
    return extension


def refuse_other_validation(plan: Plan, run: RunFolder, validation_hash: str) -> None:
    """The held-out data, and how much of them is taken, stay what they were: two curves must not stand in one file.
    ``validation_hash``: of the held-out data that are there now.

    Raises:
        ChangedError: they do not.
    """
    if not run.recipe_file.is_file():
        return
    before = load_recipe(run.recipe_file, trusted=True).validation
    now = plan.recipe.validation
    changes = list(differences(_which_text(before), _which_text(now), "validation"))
    if changes:
        raise ChangedError(
            f"{run.path} was begun with other held-out data: {'; '.join(changes)}. Its losses would be of other text "
            f"from here on; undo the change, or use another folder (--set run.folder={plan.recipe.folder}-2)"
        )
    stated = run.provenance().get("data", {}).get("validation_hash", validation_hash)
    if now.sequences and stated != validation_hash:
        raise ChangedError(
            f"{run.path} validates on other held-out data, with the hash {stated[:12]}, than "
            f"{', '.join(path for path, _ in plan.recipe.data.stores)} holds out, {validation_hash[:12]}: its losses "
            "would be of other text from here on. Bring the store back as it was, or use another folder "
            f"(--set run.folder={plan.recipe.folder}-2)"
        )


def _which_text(validation: Validation) -> dict[str, object]:
    return {"sequences": validation.sequences, "take": validation.take}


def _stored(folder: StageFolder) -> dict[str, Any] | None:
    """What a stage says that it is; None where it has not begun."""
    stored = seal.read_json(folder.stage_file)
    done = folder.done()
    if done is not None and (
        stored is None or stored.get("stage_hash") != done.get("stage_hash")
    ):
        raise DamagedError(
            f"{folder.done_file} and {folder.stage_file} disagree; restore them or move {folder.path} away"
        )
    return stored


def _changed(
    plan: Plan, folder: StageFolder, stored: dict[str, Any], stage: Stage | None
) -> ChangedError:
    """``stage``: of the plan, with the folder's name; None where the plan has none."""
    hint = ""
    if stage is None:
        changes = ["the recipe has no such stage"]
    else:
        before = {"seed": stored.get("seed"), **stored.get("stage", {})}
        now = {"seed": plan.recipe.seed, **stage.identity()}
        changes = list(differences(before, now))
        if isinstance(stage, TrainStage):
            hint = _timing_hint(plan, stage, before, changes)
    what = "; ".join(changes[:MOST_CHANGES]) or "the data or a stage before it"
    return ChangedError(
        f"{folder.path} was made by another recipe: {what}. Undo the change, or use another folder "
        f"(--set run.folder={plan.recipe.folder}-2), or move {folder.name} and the stages after it away{hint}"
    )


def _timing_hint(
    plan: Plan, stage: TrainStage, before: dict[str, Any], changes: list[str]
) -> str:
    """What to write where a growth came at another time because the budget is another; "" where none did."""
    growth = sum(one.index < stage.index for one in plan.growths)
    if len(changes) != 1 or not changes[0].startswith("steps: ") or stage.learns_maps:
        return ""
    if growth == len(plan.recipe.growth):
        return ""
    timing = plan.recipe.growth[growth].timing
    if isinstance(timing, Duration | LossSlope):
        return ""
    tokens = stage.start_tokens + stage.batches.tokens(before["steps"])
    return (
        f'. growth[{growth}].timing = "{timing}" follows from the budget; to go on with a larger one, write '
        f'down what it came to: growth[{growth}].timing = "{tokens} tokens"'
    )


def changed_versions(run: RunFolder, accept: bool) -> list[str]:
    """``torch 2.13.0 -> 2.13.1`` for every package that is not as in the run's last session.

    Raises:
        ChangedError: another minor version of the engine, unless that is accepted.
    """
    sessions = run.provenance().get("sessions", [])
    before = sessions[-1].get("packages", {}) if sessions else {}
    if not before:
        return []
    now = provenance.versions()
    changes: list[str] = []
    refused: list[str] = []
    for name in {**before, **now}:
        old, new = before.get(name, "none"), now.get(name, "none")
        if old != new:
            changes.append(f"{name} {old} -> {new}")
            if name in ENGINE and _minor(old) != _minor(new):
                refused.append(changes[-1])
    if refused and not accept:
        raise ChangedError(
            f"{run.path} was run with other versions: {'; '.join(refused)}. The rest would not be what it would have "
            "been, bit for bit, and may not load; install the old ones, or accept it with "
            "--set run.accept_versions=true"
        )
    return changes


def _minor(version: str) -> list[str]:
    """``2.13.0+cpu`` -> 2, 13"""
    return version.split("+")[0].split(".")[:2]
