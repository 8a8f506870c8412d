"""Fits of growth timing and of scaling laws as text, as TOML and as pictures like the paper's Figures 7 to 10."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stackgrow.plan.guidelines import PRELIMINARY_FACTOR, TIMING, by_size_and_flops
from stackgrow.report.figure import (
    INK,
    color_of,
    logarithmic,
    logarithmic_at,
    new_figure,
)
from stackgrow.report.isoflop import GUIDELINE, Fit, Run, Valley
from stackgrow.text import aligned, human

# By what a sweep varies: its letter, its a, b and c in the paper.
LETTERS = {"timing": "d", "factor": "g"}
AXES = {"timing": "growth timing d, tokens", "factor": "growth factor g"}
PAPER = {
    "timing": dict(zip(GUIDELINE, TIMING, strict=True)),
    "factor": dict(zip(GUIDELINE, PRELIMINARY_FACTOR, strict=True)),
}
LAW_COLORS = {"scratch": color_of(0), "grown": color_of(1)}
Laws = dict[str, Fit]  # "scratch" and "grown"


def render_fits(
    found: Sequence[Valley], guideline: Fit | str, laws: Laws, variable: str = "timing"
) -> str:
    """Every IsoFLOP curve with its valley or why it has none; ``guideline``: the fit of the timing or of the factor,
    whichever ``variable`` says, or why there is none."""
    note = (
        "parameters N without embedding and head; FLOPs 6 N D of these, base included"
    )
    blocks = [[*aligned(_valley_table(found)), note]]
    if isinstance(guideline, str):
        blocks.append([f"no guideline: {guideline}"])
    else:
        equation = f"log10({LETTERS[variable]}) = a log10(N) + b / log10(C) + c"
        if variable == "factor":
            equation += " (eq. 49: preliminary, as the paper has it; it uses 4)"
        lines = [equation]
        for name in GUIDELINE:
            value = _with_error(guideline, name)
            lines.append(f"{name} = {value} (paper {PAPER[variable][name]:g})")
        blocks.append(lines)
    for name, law in laws.items():
        values = [f"{part} = {_with_error(law, part)}" for part in ("a", "b")]
        points = (
            f"final losses of {law.points} sizes; least squares of L, as in the paper"
        )
        blocks.append([f"L = a C^b, {name}: {', '.join(values)} ({points})"])
    return "\n\n".join("\n".join(block) for block in blocks)


def _valley_table(found: Sequence[Valley]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("parameters", "FLOPs", "tried", "valley")]
    for valley in found:
        bottom = human(valley.best) if valley.best else f"no valley: {valley.problem}"
        tried = " ".join(human(value) for value in valley.tried)
        rows.append((human(valley.parameters), f"{valley.flops:.3g}", tried, bottom))
    return rows


def _with_error(fit: Fit, name: str) -> str:
    error = fit.errors[name]
    text = f"{error:.2g}" if math.isfinite(error) else "unknown"
    return f"{fit.values[name]:.4g} +- {text}"


def render_toml(timing: Fit, found: Sequence[Valley], source: str) -> str:
    """The table for a recipe whose ``timing = "auto"`` is to follow this fit."""
    good = [valley for valley in found if valley.best]
    keys: dict[str, float | str] = {
        **timing.values,
        "source": source,
        "max_parameters": max(valley.parameters for valley in good),
        "max_flops": max(valley.flops for valley in good),
    }
    # JSON's numbers and strings are TOML's.
    lines = [f"{name} = {json.dumps(value)}" for name, value in keys.items()]
    return "\n".join(["[guideline]", *lines])


def draw_fits(
    runs: Sequence[Run],
    found: Sequence[Valley],
    guideline: Fit | None,
    laws: Laws,
    file: Path,
    variable: str = "timing",
) -> None:
    """IsoFLOP curves with their valleys for each size, the fitted timing or factor over N and C, and the scaling laws.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    # A panel for each size, one for the guideline and one for the laws, where there are such.
    sizes = sorted({valley.parameters for valley in found})
    panels = len(sizes)
    if guideline:
        panels += 1
    if laws:
        panels += 1
    figure = new_figure(4.2 * panels, 3.6)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for size in sizes:
        curves = [valley for valley in found if valley.parameters == size]
        _draw_isoflop(axes.pop(0), curves, variable)
    if guideline:
        good = [valley for valley in found if valley.best]
        _draw_guideline(figure, axes.pop(0), good, guideline, variable)
    if laws:
        _draw_laws(axes.pop(0), runs, laws)
    figure.savefig(file, dpi=110)


