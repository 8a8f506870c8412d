"""A finished run goes on with a larger budget: from the newest checkpoint that a run with that budget would have made,
too. Which that is, the learning rate decides: it must have been the same up to there.

``find_extension`` only looks. ``announce`` keeps the end that is there, and writes down what is about to happen;
``begin``, once the session stands in provenance.json, takes that end out of the way. Killed between any two of these
steps, the same command goes on with the next: nothing is taken away before it is kept.
"""

from __future__ import annotations

from pathlib import Path

from stackgrow import seal
from stackgrow.errors import ChangedError, DamagedError
from stackgrow.plan.stages import Plan, TrainStage
from stackgrow.recipe.write import recipe_hash
from stackgrow.run_folder import provenance
from stackgrow.run_folder.evaluations import read_evaluation
from stackgrow.run_folder.extended import (
    Extension,
    counted_from_before,
    is_announced_only,
    keep_ended,
    that_led_to,
    write_extensions,
)
from stackgrow.run_folder.folder import RunFolder, StageFolder
from stackgrow.run_folder.found import plan_of_run
from stackgrow.run_folder.state import delete
from stackgrow.text import differences, numbered

# What of the last stage may be another. The horizon too: a schedule must reach as far as the stage.
MAY_CHANGE = {"steps", "train.horizon"}


def find_extension(plan: Plan, run: RunFolder, new_hash: str) -> Extension | None:
    """The extension by which the finished run becomes the one of ``plan``, whose last stage has the hash ``new_hash``;
    None where more than the length of the last stage is another.

    Raises:
        ChangedError: only that is another, and the run cannot be gone on with; with the reason and the remedy.
        DamagedError: the checkpoint that it would go on from is.
    """
    stage = plan.stages[-1]
    folder = run.stage(stage.name)
    if is_announced_only(folder, new_hash):
        return that_led_to(folder, new_hash)[-1]
    if not run.recipe_file.is_file():
        return None
    old_plan = plan_of_run(run.path)
    old = old_plan.stages[-1]
    assert isinstance(stage, TrainStage)
    if not isinstance(old, TrainStage) or not _is_longer_only(
        old_plan, run, stage, new_hash
    ):
        return None
    done = folder.done()
    if done is None:
        raise ChangedError(
            f"{folder.path} has {stage.steps} steps by this recipe, and was begun with {old.steps}: it can be made "
            "longer once it is finished. Finish it with the budget that it was begun with, then give this command again"
        )
    old_hash = str(done["stage_hash"])
    step = _step_to_go_on_from(folder, old, stage, old_hash)
    checkpoint = folder.checkpoint(step)
    manifest = seal.read_seal(checkpoint) or {}
    faults = seal.damage(checkpoint, manifest)
    if faults:
        raise DamagedError(
            f"{checkpoint}, which the longer stage would go on from, is damaged: {'; '.join(faults)}. Restore it, or "
            "move it away to go on from the one before it"
        )
    return Extension(
        decided=provenance.now(),
        stage_hash=old_hash,
        recipe_hash=recipe_hash(old_plan.recipe),
        steps=old.steps,
        new_stage_hash=new_hash,
        new_recipe_hash=recipe_hash(plan.recipe),
        new_steps=stage.steps,
        from_step=step,
        manifest_sha256=seal.manifest_hash(checkpoint),
        records=manifest["records"],
        done_sha256=seal.sha256(folder.done_file),
    )


def _is_longer_only(
    old_plan: Plan, run: RunFolder, stage: TrainStage, new_hash: str
) -> bool:
    """Whether the run in the folder, with ``stage`` in the place of its last, is the run that is asked for."""
    data_hash = run.data_hash()
    stored = seal.read_json(run.stage(stage.name).stage_file) or {}
    if old_plan.stage_hashes(data_hash).get(stage.name) != stored.get("stage_hash"):
        return False
    stages = (*old_plan.stages[:-1], stage)
    longer = Plan(old_plan.recipe, stages, (), old_plan.found)
    if longer.stage_hashes(data_hash)[stage.name] != new_hash:
        return False
    old = old_plan.stages[-1]
    changes = differences(old.identity(), stage.identity())
    names = {change.split(":")[0] for change in changes}
    is_longer = isinstance(old, TrainStage) and old.steps < stage.steps
    return is_longer and names <= MAY_CHANGE


