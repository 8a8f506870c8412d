"""Loss curves of runs, smoothed, and the iso-loss speed-up between two of them. No torch, no matplotlib.

speed-up = FLOPs(baseline) / FLOPs(run) - 1, both up to where their target models reach the same smoothed training
loss, the base's FLOPs included (paper, appendix B.2). The paper smooths its curves and does not say how. Here a point
of a smoothed curve is the value of the straight line fitted to the records of its stage whose FLOPs differ by at most
``WINDOW`` of its own: a window that grows with the run keeps the ratio of two power laws as it is.

Every seed is smoothed by itself, and interpolated (over the logarithm of FLOPs, in which a loss is nearly straight) to
one grid; the curve of a recipe is the mean of its seeds. How far the seeds lie apart there is what a 95% interval is
made from: what varies within a run, however often it is logged, is in that spread already.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stackgrow.errors import DamagedError
from stackgrow.recipe.load import load_recipe
from stackgrow.recipe.write import canonical_hash, to_dict
from stackgrow.report.methods import method_of
from stackgrow.report.records import read_columns
from stackgrow.report.statistics import LEAST_SEEDS, half_width
from stackgrow.run_folder.folder import RECIPE, RunFolder, StageFolder
from stackgrow.run_folder.found import plan_of_run

WINDOW = 0.1
NEIGHBOURS = 2  # records to either side that are in a window in any case
LEVELS = 5  # losses at which runs are compared where none are asked for
DEFINITION = (
    "speed-up = FLOPs(baseline) / FLOPs(run) - 1 at equal smoothed loss, with the base's FLOPs; "
    "likewise in tokens"
)
COUNTED = "FLOPs are 6 N D with N the parameters without the input embedding"


@dataclass(frozen=True)
class SeedCurve:
    """One stage of one run: arrays [records], in order of FLOPs. ``tokens`` and ``flops`` count from the start of the
    run and are above 0."""

    flops: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    smooth: np.ndarray

    def smooth_at(self, flops: np.ndarray | float) -> np.ndarray:
        """The smoothed loss at amounts of FLOPs within the stage."""
        return np.interp(np.log(flops), np.log(self.flops), self.smooth)


def seed_curve(
    flops: np.ndarray, tokens: np.ndarray, loss: np.ndarray, window: float = WINDOW
) -> SeedCurve:
    """A run's records of one stage, in any order, smoothed over ``window``."""
    order = np.argsort(flops, kind="stable")
    flops = flops[order]
    loss = loss[order]
    return SeedCurve(flops, tokens[order], loss, smooth(flops, loss, window))


def smooth(x: np.ndarray, y: np.ndarray, window: float = WINDOW) -> np.ndarray:
    """``y`` at each ``x``, rising and positive, on the straight line fitted to the points within ``window`` * x; with
    no window ``y`` itself."""
    if not window:
        return y
    # The window of every point, as the indices of its first record and of the one after its last.
    index = np.arange(len(x))
    first = np.searchsorted(x, x * (1 - window))
    first = np.minimum(first, np.maximum(index - NEIGHBOURS, 0))
    end = np.searchsorted(x, x * (1 + window), side="right")
    end = np.maximum(end, np.minimum(index + NEIGHBOURS + 1, len(x)))
    count = end - first

    def window_mean(values: np.ndarray) -> np.ndarray:
        """The mean over every point's window, by the difference of two running sums."""
        sums = np.concatenate([[0.0], np.cumsum(values)])
        return (sums[end] - sums[first]) / count

    # The least-squares line of each window; level where all its records lie at one x.
    scaled = x / x[-1]
    mean_x = window_mean(scaled)
    mean_y = window_mean(y)
    variance = window_mean(scaled**2) - mean_x**2
    covariance = window_mean(scaled * y) - mean_x * mean_y
    slope = np.divide(
        covariance, variance, where=variance > 1e-18, out=np.zeros_like(y)
    )
    return mean_y + slope * (scaled - mean_x)


class Reached(NamedTuple):
    """What it took to reach a loss."""

    flops: float
    tokens: float


class Span(NamedTuple):
    """Losses that a curve reaches: all from ``high``, where it starts, to ``low``."""

    high: float
    low: float


