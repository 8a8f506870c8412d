"""Loss curves of runs, smoothed, and the iso-loss speed-up between two of them. No torch, no matplotlib.

speed-up = FLOPs(baseline) / FLOPs(run) - 1, both up to where their target models reach the same smoothed training
loss, the base's FLOPs included (paper, appendix B.2). The paper smooths its curves and does not say how. Here a point
of a smoothed curve is the value of the straight line fitted to the records of its stage whose FLOPs differ by at most
``WINDOW`` of its own: a window that grows with the run keeps the ratio of two power laws as it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stackgrow.errors import DamagedError
from stackgrow.recipe.load import load_recipe
from stackgrow.recipe.write import canonical_hash, to_dict
from stackgrow.run_folder.folder import METRICS, VALIDATION, RunFolder
from stackgrow.run_folder.found import plan_of_run
from stackgrow.run_folder.lines import read_records

WINDOW = 0.1
NEIGHBOURS = 2  # records to either side that are in a window in any case
FILES = {"train": METRICS, "validation": VALIDATION}
BOOTSTRAP, QUANTILES = 200, (2.5, 97.5)
DEFINITION = (
    "speed-up = FLOPs(baseline) / FLOPs(run) - 1 at equal smoothed loss, with the base's FLOPs; likewise in tokens"
)


@dataclass(frozen=True)
class Part:
    """One stage of a run, or of several with different seeds: arrays [records], in order of FLOPs.

    ``tokens`` and ``flops`` count from the start of the run; ``seed`` numbers the run that a record is from.
    """

    stage: str
    tokens: np.ndarray
    flops: np.ndarray
    loss: np.ndarray
    seed: np.ndarray
    smooth: np.ndarray
    window: float = WINDOW

    @property
    def span(self) -> tuple[float, float]:
        """The smoothed loss at the start of the stage, and the lowest in it."""
        return float(self.smooth[0]), float(self.smooth.min())

    def loss_at(self, flops: float) -> float:
        """The smoothed loss at an amount of FLOPs within the stage."""
        return float(np.interp(flops, self.flops, self.smooth))

    def at_loss(self, loss: float) -> tuple[float, float] | None:
        """FLOPs and tokens where the smoothed loss first falls to ``loss``; None where it never does, or is below it
        from the start."""
        start, lowest = self.span
        if not lowest <= loss <= start:
            return None
        falling = -np.minimum.accumulate(self.smooth)
        after = int(np.searchsorted(falling, -loss))
        before = max(after - 1, 0)
        step = falling[after] - falling[before]
        share = (-loss - falling[before]) / step if step else 0.0
        flops, tokens = (float(a[before] + share * (a[after] - a[before])) for a in (self.flops, self.tokens))
        return flops, tokens


@dataclass(frozen=True)
class Curve:
    """What a run trained, stage by stage; the last part is the target model's where it has ``arrived`` at that."""

    name: str
    parts: tuple[Part, ...]
    arrived: bool = True

    @property
    def target(self) -> Part:
        return self.parts[-1]

    @property
    def seeds(self) -> int:
        """How many runs the last part is from."""
        return len(np.unique(self.target.seed))

    def loss_at(self, flops: float) -> float:
        """The smoothed loss of whichever stage was trained at an amount of FLOPs."""
        begun = [part for part in self.parts if part.flops[0] <= flops]
        return (begun or self.parts)[max(len(begun) - 1, 0)].loss_at(flops)


def read_curves(runs: Sequence[Path], loss: str = "train") -> list[Curve]:
    """One curve for each recipe, in the order given: runs of one recipe that differ in the seed alone are pooled.

    ``loss``: "train", or "validation", which is of the same text at every point: the seeds' mean, not smoothed.

    Raises:
        DamagedError: a folder that is no run or has no records of this loss.
    """
    groups: dict[str, list[Path]] = {}
    names: dict[str, str] = {}
    for run in runs:
        if not RunFolder(run).recipe_file.is_file():
            raise DamagedError(f"{run} is not a run: it has no recipe.toml")
        recipe = load_recipe(RunFolder(run).recipe_file, trusted=True)
        same = {k: v for k, v in to_dict(recipe).items() if k not in ("name", "seed", "run", "log", "parallel")}
        key = canonical_hash(same)
        groups.setdefault(key, []).append(run)
        names.setdefault(key, recipe.name)
    window = WINDOW if loss == "train" else 0.0  # validation is of the same text every time: it has no such noise
    curves = [_curve(names[key], members, FILES[loss], window) for key, members in groups.items()]
    alike = [curve.name for curve in curves]
    folders = [str(members[0]) for members in groups.values()]
    unique = [n if alike.count(n) == 1 else f for n, f in zip(alike, folders, strict=True)]
    return [dataclasses.replace(curve, name=name) for curve, name in zip(curves, unique, strict=True)]


def _curve(name: str, runs: Sequence[Path], file: str, window: float) -> Curve:
    found: dict[str, list[tuple[float, float, float, int]]] = {}
    for seed, run in enumerate(runs):
        for stage in RunFolder(run).stages():
            records = read_records(stage.path / file)
            rows = [(r["flops"], r["tokens"], r["loss"], seed) for r in records if math.isfinite(r["loss"])]
            if rows:
                found.setdefault(stage.name, []).extend(rows)
    parts = [make_part(stage, np.array(sorted(rows)), window) for stage, rows in found.items() if rows]
    if not parts:
        raise DamagedError(f"{runs[0]} has no {file} with records")
    return Curve(name, tuple(parts), parts[-1].stage == plan_of_run(runs[0]).train_stages[-1].name)


