"""The end of a run: the ledger, whose sums must agree with the plan, and a table of what was done."""

from __future__ import annotations

from pathlib import Path

from stackgrow.data.order import Order
from stackgrow.plan.stages import Plan, TrainStage
from stackgrow.run_folder.folder import LEDGER, METRICS, PROVENANCE, RECIPE, VALIDATION, RunFolder, StageFolder
from stackgrow.run_folder.lines import read_records
from stackgrow.text import clock, human, short

COLUMNS = f"{'stage':<22}{'tokens':>9}{'steps':>9}{'FLOPs':>11}{'loss':>9}" + (
    f"{'val start':>11}{'val end':>9}{'tok/s':>8}{'time':>9}"
)


def render_summary(plan: Plan, folder: Path, order: Order) -> str:
    """A table with one line per train stage, and where everything lies. FLOPs are 6 N D."""
    seconds = [(RunFolder(folder).stage(s.name).done() or {}).get("seconds", 0.0) for s in plan.train_stages]
    rows = [_row(s, folder / s.name, t) for s, t in zip(plan.train_stages, seconds, strict=True)]
    steps = sum(s.steps for s in plan.train_stages)
    total = f"{'total':<22}{human(plan.tokens):>9}{steps:>9}{plan.flops:>11.2e}{'':>37}{clock(sum(seconds)):>9}"
    share = f"{100 * plan.base_share:.1f}% of the FLOPs (6 N D) went into the stages before the last."
    last = RunFolder(folder).stage(plan.train_stages[-1].name).output(plan.train_stages[-1])
    seen = order.seen(plan.sequences).items()
    where = [
        *(f"data         {path}: {human(s['tokens'])} tokens, {s['epochs']:.4g} epochs" for path, s in seen),
        f"weights      {short(last)}",
        f"metrics      {short(folder)}/stage-*/{METRICS}, {VALIDATION}",
        f"TensorBoard  tensorboard --logdir {short(folder)}",
        f"proof        {short(folder)}/{RECIPE}, {PROVENANCE}, {LEDGER}",
    ]
    return "\n".join(["", COLUMNS, *rows, total, "", *([share] if len(rows) > 1 else []), *where])


def _row(stage: TrainStage, folder: Path, seconds: float) -> str:
    metrics, validation = (
        read_records(StageFolder(folder).metrics_file),
        read_records(StageFolder(folder).validation_file),
    )
    rate = sorted(r["tps"] for r in metrics)[len(metrics) // 2]  # the median: the first step may compile
    first, last = (f"{validation[i]['loss']:.4f}" if validation else "-" for i in (0, -1))
    return (
        f"{stage.name:<22}{human(stage.tokens):>9}{stage.steps:>9}{stage.flops:>11.2e}{metrics[-1]['loss']:>9.4f}"
        f"{first:>11}{last:>9}{human(rate):>8}{clock(seconds):>9}"
    )