@dataclass(frozen=True)
class StageCurve:
    """One stage of a recipe's runs, over the FLOPs that all of its ``seeds`` have come to.

    ``flops``, ``tokens`` and ``smooth``, the mean of the seeds' smoothed losses, are [points]; ``by_seed``, the losses
    that it is the mean of, [seeds, points].
    """

    stage: str
    seeds: tuple[SeedCurve, ...]
    flops: np.ndarray
    tokens: np.ndarray
    by_seed: np.ndarray
    smooth: np.ndarray

    @property
    def span(self) -> Span:
        """From the smoothed loss at the start of the stage to the lowest in it."""
        return Span(float(self.smooth[0]), float(self.smooth.min()))

    def loss_at(self, flops: float) -> float:
        """The smoothed loss at an amount of FLOPs within the stage."""
        return float(self.losses_at(flops).mean())

    def losses_at(self, flops: float) -> np.ndarray:
        """The same of each seed, [seeds]."""
        return np.array([seed.smooth_at(flops) for seed in self.seeds])

    def at_loss(self, loss: float) -> Reached | None:
        """FLOPs and tokens where the smoothed loss first falls to ``loss``; None where it never does, or is below it
        from the start."""
        if not self.span.low <= loss <= self.span.high:
            return None
        # A noisy curve rises at times: what counts is the lowest loss so far.
        lowest_so_far = np.minimum.accumulate(self.smooth)
        after = int(np.searchsorted(-lowest_so_far, -loss))
        if after == 0:
            return Reached(float(self.flops[0]), float(self.tokens[0]))

        # Between the point before and that one, on a straight line.
        fall = lowest_so_far[after - 1] - lowest_so_far[after]
        share = (lowest_so_far[after - 1] - loss) / fall
        flops = _between(self.flops, after - 1, share)
        return Reached(flops, float(np.interp(flops, self.flops, self.tokens)))


def _between(flops: np.ndarray, before: int, share: float) -> float:
    """The FLOPs that lie ``share`` of the way, in the logarithm, from point ``before`` to the next."""
    return float(flops[before] * (flops[before + 1] / flops[before]) ** share)


def stage_curve(stage: str, seeds: Sequence[SeedCurve]) -> StageCurve | None:
    """The seeds on one grid; None where there are no FLOPs that all have come to."""
    start = max(seed.flops[0] for seed in seeds)
    end = min(seed.flops[-1] for seed in seeds)
    if start > end:
        return None

    # The first seed's own points, so that seeds which were logged alike are not interpolated at all.
    first = seeds[0].flops
    inside = first[(first > start) & (first < end)]
    flops = np.unique(np.concatenate([[start], inside, [end]]))
    tokens = np.mean(
        [np.interp(flops, seed.flops, seed.tokens) for seed in seeds], axis=0
    )
    by_seed = np.array([seed.smooth_at(flops) for seed in seeds])
    return StageCurve(stage, tuple(seeds), flops, tokens, by_seed, by_seed.mean(axis=0))


@dataclass(frozen=True)
class Curve:
    """What the ``runs`` of a recipe trained, stage by stage; the last stage is the target model's where they have
    ``arrived`` at that. ``method``: how the target model came to be, "G_stack" or "from scratch"."""

    name: str
    stages: tuple[StageCurve, ...]
    runs: tuple[Path, ...] = ()
    arrived: bool = True
    method: str = ""

    @property
    def target(self) -> StageCurve:
        return self.stages[-1]

    @property
    def fewest_records(self) -> int:
        """Of the target model, in any of its runs."""
        return min(len(seed.flops) for seed in self.target.seeds)

    @property
    def seeds(self) -> int:
        """How many runs the last stage is from."""
        return len(self.target.seeds)

    @property
    def label(self) -> str:
        return f"{self.name} ({self.method}, {seeds_text(self.seeds)})"

    @property
    def legend(self) -> str:
        """For a picture, whose reader asks what was done first and for the run last."""
        return f"{self.method}, {seeds_text(self.seeds)} ({self.name})"

    def loss_at(self, flops: float) -> float:
        """The smoothed loss of whichever stage was trained at an amount of FLOPs."""
        at_that_time = self.stages[0]
        for stage in self.stages:
            if stage.flops[0] <= flops:
                at_that_time = stage
        return at_that_time.loss_at(flops)


