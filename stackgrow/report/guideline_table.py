"""Fits of growth timing and of scaling laws as text, as TOML and as pictures like the paper's Figures 7 to 10."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stackgrow.plan.guidelines import TIMING, growth_timing
from stackgrow.report.figure import COLORS, INK, new_figure
from stackgrow.report.isoflop import Fit, Run, Valley
from stackgrow.text import aligned, human

PAPER = dict(zip("abc", TIMING, strict=True))
Laws = dict[str, Fit]  # "scratch" and "grown"


def render_fits(found: Sequence[Valley], timing: Fit | str | None, laws: Laws) -> str:
    """Every IsoFLOP curve with its valley or why it has none; ``timing``: the fit, or why there is none."""
    rows: list[tuple[str, ...]] = [("parameters", "FLOPs", "tried", "valley")]
    for v in found:
        told = human(v.best) if v.best else f"no valley: {v.problem}"
        rows.append((human(v.parameters), f"{v.flops:.3g}", " ".join(map(human, v.tried)), told))
    blocks = [aligned(rows)]
    if isinstance(timing, str):
        blocks.append([f"no guideline: {timing}"])
    elif timing:
        values = [f"{name} = {_with_error(timing, name)} (paper {PAPER[name]:g})" for name in "abc"]
        blocks.append(["log10(d) = a log10(N) + b / log10(C) + c", *values])
    for name, law in laws.items():
        told = ", ".join(f"{part} = {_with_error(law, part)}" for part in "ab")
        blocks.append([f"L = a C^b, {name}: {told} (final losses of {law.points} sizes)"])
    return "\n\n".join("\n".join(block) for block in blocks)


def _with_error(fit: Fit, name: str) -> str:
    error = fit.errors[name]
    return f"{fit.values[name]:.4g} +- {error:.2g}" if math.isfinite(error) else f"{fit.values[name]:.4g} +- unknown"


def render_toml(timing: Fit, found: Sequence[Valley], source: str) -> str:
    """The table for a recipe whose ``timing = "auto"`` is to follow this fit."""
    good = [v for v in found if v.best]
    keys = {**timing.values, "source": source}
    keys |= {"max_parameters": max(v.parameters for v in good), "max_flops": max(v.flops for v in good)}
    # JSON's numbers and strings are TOML's.
    return "\n".join(["[guideline]", *(f"{name} = {json.dumps(value)}" for name, value in keys.items())])


def draw_fits(runs: Sequence[Run], found: Sequence[Valley], timing: Fit | None, laws: Laws, file: Path) -> None:
    """IsoFLOP curves with their valleys for each size, the fitted timing over N and C, and the scaling laws.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    sizes = sorted({v.parameters for v in found})
    panels = len(sizes) + bool(timing) + bool(laws)
    figure = new_figure(4.2 * panels, 3.6)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for n in sizes:
        _draw_isoflop(axes.pop(0), [v for v in found if v.parameters == n])
    if timing:
        _draw_timing(figure, axes.pop(0), [v for v in found if v.best], timing)
    if laws:
        _draw_laws(axes.pop(0), runs, laws)
    figure.savefig(file, dpi=110)


def _draw_isoflop(axes, curves: Sequence[Valley]) -> None:  # type: ignore[no-untyped-def]
    for v, color in zip(curves, COLORS * len(curves), strict=False):
        x = np.linspace(math.log10(v.tried[0]), math.log10(v.tried[-1]), 100)
        axes.plot(v.tried, v.losses, "o", color=color, markersize=4, label=f"{v.flops:.2g} FLOPs")
        axes.plot(10**x, np.polyval(v.parabola, x), color=color, linewidth=1)
        if v.best:
            axes.plot(v.best, np.polyval(v.parabola, math.log10(v.best)), "*", color=INK, markersize=9)
    axes.set(xscale="log", xlabel="growth timing, tokens (or factor)", ylabel="smoothed training loss")
    axes.set_title(f"{human(curves[0].parameters)} parameters")
    axes.legend(fontsize=7)


def _draw_timing(figure, axes, good: Sequence[Valley], timing: Fit) -> None:  # type: ignore[no-untyped-def]
    flops, sizes = [v.flops for v in good], [v.parameters for v in good]
    C, N = (np.geomspace(min(x) / 1.3, max(x) * 1.3, 60) for x in (flops, sizes))
    fit = (timing.values["a"], timing.values["b"], timing.values["c"])
    d = np.array([[growth_timing(n, c, fit) for c in C] for n in N])
    low, high = min(d.min(), *(v.best or 0 for v in good)), max(d.max(), *(v.best or 0 for v in good))
    scale = {"vmin": math.log10(low), "vmax": math.log10(high), "cmap": "viridis"}
    shown = axes.contourf(C, N, np.log10(d), 20, **scale)
    axes.scatter(flops, sizes, c=[math.log10(v.best or 1) for v in good], edgecolors="white", **scale)
    axes.set(xscale="log", yscale="log", xlabel="training FLOPs C", ylabel="parameters N", title="growth timing d")
    figure.colorbar(shown, ax=axes, label="log10 tokens; dots: valleys")


def _draw_laws(axes, runs: Sequence[Run], laws: Laws) -> None:  # type: ignore[no-untyped-def]
    for run in runs:
        color = COLORS[0] if run.at is None else COLORS[1]
        axes.plot(run.flops, run.loss, color=color, alpha=0.3, linewidth=0.8)
    reach = np.geomspace(min(r.flops[0] for r in runs), 10 * max(r.flops[-1] for r in runs), 50)
    for name, law in laws.items():
        color = COLORS[0] if name == "scratch" else COLORS[1]
        axes.plot(reach, law.values["a"] * reach ** law.values["b"], "--", color=color, label=f"{name} law")
    axes.set(xscale="log", yscale="log", xlabel="FLOPs", ylabel="training loss", title="scaling laws, 10 x beyond")
    axes.legend(fontsize=8)
