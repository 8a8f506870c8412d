"""What a run has trained, stage by stage: tokens, steps and FLOPs, whose sums must be the plan's (ledger.json)."""

from __future__ import annotations

from typing import Any

from stackgrow.data.order import Order
from stackgrow.errors import DamagedError
from stackgrow.plan.stages import Plan
from stackgrow.run_folder.folder import RunFolder

COUNTED = ("steps", "tokens", "flops", "seconds")


def ledger(plan: Plan, run: RunFolder, order: Order) -> dict[str, Any]:
    """The counts, and what each token store gave.

    Raises:
        DamagedError: the sums are not the plan's.
    """
    trained = counts(plan, run)
    tokens = trained["total"]["tokens"]
    if tokens != plan.tokens:
        raise DamagedError(
            f"{run.path}: its stages trained {tokens} tokens, the plan has {plan.tokens}"
        )
    return {**trained, "data": order.seen(plan.sequences)}


def counts(plan: Plan, run: RunFolder) -> dict[str, Any]:
    """Tokens, steps and FLOPs of every stage as its DONE states them, and their sums."""
    rows = []
    total: dict[str, Any] = dict.fromkeys(COUNTED, 0)
    for stage in plan.stages:
        done = run.stage(stage.name).done() or {}
        row = {"stage": stage.name, "stage_hash": done.get("stage_hash")}
        for name in COUNTED:
            row[name] = done.get(name, 0)
            total[name] += row[name]
        rows.append(row)
    return {
        "budget_tokens": plan.recipe.budget.tokens,
        "planned_tokens": plan.tokens,
        "stages": rows,
        "total": total,
    }