def _step_to_go_on_from(
    folder: StageFolder, old: TrainStage, new: TrainStage, old_hash: str
) -> int:
    """Of the checkpoints that are kept, the newest up to which both stages have the same learning rates."""
    before = counted_from_before(folder, old_hash)
    own = []
    for step in folder.sealed_steps():
        made_by = (seal.read_seal(folder.checkpoint(step)) or {}).get("stage_hash")
        if made_by == old_hash or step <= before.get(str(made_by), -1):
            own.append(step)
    other = first_other_rate(old, new, most=max(own, default=0) + 1)
    # A checkpoint holds the rate of the step after it, too.
    possible = [step for step in own if other is None or step + 1 < other]
    if possible:
        return possible[-1]
    kept = ", ".join(map(str, own)) or "no step"
    raise ChangedError(
        f"{folder.path} has ended with its {old.steps} steps, and cannot be gone on with to {new.steps}: "
        f"{_why(old, other)}, and the checkpoints that are kept are of step {kept}. Train the larger budget in another "
        f"folder (--set run.folder={folder.run.path.name}-2). A run that is to be gone on with later needs "
        'schedule = "wsd" and a checkpoint from before its decay (checkpoint.keep, checkpoint.interval), or a '
        "train.horizon that reaches beyond its end"
    )


def _why(old: TrainStage, other: int | None) -> str:
    """``other``: the first step at which a longer stage has another learning rate."""
    if other is None:
        return "its checkpoints are gone"
    schedule = f'"{old.train.schedule}"'
    if old.train.horizon == "stage":
        schedule += ' with horizon = "stage"'
    return f"its schedule is {schedule}, by which a longer run has other learning rates from step {other} on"


def first_other_rate(old: TrainStage, new: TrainStage, most: int) -> int | None:
    """The first step, up to ``most``, at which two stages have different learning rates; None: they have not."""
    for step in range(1, most + 1):
        if _rates(old, step) != _rates(new, step):
            return step
    return None


def _rates(stage: TrainStage, step: int) -> list[float]:
    """Of all parameters, and of those that a growth made new where these have a rate of their own."""
    rates = [stage.rate_at(step)]
    if stage.new_rate:
        rates.append(stage.new_learning_rate(step))
    return rates


def announce(plan: Plan, run: RunFolder, extension: Extension) -> None:
    """Keeps the end that the stage has, then writes down what is about to follow it."""
    folder = run.stage(plan.stages[-1].name)
    if is_announced_only(folder, extension.new_stage_hash):
        return
    keep_ended(folder, extension, _results_replaced(run, folder, extension))
    led = that_led_to(folder, extension.stage_hash)
    write_extensions(folder, [*led, extension])


def begin(plan: Plan, run: RunFolder, extension: Extension) -> None:
    """Takes the end that is kept out of the longer stage's way: what says that the run is finished first."""
    folder = run.stage(plan.stages[-1].name)
    run.ledger_file.unlink(missing_ok=True)
    seal.sync_folder(run.path)
    folder.done_file.unlink(missing_ok=True)
    seal.sync_folder(folder.path)
    for file in _results_replaced(run, folder, extension):
        file.unlink()
    for step in folder.sealed_steps():
        if step > extension.from_step:
            delete(folder.checkpoint(step))


def _results_replaced(
    run: RunFolder, folder: StageFolder, extension: Extension
) -> list[Path]:
    """Benchmark results of checkpoints that the longer stage makes anew, from other weights."""
    files = []
    for file in run.eval_files():
        record = read_evaluation(file)
        if record.get("stage") != folder.name:
            continue
        if record["step"] > extension.from_step:
            files.append(file)
    return files


def told(plan: Plan, run: RunFolder, extension: Extension) -> str:
    """In a line, what is done."""
    folder = run.stage(plan.stages[-1].name)
    kept = folder.ended_at(extension.steps).path
    return (
        f"{folder.name}  goes on longer: {extension}; what it had after {numbered(extension.steps, 'step')} is kept in "
        f"{kept.relative_to(run.path)}"
    )