def seeds_text(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def read_curves(runs: Sequence[Path], loss: str = "train") -> list[Curve]:
    """One curve for each recipe, in the order given: runs of one recipe and of the same data that differ in the seed
    alone are its seeds.

    ``loss``: "train", or "validation", which is of the same text at every point and is not smoothed.

    Raises:
        DamagedError: a folder that is no run or has no records of this loss.
    """
    # The runs of each recipe, and its name, by what makes them seeds of one another.
    groups: dict[str, list[Path]] = {}
    names: dict[str, str] = {}
    for run in runs:
        if not RunFolder(run).recipe_file.is_file():
            raise DamagedError(f"{run} is not a run: it has no {RECIPE}")
        recipe = load_recipe(RunFolder(run).recipe_file, trusted=True)
        key = _identity(run, to_dict(recipe))
        groups.setdefault(key, []).append(run)
        names.setdefault(key, recipe.name)

    all_names = list(names.values())
    curves = []
    for key, members in groups.items():
        # Recipes that share a name are told apart by a folder of theirs.
        name = names[key] if all_names.count(names[key]) == 1 else str(members[0])
        curves.append(_read_curve(name, members, loss))
    return curves


def _identity(run: Path, recipe: dict[str, Any]) -> str:
    """What runs have in common that differ in the seed alone."""
    for key in ("name", "seed", "run", "log", "parallel"):
        recipe.pop(key, None)
    data = RunFolder(run).stated_provenance().get("data")
    if not isinstance(data, dict):
        data = {}
    hashes = {
        name: data.get(name)
        for name in ("manifest_hash", "validation_hash", "tokenizer_sha256")
    }
    return canonical_hash({"recipe": recipe, "data": hashes})


def _read_curve(name: str, runs: Sequence[Path], loss: str) -> Curve:
    # A run that has not come to a stage yet is none of that stage's seeds.
    seeds_of_stage: dict[str, list[SeedCurve]] = {}
    for run in runs:
        for folder in RunFolder(run).stages():
            seed = _read_seed(folder, loss)
            if seed is not None:
                seeds_of_stage.setdefault(folder.name, []).append(seed)

    stages = []
    for stage_name, seeds in seeds_of_stage.items():
        stage = stage_curve(stage_name, seeds)
        if stage is None:
            raise DamagedError(
                f"the seeds of {name} have no FLOPs of {stage_name} in common; compare them one by one"
            )
        stages.append(stage)
    if not stages:
        file = _records_file(StageFolder(runs[0]), loss).name
        raise DamagedError(f"{runs[0]} has no {file} with records")

    plan = plan_of_run(runs[0])
    arrived = stages[-1].stage == plan.train_stages[-1].name
    return Curve(name, tuple(stages), tuple(runs), arrived, method_of(plan))


def has_records(run: Path, loss: str) -> bool:
    """Whether any stage of a run has a curve of this loss."""
    return any(_read_seed(folder, loss) for folder in RunFolder(run).stages())


def _records_file(folder: StageFolder, loss: str) -> Path:
    return folder.metrics_file if loss == "train" else folder.validation_file


def _read_seed(folder: StageFolder, loss: str) -> SeedCurve | None:
    """The records of a stage whose loss is finite; None where there are none. A validation before the run's first step
    has no place on a logarithmic axis, and is left out."""
    flops, tokens, losses = read_columns(
        _records_file(folder, loss), ("flops", "tokens", "loss")
    )
    trained = flops > 0
    if not trained.any():
        return None
    return seed_curve(
        flops[trained],
        tokens[trained],
        losses[trained],
        WINDOW if loss == "train" else 0.0,
    )


class Interval(NamedTuple):
    """95% of a speed-up in FLOPs; None where the run does not train long enough to bound it."""

    low: float | None
    high: float | None

    @property
    def excludes_0(self) -> bool:
        """Whether there is a difference beyond the spread between seeds."""
        return (self.low is not None and self.low > 0) or (
            self.high is not None and self.high < 0
        )


@dataclass(frozen=True)
class SpeedUp:
    """FLOPs and tokens of a baseline and of a run up to one loss; ``interval``: by the spread between seeds, None for
    fewer than three of either."""

    loss: float
    baseline_flops: float
    baseline_tokens: float
    flops: float
    tokens: float
    interval: Interval | None = None

    @property
    def in_flops(self) -> float:
        return self.baseline_flops / self.flops - 1

    @property
    def in_tokens(self) -> float:
        return self.baseline_tokens / self.tokens - 1


def common_span(baseline: StageCurve, run: StageCurve) -> Span | None:
    """The losses that both reach."""
    high = min(baseline.span.high, run.span.high)
    low = max(baseline.span.low, run.span.low)
    return Span(high, low) if low <= high else None


def speed_ups(
    baseline: StageCurve, run: StageCurve, losses: Sequence[float] = ()
) -> list[SpeedUp]:
    """The speed-up at each of ``losses`` that both reach, or at five losses evenly spread, in the baseline's FLOPs,
    over all that both reach; [] where there is none."""
    span = common_span(baseline, run)
    if span is None:
        return []
    reached = []
    for loss in losses or _levels(baseline, span):
        speed_up = _speed_up(baseline, run, loss)
        if speed_up:
            reached.append(speed_up)
    return reached


def _levels(baseline: StageCurve, span: Span) -> list[float]:
    """Losses of the baseline at evenly spread amounts of FLOPs; the last is the lowest of ``span``."""
    first = baseline.at_loss(span.high)
    last = baseline.at_loss(span.low)
    assert first is not None
    assert last is not None
    # Without the first, where a grown model has only begun and the losses fall most steeply.
    amounts = np.linspace(first.flops, last.flops, LEVELS + 1)[1:-1]
    losses = [baseline.loss_at(flops) for flops in amounts]
    # A noisy curve may leave the span between its ends.
    inside = [min(span.high, max(span.low, loss)) for loss in losses]
    return [*sorted(inside, reverse=True), span.low]


def _speed_up(baseline: StageCurve, run: StageCurve, loss: float) -> SpeedUp | None:
    theirs = baseline.at_loss(loss)
    ours = run.at_loss(loss)
    if theirs is None or ours is None:
        return None
    interval = _interval(baseline, theirs, run, ours)
    return SpeedUp(loss, theirs.flops, theirs.tokens, ours.flops, ours.tokens, interval)


def _interval(
    baseline: StageCurve, theirs: Reached, run: StageCurve, ours: Reached
) -> Interval | None:
    """All amounts of the run's FLOPs at which its loss is not told apart from the baseline's at ``theirs``, as
    speed-ups: by Welch's test of the seeds' losses, at 5%. ``ours``: where the means are equal."""
    if min(len(baseline.seeds), len(run.seeds)) < LEAST_SEEDS:
        return None
    # How far the run's loss is above the baseline's at each of the run's points, and the 95% interval of that.
    losses = baseline.losses_at(theirs.flops)
    difference = run.smooth - losses.mean()
    half = half_width(run.by_seed, losses[:, None])
    at_least = difference - half
    at_most = difference + half

    # From where the means are equal outwards, to the first point on either side that is told apart: to the left, with
    # fewer FLOPs, the run is still worse there; to the right it is better.
    middle = min(int(np.searchsorted(run.flops, ours.flops)), len(run.flops) - 1)
    worse = np.flatnonzero(at_least[:middle] > 0)
    better = np.flatnonzero(at_most[middle:] < 0)

    # Between that point and its neighbour lies the end. A run that never gets so far leaves it open.
    high = None
    if len(worse):
        fewest = _crossing(run.flops, at_least, before=int(worse[-1]))
        high = theirs.flops / fewest - 1
    low = None
    if len(better):
        after = middle + int(better[0])
        most = _crossing(run.flops, at_most, before=max(after - 1, 0))
        low = theirs.flops / most - 1
    return Interval(low, high)


def _crossing(flops: np.ndarray, values: np.ndarray, before: int) -> float:
    """Where ``values`` fall through 0 between point ``before`` and the next."""
    fall = values[before] - values[before + 1]
    share = values[before] / fall if fall > 0 else 0.0
    return _between(flops, before, min(max(share, 0.0), 1.0))


def noise_floor(stage: StageCurve, losses: Sequence[float] = ()) -> Span | None:
    """The highest and the lowest speed-up of one seed of a recipe over another, where the truth is 0 (an A/A
    comparison); None for a single seed."""
    found = []
    for first, second in itertools.permutations(stage.seeds, 2):
        baseline = stage_curve(stage.stage, [first])
        run = stage_curve(stage.stage, [second])
        assert baseline is not None
        assert run is not None
        found += [speed_up.in_flops for speed_up in speed_ups(baseline, run, losses)]
    return Span(max(found), min(found)) if found else None
