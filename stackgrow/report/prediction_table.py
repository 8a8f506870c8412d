"""Predictions and continued differences of losses as text and as a picture like the paper's Figure 6b."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stackgrow.plan.guidelines import GROWTH_FACTOR, training_flops
from stackgrow.report.figure import INK, color_of, new_figure
from stackgrow.report.prediction import Difference, Prediction
from stackgrow.text import aligned, human

PREDICTION_HEAD = (
    "N",
    "D",
    "C = 6 N D",
    "d",
    "own d",
    "g",
    "loss",
    "C of the grown",
    "speed-up",
)


def render_predictions(predictions: Sequence[Prediction]) -> str:
    """A target a line, with what it would take: growth timing, factor, and FLOPs at equal loss where there are laws."""
    rows: list[tuple[str, ...]] = [PREDICTION_HEAD]
    for found in predictions:
        row = (
            human(found.target.parameters),
            human(found.target.tokens),
            f"{found.target.flops:.3g}",
            f"{found.timing / 1e9:.2f}B",
            "-" if found.own_timing is None else f"{found.own_timing / 1e9:.2f}B",
            f"{found.factor:.1f}",
            "-" if found.loss is None else f"{found.loss:.4f}",
            "-" if found.grown_flops is None else f"{found.grown_flops:.3g}",
            "-" if found.speed_up is None else f"{found.speed_up:+.1%}",
        )
        rows.append(row)
    lines = [
        *aligned(rows),
        "d: the paper's eq. 2 with these N and D, fitted up to 3B; own d: the fit above",
        f"g: its preliminary eq. 50; it uses {GROWTH_FACTOR} (section 4.2)",
        "loss and speed-up: by the laws above, where there are any; all of it extrapolates",
    ]
    return "\n".join(lines)


def render_differences(found: Sequence[Difference], tokens: Sequence[float]) -> str:
    """What is fitted to each difference of losses, and what that has at ``tokens`` from scratch."""
    lines = [
        "loss from scratch less loss grown, at equal FLOPs: a + b log10(C) (Figure 6b)",
        "C = 6 N D, N the parameters without embedding and head",
    ]
    for one in found:
        lines += [
            f"{human(one.parameters)}: a = {one.a:.5g}, b = {one.b:.5g}, rms {one.rms:.2g}",
            f"  fitted from C = {one.first:.3g} to {one.last:.3g}, where the losses differ by {one.measured:.4f}; "
            f"the first half alone foretold {one.checked:.4f}",
        ]
        for amount in tokens:
            flops = training_flops(one.parameters, amount)
            lines.append(f"  at {human(amount)} tokens: {one.at(flops):+.4f}")
        if one.vanishes is None:
            lines.append("  it does not shrink")
        else:
            amount = one.vanishes / training_flops(one.parameters, 1)
            lines.append(
                f"  nothing is left of it after C = {one.vanishes:.3g}, {amount:.3g} tokens"
            )
    lines.append("extrapolated: of how the losses go on, nothing is known")
    return "\n".join(lines)


def draw_differences(
    found: Sequence[Difference], tokens: Sequence[float], file: Path
) -> None:
    """As in the paper's Figure 6b: the fitted difference, whole where losses were measured, dashed beyond.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = new_figure(6, 4)
    axes = figure.subplots()
    for number, one in enumerate(found):
        last = one.last
        for amount in tokens:
            last = max(last, training_flops(one.parameters, amount))
        color = color_of(number)
        label = f"{human(one.parameters)} parameters"
        for start, end, style, name in (
            (one.first, one.last, "-", label),
            (one.last, last, "--", None),
        ):
            flops = np.geomspace(start, end, 100)
            fitted = one.a + one.b * np.log10(flops)
            axes.plot(flops, fitted, style, color=color, label=name)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xlabel("FLOPs, dashed: extrapolated")
    axes.set_ylabel("loss from scratch less loss grown")
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=110)
