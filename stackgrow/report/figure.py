"""Loss curves and speed-ups as pictures: PNG on white, SVG for light and dark pages alike."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stackgrow.errors import MissingExtraError
from stackgrow.report.compare import LABELS, Comparison
from stackgrow.report.curves import Curve, StageCurve
from stackgrow.report.statistics import LEAST_SEEDS, half_width
from stackgrow.text import human

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
POINTS = 400  # of a stage that are drawn: more cannot be told apart, and a run logs a hundred thousand
SIZE = (4.6, 3.4)  # inches: its text is legible on a phone
SHOWN = 0.02  # the part of all FLOPs that a logarithmic axis leaves out: a curve's first, steep fall
FEW = 12  # points of a stage: each is a dot then, and none is left out
WIDE = 2  # powers of ten on a logarithmic axis
LARGEST_NAMED = 1e15  # amounts from here on are written as 1e21


def color_of(number: int) -> str:
    """The colour of curve ``number``; after ten they begin anew."""
    return COLORS[number % len(COLORS)]


def new_figure(width: float, height: float) -> Any:
    """An empty figure. MissingExtraError where matplotlib is not installed."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError(
            'pictures need matplotlib: pip install "stackgrow[report]"'
        ) from None
    settings: Any = {
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "svg.fonttype": "none",
        "svg.hashsalt": "stackgrow",
        "text.parse_math": False,
        "legend.frameon": False,
    }
    mpl.rcParams.update(settings)
    figure = Figure(figsize=(width, height), layout="constrained")
    engine: Any = figure.get_layout_engine()
    engine.set(w_pad=0.1)  # inches: labels at the edge are whole
    return figure


def svg_of(figure: Any) -> str:
    """A figure as an <svg> element."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def plain_axes(axes: Any) -> None:
    """A grid, and no frame above and to the right."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def amount_text(value: float, _: Any = None) -> str:
    """``8M``, ``1.5T``, ``1e21``: an amount on an axis."""
    if abs(value) < LARGEST_NAMED:
        return human(value)
    return f"{value:.3g}".replace("e+", "e")


def logarithmic(axis: Any, low: float, high: float) -> None:
    """Makes an axis logarithmic, with marks that people read: 1, 2 and 5 times powers of ten, or these alone where
    others would run into each other."""
    factors: tuple[int, ...] = (1, 2, 5)
    if math.log10(high / low) > WIDE:
        factors = (1,)
    marks = []
    for exponent in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        marks += [factor * 10.0**exponent for factor in factors]
    logarithmic_at(axis, [mark for mark in marks if low <= mark <= high])
    axis.axes.set(**{f"{axis.axis_name}lim": (low, high)})