def _draw_isoflop(axes: Any, curves: Sequence[Valley], variable: str) -> None:
    logarithmic_at(axes.xaxis, sorted(set(curves[0].tried)))
    for number, valley in enumerate(curves):
        color = color_of(number)

        # The losses that were measured, and the parabola through them.
        label = f"{valley.flops:.2g} FLOPs"
        axes.plot(
            valley.tried, valley.losses, "o", color=color, markersize=4, label=label
        )
        first = math.log10(valley.tried[0])
        last = math.log10(valley.tried[-1])
        x = np.linspace(first, last, 100)
        axes.plot(10**x, np.polyval(valley.parabola, x), color=color, linewidth=1)

        # A star where it is lowest.
        if valley.best:
            bottom = np.polyval(valley.parabola, math.log10(valley.best))
            axes.plot(valley.best, bottom, "*", color=INK, markersize=9)
    axes.set_xlabel(AXES[variable])
    axes.set_ylabel("smoothed training loss")
    axes.set_title(f"{human(curves[0].parameters)} parameters")
    # Beside the curves, of which it would cover some.
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_guideline(
    figure: Any, axes: Any, good: Sequence[Valley], guideline: Fit, variable: str
) -> None:
    """The fitted timing or factor as a map over C and N, the valleys as dots in the same colours (Figures 9, 22)."""
    flops = [valley.flops for valley in good]
    sizes = [valley.parameters for valley in good]
    best = [valley.best or 1 for valley in good]

    # The fit on a grid somewhat wider than the valleys.
    C = np.geomspace(min(flops) / 1.3, max(flops) * 1.3, 60)
    N = np.geomspace(min(sizes) / 1.3, max(sizes) * 1.3, 60)
    values = guideline.values
    a_b_c = (values["a"], values["b"], values["c"])
    fitted = np.empty((len(N), len(C)))
    for row, parameters in enumerate(N):
        for column, amount in enumerate(C):
            fitted[row, column] = by_size_and_flops(parameters, amount, a_b_c)

    low = min(fitted.min(), *best)
    high = max(fitted.max(), *best)
    scale = {"vmin": math.log10(low), "vmax": math.log10(high), "cmap": "viridis"}
    shown = axes.contourf(C, N, np.log10(fitted), 20, **scale)
    axes.scatter(flops, sizes, c=np.log10(best), edgecolors="white", **scale)
    logarithmic(axes.xaxis, C[0], C[-1])
    logarithmic(axes.yaxis, N[0], N[-1])
    axes.set_xlabel("training FLOPs C")
    axes.set_ylabel("parameters N")
    axes.set_title(f"growth {variable} {LETTERS[variable]}")
    unit = "tokens" if variable == "timing" else "g"
    figure.colorbar(shown, ax=axes, label=f"log10 {unit}; dots: valleys")


def _draw_laws(axes: Any, runs: Sequence[Run], laws: Laws) -> None:
    """The runs, and the laws through their ends to ten times the FLOPs."""
    # What was measured, pale.
    for run in runs:
        color = LAW_COLORS["scratch" if run.at is None else "grown"]
        axes.plot(run.flops, run.loss, color=color, alpha=0.3, linewidth=0.8)

    # The laws, dashed.
    first = min(run.flops[0] for run in runs)
    last = max(run.flops[-1] for run in runs)
    flops = np.geomspace(first, 10 * last, 50)
    for name, law in laws.items():
        loss = law.values["a"] * flops ** law.values["b"]
        axes.plot(flops, loss, "--", color=LAW_COLORS[name], label=f"{name} law")
    logarithmic(axes.xaxis, first, 10 * last)
    logarithmic_at(axes.yaxis, axes.get_yticks())
    axes.set_xlabel("FLOPs")
    axes.set_ylabel("training loss")
    axes.set_title("scaling laws, 10 x beyond")
    axes.legend(fontsize=8)
