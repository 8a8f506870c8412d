"""Whether two runs are the same run: recipe, data, losses and weights."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

from stackgrow import seal
from stackgrow.audit.case import Case
from stackgrow.audit.report import Look, NotChecked
from stackgrow.plan.stages import Stage, TrainStage
from stackgrow.recipe.load import Problem
from stackgrow.recipe.write import to_dict
from stackgrow.run_folder.folder import METRICS, VALIDATION
from stackgrow.run_folder.lines import iter_records
from stackgrow.text import differences, numbered


def same_run(case: Case, other: Case) -> Look:
    """Both as they state themselves: whether they state the truth is for an audit of each."""
    for change in _recipe_differences(case, other):
        yield "recipe", change
    if case.record["data"]["manifest_hash"] != other.record["data"]["manifest_hash"]:
        yield "data", "they were trained on different tokens"
    losses = 0
    for train_stage in case.plan.train_stages:
        for name in (METRICS, VALIDATION):
            losses += yield from _same_losses(case, other, train_stage, name)
    told = f"{other.run.path}: {numbered(losses, 'loss', 'losses')}"

    # A run against its kept records, as a reader of them has trained it again.
    for one in (case, other):
        if one.run.holds_records_only():
            yield NotChecked(
                f"that both end with the same weights: {one.run.path} are records alone"
            )
            return told
    ended = 0
    for stage in case.plan.stages:
        ended += yield from _same_weights(case, other, stage)
    return f"{told}, and the weights at the end of {numbered(ended, 'stage')}"


def _recipe_differences(case: Case, other: Case) -> Iterator[str]:
    """In what two runs' trainings differ, free keys left out. Runs with other stages are compared by their recipes'
    keys: a stage that one of them has not differs in everything."""
    stages = {stage.name: stage.identity() for stage in case.plan.stages}
    other_stages = {stage.name: stage.identity() for stage in other.plan.stages}
    if stages.keys() == other_stages.keys():
        seed, other_seed = case.plan.recipe.seed, other.plan.recipe.seed
        yield from differences(
            {"seed": seed, **stages}, {"seed": other_seed, **other_stages}
        )
        return
    yield f"its stages are {', '.join(stages)}, the other's {', '.join(other_stages)}"
    yield from differences(to_dict(case.plan.recipe), to_dict(other.plan.recipe))


def _same_losses(
    case: Case, other: Case, stage: TrainStage, name: str
) -> Generator[Problem, None, int]:
    """Returns how many steps both have written down."""
    losses = _losses(case.folder(stage).record_file(name))
    other_losses = _losses(other.folder(stage).record_file(name))
    common = sorted(losses.keys() & other_losses.keys())
    unequal = [step for step in common if losses[step] != other_losses[step]]
    if unequal:
        first = unequal[0]
        worst = max(abs(other_losses[step] / losses[step] - 1) for step in unequal)
        what = f"{len(unequal)} of {len(common)} losses differ, by up to {worst:.1e}"
        yield (
            f"{stage.name}/{name}",
            f"{what}; first at step {first}: {losses[first]} -> {other_losses[first]}",
        )
    return len(common)


def _losses(file: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in iter_records(file)}


def _same_weights(
    case: Case, other: Case, stage: Stage
) -> Generator[Problem, None, int]:
    """Returns 1 where both have come to the end of the stage."""
    manifest = seal.read_seal(case.output(stage))
    other_manifest = seal.read_seal(other.output(stage))
    if manifest is None and other_manifest is None:
        return 0
    if manifest is None or other_manifest is None:
        yield stage.name, "is finished in one of them only"
        return 0
    if manifest["tensors"] != other_manifest["tensors"]:
        yield stage.name, "ends with other weights"
    return 1