def logarithmic_at(axis: Any, marks: Sequence[float]) -> None:
    """Makes an axis logarithmic, with these marks; matplotlib's own would be formulas, which our text is not."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(FixedLocator(list(marks)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(amount_text)


Panel = Callable[[Any, Comparison], None]


def panels_of(comparison: Comparison) -> list[Panel]:
    """What there is to draw of a comparison."""
    panels: list[Panel] = [draw_over_flops, draw_over_tokens]
    if any(comparison.speed_ups.values()):
        panels.append(draw_speed_ups)
    return panels


def save_figure(comparison: Comparison, file: Path) -> None:
    """All panels side by side with a legend below, as PNG or SVG by the name of ``file``."""
    panels = panels_of(comparison)
    width, height = SIZE
    legend_rows = math.ceil(
        len(comparison.curves) / len(panels)
    )  # it has a column below each panel
    whole = new_figure(width * len(panels), height + 0.25 * legend_rows)
    parts = whole.subfigures(1, len(panels), squeeze=False)[0]
    for part, panel in zip(parts, panels, strict=True):
        panel(part, comparison)

    # The axes have no legends, which would cover curves: this one names them all.
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=color_of(number), linewidth=2)
        for number in range(len(comparison.curves))
    ]
    labels = [curve.legend for curve in comparison.curves]
    whole.legend(
        lines, labels, loc="outside lower center", ncols=len(panels), fontsize=9
    )
    if file.suffix == ".svg":
        file.write_text(svg_of(whole), encoding="utf-8")
    else:
        whole.savefig(file, dpi=85)


def panel_svg(comparison: Comparison, panel: Panel) -> str:
    """One panel as an <svg> element, without a legend: the page has one."""
    figure = new_figure(*SIZE)
    panel(figure, comparison)
    return svg_of(figure)


def draw_over_flops(figure: Any, comparison: Comparison) -> None:
    """Loss over FLOPs, base included, on a logarithmic axis, where a speed-up is a distance to the side; below it, how
    far each run is from the baseline at the same FLOPs."""
    if len(comparison.curves) > 1:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        _draw_differences(below, comparison)
    else:
        above = below = figure.subplots()
    for number, curve in enumerate(comparison.curves):
        _draw_losses(above, curve, color_of(number), lambda stage: stage.flops)
    _limit_losses(above, comparison)
    end = max(curve.target.flops[-1] for curve in comparison.curves)
    begin = SHOWN * end
    for stage in _stages_with_few_points(comparison):
        begin = min(begin, stage.flops[0] / 1.03)
    logarithmic(below.xaxis, begin, 1.03 * end)
    below.set_xlabel("FLOPs (6 N D, N without the input embedding), base included")


def draw_over_tokens(figure: Any, comparison: Comparison) -> None:
    """Loss over tokens, base included."""
    axes = figure.subplots()
    for number, curve in enumerate(comparison.curves):
        _draw_losses(axes, curve, color_of(number), lambda stage: stage.tokens)
    _limit_losses(axes, comparison)
    axes.xaxis.set_major_formatter(amount_text)
    axes.set_xlabel("tokens, base included")


def _draw_losses(
    axes: Any, curve: Curve, color: str, x_of: Callable[[Any], np.ndarray]
) -> None:
    """All stages: dashed before the target model's, a dot where a grown one begins, the records themselves pale."""
    for stage in curve.stages:
        # The records of every seed, as they are.
        for seed in stage.seeds:
            some = _some(len(seed.loss))
            axes.plot(
                x_of(seed)[some],
                seed.loss[some],
                color=color,
                alpha=0.18,
                linewidth=0.8,
            )

        # The smoothed mean of all seeds.
        x = x_of(stage)
        some = _some(len(x))
        is_target = stage is curve.target
        axes.plot(
            x[some],
            stage.smooth[some],
            color=color,
            linestyle="-" if is_target else "--",
            linewidth=1.8 if is_target else 1.2,
            marker="." if len(x) <= FEW else "",
        )
        if stage is not curve.stages[0]:
            axes.plot(x[0], stage.smooth[0], "o", color=color, markersize=5)


