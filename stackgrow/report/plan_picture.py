"""A plan as a picture: parameters and learning rate over tokens, and over FLOPs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stackgrow.plan.stages import Plan, TrainStage
from stackgrow.report.figure import COLORS, new_figure
from stackgrow.text import human

POINTS = 400  # of a stage's learning-rate curve


def draw_plan(plan: Plan, file: Path) -> None:
    """Writes a PNG, or an SVG by the name of ``file``. Each stage is a bar as high as its parameters.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = new_figure(11, 6)
    axes = figure.subplots(2, 2, sharex="col", sharey="row", height_ratios=(2, 1))
    figure.suptitle(f"{plan.recipe.name}: {human(plan.tokens)} tokens, {plan.flops:.3g} FLOPs (6 N D)")
    for stage, color in zip(plan.train_stages, COLORS * len(plan.train_stages), strict=False):
        start = np.array([stage.start_tokens, stage.start_flops])
        length = np.array([stage.tokens, stage.flops])
        steps = _steps(stage)
        done = np.array([stage.batches.tokens(step) for step in steps]) / stage.tokens
        rates = [stage.learning_rate(max(step, 1)) for step in steps]
        label = f"{stage.name}: {human(stage.model.parameters())} parameters, {human(stage.tokens)} tokens"
        for column, (left, width) in enumerate(zip(start, length, strict=True)):
            bar = {"align": "edge", "color": color, "alpha": 0.75, "label": label}
            axes[0, column].bar(left, stage.model.parameters(), width, **bar)
            axes[1, column].plot(left + width * done, rates, color=color)
    axes[0, 0].set_ylabel("parameters")
    axes[1, 0].set_ylabel("learning rate")
    axes[1, 0].set_xlabel("tokens since the start of the run")
    axes[1, 1].set_xlabel("FLOPs since the start of the run (6 N D)")
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(bottom=0)
    for column, edge in enumerate((plan.tokens, plan.flops)):
        axes[0, column].set_xlim(0, edge)
        axes[0, column].xaxis.set_major_formatter(lambda v, _, c=column: human(v) if c == 0 else f"{v:.2g}")
    axes[0, 0].yaxis.set_major_formatter(lambda v, _: human(v))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", fontsize=9)
    figure.savefig(file, dpi=110)


def _steps(stage: TrainStage) -> list[int]:
    """Steps to draw: all of the warm-up's bends, and no more than the eye tells apart."""
    even = np.linspace(0, stage.steps, min(POINTS, stage.steps + 1)).astype(int).tolist()
    return sorted({*even, min(stage.warmup_steps, stage.steps)})
