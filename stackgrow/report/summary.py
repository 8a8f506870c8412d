"""The end of a run: a table of what was trained, and where everything lies."""

from __future__ import annotations

import statistics
from pathlib import Path

from stackgrow.data.order import Order
from stackgrow.plan.stages import Plan, TrainStage
from stackgrow.run_folder.folder import (
    LEDGER,
    METRICS,
    PROVENANCE,
    RECIPE,
    VALIDATION,
    RunFolder,
    StageFolder,
)
from stackgrow.run_folder.lines import read_records
from stackgrow.text import clock, human, short

HEAD = (
    "stage",
    "tokens",
    "steps",
    "FLOPs",
    "loss",
    "val start",
    "val end",
    "tok/s",
    "time",
)
WIDTHS = (
    22,
    9,
    9,
    11,
    9,
    11,
    9,
    8,
    9,
)  # of the columns: the first to the left, numbers to the right


def render_summary(plan: Plan, folder: Path, order: Order) -> str:
    """A table with one line per train stage, and where everything lies. FLOPs are 6 N D, N without input embedding."""
    run = RunFolder(folder)
    lines = ["", _line(HEAD)]
    seconds = 0.0
    for stage in plan.train_stages:
        done = run.stage(stage.name).done() or {}
        stage_seconds = done.get("seconds", 0.0)
        seconds += stage_seconds
        lines.append(_line(_stage_row(stage, run.stage(stage.name), stage_seconds)))
    steps = sum(stage.steps for stage in plan.train_stages)
    total = (
        "total",
        human(plan.tokens),
        str(steps),
        f"{plan.flops:.2e}",
        "",
        "",
        "",
        "",
        clock(seconds),
    )
    lines += [_line(total), ""]
    if len(plan.train_stages) > 1:
        lines.append(
            f"{100 * plan.base_share:.1f}% of the FLOPs (6 N D, N without the input embedding) went into the stages "
            "before the last."
        )
    for path, seen in order.seen(plan.sequences).items():
        lines.append(
            f"data         {path}: {human(seen['tokens'])} tokens, {seen['epochs']:.4g} epochs"
        )
    last = plan.train_stages[-1]
    lines += [
        f"weights      {short(run.stage(last.name).output(last))}",
        f"metrics      {short(folder)}/stage-*/{METRICS}, {VALIDATION}",
        f"TensorBoard  tensorboard --logdir {short(folder)}",
        f"proof        {short(folder)}/{RECIPE}, {PROVENANCE}, {LEDGER}",
    ]
    return "\n".join(lines)


def _line(cells: tuple[str, ...]) -> str:
    line = cells[0].ljust(WIDTHS[0])
    for cell, width in zip(cells[1:], WIDTHS[1:], strict=True):
        line += cell.rjust(width)
    return line


def _stage_row(
    stage: TrainStage, folder: StageFolder, seconds: float
) -> tuple[str, ...]:
    metrics = read_records(folder.metrics_file)
    validation = read_records(folder.validation_file)
    loss = rate = "-"
    if metrics:  # a base that grows untrained has none
        loss = f"{metrics[-1]['loss']:.4f}"
        # The median: the first step may compile.
        rate = human(statistics.median_high(record["tps"] for record in metrics))
    return (
        stage.name,
        human(stage.tokens),
        str(stage.steps),
        f"{stage.flops:.2e}",
        loss,
        f"{validation[0]['loss']:.4f}" if validation else "-",
        f"{validation[-1]['loss']:.4f}" if validation else "-",
        rate,
        clock(seconds),
    )
