"""The end of a run: the ledger, whose sums must agree with the plan, and a table of what was done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stackgrow import seal
from stackgrow.data.order import Order
from stackgrow.errors import DamagedError
from stackgrow.kinds import human
from stackgrow.plan import Plan, TrainStage
from stackgrow.progress import clock
from stackgrow.records import read_records


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
        done = seal.read_json(folder / stage.name / "DONE") or {}
        values = {name: done.get(name, 0) for name in ("steps", "tokens", "flops", "seconds")}
        rows.append({"stage": stage.name, "stage_hash": done.get("stage_hash"), **values})
    total = {name: sum(row[name] for row in rows) for name in ("steps", "tokens", "flops", "seconds")}
    return {
        "budget_tokens": plan.recipe.budget.tokens,
        "planned_tokens": plan.tokens,
        "stages": rows,
        "total": total,
    }


COLUMNS = f"{'stage':<22}{'tokens':>9}{'steps':>9}{'FLOPs':>11}{'loss':>9}" + (
    f"{'val start':>11}{'val end':>9}{'tok/s':>8}{'time':>9}"
)


def render_summary(plan: Plan, folder: Path, order: Order) -> str:
    """A table with one line per train stage, and where everything lies. FLOPs are 6 N D."""
    seconds = [(seal.read_json(folder / s.name / "DONE") or {}).get("seconds", 0.0) for s in plan.train_stages]
    rows = [_row(s, folder / s.name, t) for s, t in zip(plan.train_stages, seconds, strict=True)]
    steps = sum(s.steps for s in plan.train_stages)
    total = f"{'total':<22}{human(plan.tokens):>9}{steps:>9}{plan.flops:>11.2e}{'':>37}{clock(sum(seconds)):>9}"
    share = f"{100 * plan.base_share:.1f}% of the FLOPs (6 N D) went into the stages before the last."
    last = folder / plan.train_stages[-1].name / "checkpoint" / f"step-{plan.train_stages[-1].steps}"
    seen = order.seen(plan.sequences).items()
    where = [
        *(f"data         {path}: {human(s['tokens'])} tokens, {s['epochs']:.4g} epochs" for path, s in seen),
        f"weights      {short(last)}",
        f"metrics      {short(folder)}/stage-*/metrics.jsonl, validation.jsonl",
        f"TensorBoard  tensorboard --logdir {short(folder)}",
        f"proof        {short(folder)}/recipe.toml, provenance.json, ledger.json",
    ]
    return "\n".join(["", COLUMNS, *rows, total, "", *([share] if len(rows) > 1 else []), *where])


def _row(stage: TrainStage, folder: Path, seconds: float) -> str:
    metrics, validation = read_records(folder / "metrics.jsonl"), read_records(folder / "validation.jsonl")
    rate = sorted(r["tps"] for r in metrics)[len(metrics) // 2]  # the median: the first step may compile
    first, last = (f"{validation[i]['loss']:.4f}" if validation else "-" for i in (0, -1))
    return (
        f"{stage.name:<22}{human(stage.tokens):>9}{stage.steps:>9}{stage.flops:>11.2e}{metrics[-1]['loss']:>9.4f}"
        f"{first:>11}{last:>9}{human(rate):>8}{clock(seconds):>9}"
    )


def short(path: Path) -> str:
    """Relative to the working directory where the path lies in it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
