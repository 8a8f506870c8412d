"""Whether two runs are the same run: recipe, data, losses and weights."""

from __future__ import annotations

from typing import Any

from stackgrow import seal
from stackgrow.audit.case import Case
from stackgrow.audit.report import Look
from stackgrow.run_folder.folder import METRICS, VALIDATION
from stackgrow.run_folder.lines import iter_records
from stackgrow.text import differences


def same_run(case: Case, other: Case) -> Look:
    """Both as they state themselves: whether they state the truth is for an audit of each."""
    for change in differences(_identity(case), _identity(other)):
        yield "recipe", change
    if case.record["data"]["manifest_hash"] != other.record["data"]["manifest_hash"]:
        yield "data", "they were trained on different tokens"
    compared = 0
    for trained in case.plan.train_stages:
        for name in (METRICS, VALIDATION):
            ours, others = ({r["step"]: r["loss"] for r in iter_records(c.path(trained) / name)} for c in (case, other))
            common = sorted(ours.keys() & others.keys())
            unequal = [step for step in common if ours[step] != others[step]]
            compared += len(common)
            if unequal:
                step, worst = unequal[0], max(abs(others[s] / ours[s] - 1) for s in unequal)
                what = f"{len(unequal)} of {len(common)} losses differ, by up to {worst:.1e}"
                yield f"{trained.name}/{name}", f"{what}; first at step {step}: {ours[step]} -> {others[step]}"
    ended = 0
    for stage in case.plan.stages:
        ends = [seal.read_seal(c.output(stage)) for c in (case, other)]
        if (ends[0] is None) != (ends[1] is None):
            yield stage.name, "is finished in one of them only"
        elif ends[0] and ends[1]:
            ended += 1
            if ends[0]["tensors"] != ends[1]["tensors"]:
                yield stage.name, "ends with other weights"
    return f"{other.run}: {compared} losses, and the weights at the end of {ended} stages"


def _identity(case: Case) -> dict[str, Any]:
    """All values that define what a run computes, its data aside."""
    values: dict[str, Any] = {"seed": case.plan.recipe.seed}
    for stage in case.plan.stages:
        values[stage.name] = stage.identity()
    return values
