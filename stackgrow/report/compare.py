"""Runs beside each other: what each reached, the iso-loss speed-up over the first, and the benchmarks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stackgrow.errors import ChangedError
from stackgrow.report.benchmarks import Scores, benchmark_rows, last_scores
from stackgrow.report.comparable import differences, unlike
from stackgrow.report.curves import (
    COUNTED,
    DEFINITION,
    WINDOW,
    Curve,
    Interval,
    SpeedUp,
    common_span,
    noise_floor,
    read_curves,
    seeds_text,
    speed_ups,
)
from stackgrow.report.statistics import LEAST_SEEDS
from stackgrow.run_folder.folder import RunFolder
from stackgrow.run_folder.sealed_records import edited_records
from stackgrow.text import aligned, human, wrapped

FEWEST_RECORDS = 5  # of the target model in each run, below which no speed-up is told
INTERVALS = {"train": "log.interval", "validation": "validation.interval"}
LABELS = {"train": "training loss", "validation": "validation loss"}
SMOOTHING = {
    "train": f"training loss, smoothed by straight lines over the records within {WINDOW:.0%} of a point's FLOPs",
    "validation": "validation loss, the mean of the seeds, not smoothed",
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """``curves`` of which the first is the baseline; of the others, by name: the speed-ups of those that have come to
    their target models, at ``losses`` where any were asked for, the keys in which their recipes differ from the
    baseline's, and why they cannot be compared, where that was overruled. Benchmarks by run. ``edited``: a line for
    each file of records that is not what its run sealed."""

    loss: str
    losses: Sequence[float]
    curves: list[Curve]
    speed_ups: dict[str, list[SpeedUp]]
    differences: dict[str, list[str]]
    unlike: dict[str, list[str]]
    evaluations: dict[str, Scores]
    edited: list[str]

    @property
    def baseline(self) -> Curve:
        return self.curves[0]


def compare(
    runs: Sequence[Path],
    loss: str = "train",
    losses: Sequence[float] = (),
    force: bool = False,
) -> Comparison:
    """``runs`` against the first of them, at ``losses`` or at five that both reach.

    Raises:
        DamagedError: a folder that is no run, or without records.
        ChangedError: the losses of two runs are not of the same thing, and it is not to be done by ``force``.
    """
    curves = read_curves(runs, loss)
    baseline = curves[0]

    # Every other recipe's first run stands for all of its seeds, which differ in nothing that matters here.
    speed_ups_of = {}
    differences_of = {}
    unlike_of = {}
    for curve in curves[1:]:
        reasons = unlike(baseline.runs[0], curve.runs[0])
        if reasons and not force:
            raise ChangedError(
                f"{baseline.runs[0]} and {curve.runs[0]} cannot be compared: {'; '.join(reasons)}. Their losses are "
                "of different things; --force compares them all the same"
            )
        if reasons:
            unlike_of[curve.name] = reasons
        differences_of[curve.name] = differences(baseline.runs[0], curve.runs[0])
        if _has_records(baseline) and _has_records(curve):
            speed_ups_of[curve.name] = speed_ups(baseline.target, curve.target, losses)
    return Comparison(
        loss,
        losses,
        curves,
        speed_ups_of,
        differences_of,
        unlike_of,
        _evaluations(runs),
        _edited(runs),
    )


def _edited(runs: Sequence[Path]) -> list[str]:
    """Told, and not refused: the numbers may be meant to be looked at, and an audit is what decides."""
    lines = []
    for run in runs:
        name = run.absolute().name
        lines += [f"{name}: {line}" for line in edited_records(RunFolder(run))]
    return lines


def _has_records(curve: Curve) -> bool:
    """Whether a line through those of its target model can say anything."""
    return curve.arrived and curve.fewest_records >= FEWEST_RECORDS


def _evaluations(runs: Sequence[Path]) -> dict[str, Scores]:
    """The scores of those runs that have any. Folder names alone, since a comparison is published; full paths only
    where names are equal."""
    names = [run.absolute().name for run in runs]
    evaluations = {}
    for run, name in zip(runs, names, strict=True):
        scores = last_scores(run)
        if scores:
            evaluations[name if names.count(name) == 1 else str(run)] = scores
    return evaluations


def speed_up_rows(comparison: Comparison, curve: Curve) -> list[tuple[str, ...]]:
    """A speed-up a line, below a head; [] where there is none."""
    reached = comparison.speed_ups.get(curve.name, [])
    if not reached:
        return []
    seeds = f"{curve.seeds} vs {comparison.baseline.seeds}"
    with_interval = any(speed_up.interval for speed_up in reached)
    # One seed has no intervals, and then there is no column of them.
    head = [
        "loss",
        "FLOPs",
        "baseline",
        "speed-up",
        "95%",
        "tokens",
        "baseline",
        "speed-up",
        "seeds",
    ]
    if not with_interval:
        head.remove("95%")
    rows = [tuple(head)]
    for speed_up in reached:
        row = [
            f"{speed_up.loss:.4f}",
            f"{speed_up.flops:.3g}",
            f"{speed_up.baseline_flops:.3g}",
        ]
        row.append(f"{speed_up.in_flops:+.1%}")
        if with_interval:
            row.append(_interval_text(speed_up.interval))
        row += [
            human(speed_up.tokens),
            human(speed_up.baseline_tokens),
            f"{speed_up.in_tokens:+.1%}",
            seeds,
        ]
        rows.append(tuple(row))
    return rows


def _interval_text(interval: Interval | None) -> str:
    if interval is None or interval == (None, None):
        return "-"
    if interval.low is None:
        return f"below {interval.high:+.1%}"
    if interval.high is None:
        return f"above {interval.low:+.1%}"
    return f"{interval.low:+.1%} to {interval.high:+.1%}"


def certainty(comparison: Comparison, curve: Curve) -> str:
    """What the figures rest on: how many seeds, and what an interval is made from."""
    fewest = min(comparison.baseline.seeds, curve.seeds)
    if fewest == 1:
        return "one seed: within-run noise only, nothing is known of the spread between seeds; intervals need three"
    if fewest < LEAST_SEEDS:
        return "two seeds: too few for intervals, which need three of both"
    return "95%: by the spread between seeds (Welch, Student's t)"


def noise(comparison: Comparison) -> str:
    """What an A/A comparison shows, for a reader of small differences; "" for a single seed."""
    floor = noise_floor(comparison.baseline.target, comparison.losses)
    if floor is None:
        return ""
    return (
        f"noise floor: one seed of {comparison.baseline.name} over another of the same "
        f"({seeds_text(comparison.baseline.seeds)}, all pairs) shows {floor.low:+.1%} to {floor.high:+.1%}"
    )


def outcome(comparison: Comparison, curve: Curve) -> str:
    """One sentence for the top of a page: what was saved, from the least to the most, and whether that is more than the
    spread between seeds."""
    reached = comparison.speed_ups.get(curve.name)
    if not reached:
        return f"{curve.label}: {verdict(comparison, curve)}."
    savings = [speed_up.in_flops for speed_up in reached]
    text = f"speed-up in FLOPs {min(savings):+.1%} to {max(savings):+.1%} at equal {LABELS[comparison.loss]}"
    intervals = [speed_up.interval for speed_up in reached if speed_up.interval]
    if not intervals:
        return f"{curve.label}: {text}; {certainty(comparison, curve)}."
    excluding = sum(interval.excludes_0 for interval in intervals)
    if not excluding:
        text = f"no difference beyond the spread between seeds: {text}"
    return f"{curve.label}: {text}; {excluding} of {len(intervals)} 95% intervals exclude 0."


def verdict(comparison: Comparison, curve: Curve) -> str:
    """Both at as many FLOPs; and, where there is no loss that both reach, that there is none."""
    baseline = comparison.baseline
    early = [one.name for one in (baseline, curve) if not one.arrived]
    if early:
        return f"no speed-up: {' and '.join(early)} has not come to its target model"
    for one in (baseline, curve):
        if one.fewest_records < FEWEST_RECORDS:
            return (
                f"no speed-up: {one.name} has {one.fewest_records} records of its target model, and a curve takes "
                f"{FEWEST_RECORDS}; lower {INTERVALS[comparison.loss]} and train it again"
            )
    equal = _at_equal_flops(baseline, curve)
    if common_span(baseline.target, curve.target):
        reached = {speed_up.loss for speed_up in comparison.speed_ups[curve.name]}
        missed = [f"{loss:g}" for loss in comparison.losses if loss not in reached]
        return (
            f"{equal}; not reached by both: loss {', '.join(missed)}"
            if missed
            else equal
        )
    spans = [
        f"{one.name} from {one.target.span.high:.4f} to {one.target.span.low:.4f}"
        for one in (baseline, curve)
    ]
    return (
        f"the curves never meet, so there is no speed-up: {', '.join(spans)}; {equal}"
    )


def _at_equal_flops(baseline: Curve, curve: Curve) -> str:
    flops = min(baseline.target.flops[-1], curve.target.flops[-1])
    if flops < max(baseline.target.flops[0], curve.target.flops[0]):
        return "at no amount of FLOPs do both have a target model"
    ours = curve.target.loss_at(flops)
    theirs = baseline.target.loss_at(flops)
    return f"at {flops:.3g} FLOPs each: loss {ours:.4f} against {theirs:.4f}"


def render(comparison: Comparison) -> str:
    """As text for a terminal."""
    return "\n".join(_lines(comparison))


def _lines(comparison: Comparison) -> Iterator[str]:
    for line in comparison.edited:
        yield f"NOT AS SEALED  {line}"
    yield SMOOTHING[comparison.loss]
    yield DEFINITION
    yield COUNTED
    floor = noise(comparison)
    if floor:
        yield from wrapped(floor)
    for curve in comparison.curves[1:]:
        yield ""
        yield f"{curve.label} against {comparison.baseline.label}"
        for reason in comparison.unlike.get(curve.name, []):
            yield f"  NOT COMPARABLE  {reason}"
        for line in comparison.differences[curve.name]:
            yield f"  {line}"
        yield verdict(comparison, curve)
        rows = speed_up_rows(comparison, curve)
        if rows:
            yield certainty(comparison, curve)
            yield from aligned(rows)
    if comparison.evaluations:
        yield ""
        yield from aligned(benchmark_rows(comparison.evaluations))


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """As plain values: speed-ups exact, and what they mean."""
    exact = {}
    for name, reached in comparison.speed_ups.items():
        exact[name] = [_speed_up_dict(speed_up) for speed_up in reached]
    others = comparison.curves[1:]
    floor = noise_floor(comparison.baseline.target, comparison.losses)
    return {
        "definition": DEFINITION,
        "flops": COUNTED,
        "loss": SMOOTHING[comparison.loss],
        "baseline": comparison.baseline.name,
        "seeds": {curve.name: curve.seeds for curve in comparison.curves},
        "noise_floor": None
        if floor is None
        else {"low": floor.low, "high": floor.high},
        "speed_ups": exact,
        "verdicts": {curve.name: verdict(comparison, curve) for curve in others},
        "certainty": {curve.name: certainty(comparison, curve) for curve in others},
        "differences": comparison.differences,
        "not_comparable": comparison.unlike,
        "not_as_sealed": comparison.edited,
        "evaluations": {
            run: _scores_dict(scores) for run, scores in comparison.evaluations.items()
        },
    }


def _speed_up_dict(speed_up: SpeedUp) -> dict[str, Any]:
    plain = dataclasses.asdict(speed_up)
    plain["speed_up_flops"] = speed_up.in_flops
    plain["speed_up_tokens"] = speed_up.in_tokens
    return plain


def _scores_dict(scores: Scores) -> dict[str, Any]:
    return {
        name: {"value": score.value, "standard_error": score.error}
        for name, score in scores.items()
    }
