"""TODO"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stackgrow.data.order import Order
from stackgrow.errors import DamagedError
from stackgrow.plan.stages import Plan
from stackgrow.run_folder.folder import RunFolder


def ledger(plan: Plan, folder: Path, order: Order) -> dict[str, Any]:
    """The counts, and what each token store gave.

    Raises:
        DamagedError: the sums are not the plan's.
    """
    found = counts(plan, folder)
    if (tokens := found["total"]["tokens"]) != plan.tokens:
        raise DamagedError(f"{folder}: its stages trained {tokens} tokens, the plan has {plan.tokens}")
    return {**found, "data": order.seen(plan.sequences)}


def counts(plan: Plan, folder: Path) -> dict[str, Any]:
    """Tokens, steps and FLOPs of every stage as its DONE states them, and their sums."""
    rows = []
    for stage in plan.stages:
        done = RunFolder(folder).stage(stage.name).done() or {}
        values = {name: done.get(name, 0) for name in ("steps", "tokens", "flops", "seconds")}
        rows.append({"stage": stage.name, "stage_hash": done.get("stage_hash"), **values})
    total = {name: sum(row[name] for row in rows) for name in ("steps", "tokens", "flops", "seconds")}
    return {
        "budget_tokens": plan.recipe.budget.tokens,
        "planned_tokens": plan.tokens,
        "stages": rows,
        "total": total,
    }
