"""Runs beside each other: what each reached, the iso-loss speed-up over the first, and the benchmarks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stackgrow import seal
from stackgrow.evaluate.tasks import headline
from stackgrow.report.curves import DEFINITION, WINDOW, Curve, SpeedUp, common_span, read_curves, speed_ups
from stackgrow.run_folder.folder import RunFolder
from stackgrow.text import aligned, human

SMOOTHING = {
    "train": f"training loss, smoothed by straight lines over the records within {WINDOW:.0%} of a point's FLOPs",
    "validation": "validation loss, the mean of the seeds, not smoothed",
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """``curves`` of which the first is the baseline; the others' speed-ups by name, of those that have come to their
    target models, at ``losses`` where any were asked for; benchmarks by run and task."""

    loss: str
    losses: Sequence[float]
    curves: list[Curve]
    speed_ups: dict[str, list[SpeedUp]]
    evaluations: dict[str, dict[str, float]]

    @property
    def baseline(self) -> Curve:
        return self.curves[0]


def compare(runs: Sequence[Path], loss: str = "train", losses: Sequence[float] = ()) -> Comparison:
    """``runs`` against the first of them, at ``losses`` or at five that both reach.

    Raises:
        DamagedError: a folder that is no run, or without records.
    """
    curves = read_curves(runs, loss)
    there = [curve for curve in curves[1:] if curves[0].arrived and curve.arrived]
    against = {curve.name: speed_ups(curves[0].target, curve.target, losses) for curve in there}
    names = [run.absolute().name for run in runs]
    # Folder names alone, since a comparison is published; full paths only where names are equal.
    unique = [name if names.count(name) == 1 else str(run) for name, run in zip(names, runs, strict=True)]
    evaluations = {name: last_evaluation(run) for name, run in zip(unique, runs, strict=True)}
    return Comparison(loss, losses, curves, against, {run: found for run, found in evaluations.items() if found})


def last_evaluation(run: Path) -> dict[str, float]:
    """The metric that speaks for each task, "task metric" -> value, of the checkpoint that saw the most tokens."""
    records = [r for file in RunFolder(run).eval.glob("*.json") if (r := seal.read_json(file))]
    if not records:
        return {}
    record = max(records, key=lambda r: (r["tokens"], r["step"], not r.get("limit")))
    best = {task: headline(task, metrics) for task, metrics in record["tasks"].items()}
    found = {f"{task} {name}": record["tasks"][task][name] for task, name in best.items() if name}
    mean = {"mean of seven": record["seven_task_mean"]} if record["seven_task_mean"] is not None else {}
    return {**found, **mean}


HEAD = ("loss", "FLOPs", "baseline", "speed-up", "95%", "tokens", "baseline", "speed-up")


def speed_up_rows(found: Sequence[SpeedUp]) -> list[tuple[str, ...]]:
    """A speed-up a line, for a table under HEAD."""
    return [
        (
            f"{s.loss:.4f}", f"{s.flops:.3g}", f"{s.baseline_flops:.3g}", f"{s.in_flops:+.1%}",
            f"{s.interval[0]:+.1%} to {s.interval[1]:+.1%}" if s.interval else "-",
            human(s.tokens), human(s.baseline_tokens), f"{s.in_tokens:+.1%}",
        )
        for s in found
    ]  # fmt: skip


def verdict(comparison: Comparison, curve: Curve) -> str:
    """Both at as many FLOPs; and, where there is no loss that both reach, that there is none."""
    if early := [c.name for c in (comparison.baseline, curve) if not c.arrived]:
        return f"no speed-up: {' and '.join(early)} has not come to its target model"
    base, run = comparison.baseline.target, curve.target
    flops = min(base.flops[-1], run.flops[-1])
    equal = f"at {flops:.3g} FLOPs each: loss {run.loss_at(flops):.4f} against {base.loss_at(flops):.4f}"
    if flops < max(base.flops[0], run.flops[0]):
        equal = "at no amount of FLOPs do both have a target model"
    if common_span(base, run):
        reached = {s.loss for s in comparison.speed_ups[curve.name]}
        missed = [f"{loss:g}" for loss in comparison.losses if loss not in reached]
        return equal + (f"; not reached by both: loss {', '.join(missed)}" if missed else "")
    spans = [f"{c.name} from {c.target.span[0]:.4f} to {c.target.span[1]:.4f}" for c in (comparison.baseline, curve)]
    return f"the curves never meet, so there is no speed-up: {', '.join(spans)}; {equal}"


def render(comparison: Comparison) -> str:
    """As text for a terminal."""
    return "\n".join(_lines(comparison))


def _lines(comparison: Comparison) -> Iterator[str]:
    yield from (SMOOTHING[comparison.loss], DEFINITION)
    for curve in comparison.curves[1:]:
        seeds = "".join(f", {c.seeds} seeds of {c.name}" for c in (comparison.baseline, curve) if c.seeds > 1)
        yield from ("", f"{curve.name} against {comparison.baseline.name}{seeds}", verdict(comparison, curve))
        if rows := speed_up_rows(comparison.speed_ups.get(curve.name, [])):
            yield from aligned([HEAD, *rows])
    if comparison.evaluations:
        yield from ("", *aligned(evaluation_rows(comparison.evaluations)))


def evaluation_rows(evaluations: Mapping[str, Mapping[str, float]]) -> list[tuple[str, ...]]:
    """A run a line, a benchmark a column; the first line is the head."""
    names = list(dict.fromkeys(name for found in evaluations.values() for name in found))
    rows = [(run, *(f"{f[n]:.4f}" if n in f else "-" for n in names)) for run, f in evaluations.items()]
    return [("run", *names), *rows]


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """As plain values: speed-ups exact, and what they mean."""
    ups = {
        name: [{**dataclasses.asdict(s), "speed_up_flops": s.in_flops, "speed_up_tokens": s.in_tokens} for s in found]
        for name, found in comparison.speed_ups.items()
    }
    verdicts = {curve.name: verdict(comparison, curve) for curve in comparison.curves[1:]}
    return {
        "definition": DEFINITION,
        "loss": SMOOTHING[comparison.loss],
        "baseline": comparison.baseline.name,
        "speed_ups": ups,
        "verdicts": verdicts,
        "evaluations": comparison.evaluations,
    }
