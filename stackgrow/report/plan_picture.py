"""A plan as a picture: parameters and learning rate over tokens, and over FLOPs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from stackgrow.plan.stages import Plan, TrainStage
from stackgrow.report.figure import amount_text, color_of, new_figure, plain_axes
from stackgrow.text import human

POINTS = 400  # of a stage's learning-rate curve


def draw_plan(plan: Plan, file: Path) -> None:
    """Writes a PNG, or an SVG by the name of ``file``. Each stage is a bar as high as its parameters.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    # Two columns, over tokens and over FLOPs; in each, parameters above and the learning rate below.
    figure = new_figure(11, 6)
    figure.suptitle(
        f"{plan.recipe.name}: {human(plan.tokens)} tokens, {plan.flops:.3g} FLOPs (6 N D)"
    )
    axes = figure.subplots(2, 2, sharex="col", sharey="row", height_ratios=(2, 1))
    over_tokens = axes[:, 0]
    over_flops = axes[:, 1]
    with_steps = [stage for stage in plan.train_stages if stage.steps]
    for number, stage in enumerate(with_steps):
        color = color_of(number)
        _draw_stage(
            over_tokens, stage, color, start=stage.start_tokens, length=stage.tokens
        )
        _draw_stage(
            over_flops, stage, color, start=stage.start_flops, length=stage.flops
        )
    for axis in axes.flat:
        plain_axes(axis)
        axis.set_ylim(bottom=0)

    parameters, rate = over_tokens
    parameters.set_ylabel("parameters")
    parameters.yaxis.set_major_formatter(lambda value, _: human(value))
    parameters.set_xlim(0, plan.tokens)
    parameters.xaxis.set_major_formatter(lambda value, _: human(value))
    rate.set_ylabel("learning rate")
    rate.set_xlabel("tokens since the start of the run")

    parameters, rate = over_flops
    parameters.set_xlim(0, plan.flops)
    parameters.xaxis.set_major_formatter(amount_text)
    rate.set_xlabel(
        "FLOPs since the start of the run (6 N D, N without the input embedding)"
    )

    bars, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(bars, labels, loc="outside lower center", fontsize=9)
    figure.savefig(file, dpi=110)


def _draw_stage(
    axes: Any, stage: TrainStage, color: str, start: float, length: float
) -> None:
    """A bar of parameters and a curve of learning rates, both from ``start`` on, ``length`` wide."""
    parameters, rate = axes
    size = stage.model.parameters()
    label = f"{stage.name}: {human(size)} parameters, {human(stage.tokens)} tokens"
    parameters.bar(
        start, size, length, align="edge", color=color, alpha=0.75, label=label
    )
    steps = _steps_to_draw(stage)
    share_done = np.array([stage.batches.tokens(step) for step in steps]) / stage.tokens
    rates = [stage.learning_rate(max(step, 1)) for step in steps]
    rate.plot(start + length * share_done, rates, color=color)


def _steps_to_draw(stage: TrainStage) -> list[int]:
    """The warm-up's end, which is a bend, and no more steps than the eye tells apart."""
    evenly = np.linspace(0, stage.steps, min(POINTS, stage.steps + 1)).astype(int)
    steps = set(evenly.tolist())
    steps.add(min(stage.warmup_steps, stage.steps))
    return sorted(steps)