def _some(count: int) -> np.ndarray:
    """The indices of at most POINTS points, evenly spread, with the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, POINTS)).astype(int))


def _limit_losses(axes: Any, comparison: Comparison) -> None:
    """From just below the lowest loss to that after a twentieth of the FLOPs, since the first fall would hide the rest;
    of a stage with few points to the highest of them."""
    lowest = min(
        stage.span.low for curve in comparison.curves for stage in curve.stages
    )
    start = max(
        curve.loss_at(0.05 * curve.target.flops[-1]) for curve in comparison.curves
    )
    for stage in _stages_with_few_points(comparison):
        start = max(start, stage.smooth.max())
    margin = 0.1 * (start - lowest) or 0.1
    plain_axes(axes)
    axes.set_ylim(lowest - margin, start + margin)
    axes.set_ylabel(LABELS[comparison.loss])


def _stages_with_few_points(comparison: Comparison) -> list[StageCurve]:
    few = []
    for curve in comparison.curves:
        few += [stage for stage in curve.stages if len(stage.flops) <= FEW]
    return few


def _draw_differences(axes: Any, comparison: Comparison) -> None:
    for number, curve in enumerate(comparison.curves):
        if curve is not comparison.baseline:
            _draw_difference(
                axes, comparison.baseline.target, curve.target, color_of(number)
            )
    plain_axes(axes)
    axes.axhline(0, color=color_of(0), linewidth=1.2)
    axes.set_ylabel("difference")
    _limit_differences(axes, comparison)


def _draw_difference(
    axes: Any, baseline: StageCurve, run: StageCurve, color: str
) -> None:
    """The run's loss less the baseline's at equal FLOPs, and its 95% interval where there are seeds enough."""
    flops = _common_flops(baseline, run)
    if not len(flops):
        return

    # [seeds, points] each.
    ours = np.array([seed.smooth_at(flops) for seed in run.seeds])
    theirs = np.array([seed.smooth_at(flops) for seed in baseline.seeds])
    difference = ours.mean(axis=0) - theirs.mean(axis=0)
    axes.plot(flops, difference, color=color, linewidth=1.5)
    if min(len(ours), len(theirs)) >= LEAST_SEEDS:
        half = half_width(ours, theirs)
        axes.fill_between(
            flops,
            difference - half,
            difference + half,
            color=color,
            alpha=0.15,
            linewidth=0,
        )


def _common_flops(baseline: StageCurve, run: StageCurve) -> np.ndarray:
    start = max(baseline.flops[0], run.flops[0])
    end = min(baseline.flops[-1], run.flops[-1])
    return np.geomspace(start, end, POINTS) if start < end else np.array([])


def _limit_differences(axes: Any, comparison: Comparison) -> None:
    """What lies apart after a tenth of the FLOPs is shown; right after a growth it may be far more."""
    farthest = 0.0
    baseline = comparison.baseline.target
    for curve in comparison.curves[1:]:
        flops = _common_flops(baseline, curve.target)
        late = flops[flops > 0.1 * curve.target.flops[-1]]
        for amount in late[::20]:
            apart = curve.target.loss_at(amount) - baseline.loss_at(amount)
            farthest = max(farthest, abs(apart))
    limit = 1.3 * farthest or 0.1
    axes.set_ylim(-limit, limit)


def draw_speed_ups(figure: Any, comparison: Comparison) -> None:
    """The speed-up over the baseline at each of its FLOPs, with the intervals that both ends bound."""
    axes = figure.subplots()
    for number, curve in enumerate(comparison.curves):
        color = color_of(number)
        reached = comparison.speed_ups.get(curve.name, [])
        flops = [speed_up.baseline_flops for speed_up in reached]
        percent = [100 * speed_up.in_flops for speed_up in reached]
        axes.plot(flops, percent, "o-", color=color)
        for speed_up in reached:
            interval = speed_up.interval
            if interval is None or interval.low is None or interval.high is None:
                continue
            at = speed_up.baseline_flops
            axes.plot(
                [at, at],
                [100 * interval.low, 100 * interval.high],
                color=color,
                alpha=0.4,
                linewidth=3,
            )
    plain_axes(axes)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.xaxis.set_major_formatter(amount_text)
    axes.set_xlabel(f"FLOPs of the baseline ({comparison.baseline.method})")
    axes.set_ylabel("iso-loss speed-up in FLOPs, %")


def series_svg(
    lines: Sequence[tuple[np.ndarray, np.ndarray]],
    label: str,
    logarithmic_values: bool = False,
) -> str:
    """Values over tokens, a line (tokens, values) for each stage of a run, as an <svg> element."""
    figure = new_figure(SIZE[0], SIZE[1] * 0.75)
    axes = figure.subplots()
    for tokens, values in lines:
        some = _some(len(tokens))
        axes.plot(tokens[some], values[some], color=color_of(0), linewidth=1.2)
    if logarithmic_values:
        lowest = min(values.min() for _, values in lines)
        highest = max(values.max() for _, values in lines)
        logarithmic(axes.yaxis, 0.8 * lowest, 1.25 * highest)
    plain_axes(axes)
    axes.xaxis.set_major_formatter(amount_text)
    axes.set_xlabel("tokens, base included")
    axes.set_ylabel(label)
    return svg_of(figure)
