"""Loss curves and speed-ups as pictures: PNG on white, SVG for light and dark pages alike."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from stackgrow.errors import MissingExtraError
from stackgrow.report.compare import Comparison
from stackgrow.report.curves import Curve

COLORS = (
    "#2f7ed8",
    "#e07b1f",
    "#1f9d6b",
    "#c4529b",
    "#8a6fd1",
    "#b59a1c",
    "#d1495b",
    "#4aa5b8",
    "#9a6b4a",
    "#7d8790",
)  # on white and on black; as many as the paper's eight operators and two baselines
INK = "#1b1f23"  # stands for the page's own colour in an SVG
PANELS = ("flops", "tokens", "speed-up")
LABELS = {"train": "training loss", "validation": "validation loss"}
POINTS = 400  # of a stage that are drawn: more cannot be told apart, and a run logs a hundred thousand
SIZE = (4.6, 3.4)  # inches: its text is legible on a phone


def color_of(number: int) -> str:
    """The colour of curve ``number``; after ten they begin anew."""
    return COLORS[number % len(COLORS)]


def new_figure(width: float, height: float) -> Any:
    """An empty figure. MissingExtraError where matplotlib is not installed."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError('pictures need matplotlib: pip install "stackgrow[report]"') from None
    ink = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    texts = {"svg.fonttype": "none", "svg.hashsalt": "stackgrow", "text.parse_math": False}
    settings: Any = {**ink, **texts, "legend.frameon": False}
    mpl.rcParams.update(settings)
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(comparison: Comparison, file: Path) -> None:
    """All panels side by side, as PNG or SVG by the name of ``file``."""
    panels = PANELS if any(comparison.speed_ups.values()) else PANELS[:2]
    figure = new_figure(SIZE[0] * len(panels), SIZE[1])
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes, comparison, panel)
    if file.suffix == ".svg":
        file.write_text(_svg(figure))
    else:
        figure.savefig(file, dpi=85)


def panel_svg(comparison: Comparison, panel: str) -> str:
    """One panel as an <svg> element."""
    figure = new_figure(*SIZE)
    draw(figure.subplots(), comparison, panel)
    return _svg(figure)


def _svg(figure: Any) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def draw(axes: Any, comparison: Comparison, panel: str) -> None:
    """Loss against FLOPs or tokens of the whole run, base included; or the speed-up over the baseline."""
    for curve, color in zip(comparison.curves, COLORS * len(comparison.curves), strict=False):
        if panel == "speed-up":
            _draw_speed_up(axes, comparison, curve, color)
        else:
            _draw_loss(axes, curve, panel, color)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9)
    if panel == "speed-up":
        axes.set(xlabel=f"FLOPs of {comparison.baseline.name}", ylabel="iso-loss speed-up in FLOPs, %")
        axes.axhline(0, color=INK, linewidth=0.8)
        return
    finals = [curve.target.span[1] for curve in comparison.curves]
    starts = [curve.loss_at(0.05 * curve.target.flops[-1]) for curve in comparison.curves]
    margin = 0.1 * (max(starts) - min(finals)) or 0.1
    axes.set(ylim=(min(finals) - margin, max(starts) + margin), ylabel=LABELS[comparison.loss])
    axes.set_xlabel({"flops": "FLOPs (6 N D), base included", "tokens": "tokens, base included"}[panel])


def _draw_loss(axes: Any, curve: Curve, x: str, color: str) -> None:
    for part in curve.parts:
        last = part is curve.target
        some = np.unique(np.linspace(0, len(part.loss) - 1, POINTS).astype(int))
        at, loss, smooth = getattr(part, x)[some], part.loss[some], part.smooth[some]
        axes.plot(at, loss, color=color, alpha=0.18, linewidth=0.8)
        style = {"linestyle": "-" if last else "--", "linewidth": 1.8 if last else 1.2}
        axes.plot(at, smooth, color=color, label=curve.name if last else None, **style)
        if part is not curve.parts[0]:
            axes.plot(at[0], smooth[0], "o", color=color, markersize=5)


def _draw_speed_up(axes: Any, comparison: Comparison, curve: Curve, color: str) -> None:
    found = comparison.speed_ups.get(curve.name)
    if not found:
        return
    flops = [s.baseline_flops for s in found]
    axes.plot(flops, [100 * s.in_flops for s in found], "o-", color=color, label=curve.name)
    intervals = [(s.baseline_flops, *s.interval) for s in found if s.interval]
    if intervals:
        at, low, high = zip(*intervals, strict=True)
        axes.fill_between(at, [100 * v for v in low], [100 * v for v in high], color=color, alpha=0.2, linewidth=0)