def make_part(stage: str, rows: np.ndarray, window: float = WINDOW) -> Part:
    """A part from rows (FLOPs, tokens, loss, seed), [records, 4], in order of FLOPs."""
    flops, tokens, loss, seed = rows.T
    return Part(stage, tokens, flops, loss, seed.astype(int), smooth(flops, loss, window=window), window)


def smooth(x: np.ndarray, y: np.ndarray, weight: np.ndarray | None = None, window: float = WINDOW) -> np.ndarray:
    """``y`` at each ``x``, rising and positive, on the straight line fitted to the points within ``window`` * x; with
    no window the mean of those at ``x``."""
    weight = np.ones_like(y) if weight is None else weight
    if not window:
        _, place = np.unique(x, return_inverse=True)
        return (np.bincount(place, weight * y) / np.bincount(place, weight))[place]
    index = np.arange(len(x))
    first = np.minimum(np.searchsorted(x, x * (1 - window)), np.maximum(index - NEIGHBOURS, 0))
    end = np.maximum(np.searchsorted(x, x * (1 + window), side="right"), np.minimum(index + NEIGHBOURS + 1, len(x)))

    def total(values: np.ndarray) -> np.ndarray:
        sums = np.concatenate([[0.0], np.cumsum(weight * values)])
        return sums[end] - sums[first]

    scaled = x / x[-1]
    n, mean_x, mean_y = total(np.ones_like(y)), total(scaled), total(y)
    mean_x, mean_y = mean_x / n, mean_y / n
    variance = total(scaled**2) / n - mean_x**2
    slope = np.divide(total(scaled * y) / n - mean_x * mean_y, variance, where=variance > 1e-18, out=np.zeros_like(y))
    return mean_y + slope * (scaled - mean_x)


@dataclass(frozen=True)
class SpeedUp:
    """FLOPs and tokens of a baseline and of a run up to one loss; ``interval`` holds 95% of the bootstrap."""

    loss: float
    baseline_flops: float
    baseline_tokens: float
    flops: float
    tokens: float
    interval: tuple[float, float] | None = None

    @property
    def in_flops(self) -> float:
        return self.baseline_flops / self.flops - 1

    @property
    def in_tokens(self) -> float:
        return self.baseline_tokens / self.tokens - 1


def common_span(baseline: Part, run: Part) -> tuple[float, float] | None:
    """The highest and the lowest loss that both reach."""
    high, low = (pick(ends) for pick, ends in zip((min, max), zip(baseline.span, run.span, strict=True), strict=True))
    return (high, low) if low <= high else None


def speed_ups(baseline: Part, run: Part, losses: Sequence[float] = ()) -> list[SpeedUp]:
    """The speed-up at each of ``losses`` that both reach, or at five losses evenly spread, in the baseline's FLOPs,
    over all that both reach; [] where there is none."""
    if not (span := common_span(baseline, run)):
        return []
    high, low = span
    if not losses:
        ends = [place[0] for level in span if (place := baseline.at_loss(level))]
        levels = np.linspace(ends[0], ends[-1], 6)[1:]
        losses = [*(min(high, max(low, baseline.loss_at(flops))) for flops in levels[:-1]), low]
    found = [_speed_up(baseline, run, loss) for loss in losses]
    rng = np.random.default_rng(0)
    again = [(_resampled(baseline, rng), _resampled(run, rng)) for _ in range(BOOTSTRAP)]
    return [_with_interval(speed_up, again) for speed_up in found if speed_up]


def _speed_up(baseline: Part, run: Part, loss: float) -> SpeedUp | None:
    ours, theirs = run.at_loss(loss), baseline.at_loss(loss)
    return SpeedUp(loss, *theirs, *ours) if ours and theirs else None


def _resampled(part: Part, rng: np.random.Generator) -> Part:
    """The part as it might have been: seeds drawn with replacement, and of every record's distance from the smoothed
    curve the sign (wild bootstrap, which keeps its size, larger early in training than late)."""
    seeds, seed = np.unique(part.seed, return_inverse=True)
    drawn = np.bincount(rng.integers(len(seeds), size=len(seeds)), minlength=len(seeds))[seed]
    loss = part.loss
    if part.window:
        loss = part.smooth + (loss - part.smooth) * rng.choice([-1.0, 1.0], size=len(loss))
    kept = drawn > 0
    smoothed = smooth(part.flops[kept], loss[kept], drawn[kept].astype(float), part.window)
    return dataclasses.replace(part, flops=part.flops[kept], tokens=part.tokens[kept], smooth=smoothed)


def _with_interval(speed_up: SpeedUp, again: Sequence[tuple[Part, Part]]) -> SpeedUp:
    values = [s.in_flops for baseline, run in again if (s := _speed_up(baseline, run, speed_up.loss))]
    low, high = np.percentile(values, QUANTILES) if len(values) > 0.95 * BOOTSTRAP else (0, 0)
    if low == high:  # nothing varies, or at the end of a curve, where replicates do not reach the loss
        return speed_up
    return dataclasses.replace(speed_up, interval=(float(low), float(high)))
