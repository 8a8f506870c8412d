"""Growth timing or factor from a sweep of runs, as in the paper's section 4.2, and its scaling law (Figure 7).

For each target size and each of some FLOPs, the smoothed losses of the runs make an IsoFLOP curve over log10 of the
timing d (tokens before growth) or of the factor g; its valley is the minimum of a parabola through them (Figures 8 and
10). log10(d) = a log10(N) + b / log10(C) + c is fitted to the valleys (eq. 2), or the same for g (eq. 49, which the
paper calls preliminary), and L = a C^b to the runs' final losses. N is the target's parameters without embedding and
head, and C = 6 N D, as in ``timing = "auto"``; what the base spent counts.

Uncertainties are standard deviations. Points of one run are not independent: those of a, b and c are from refits in
which all of a run's losses are shifted alike, by a normal number as large as the losses' distances from the parabolas.
Seeds at one timing are runs of their own, each with its own shift.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stackgrow.errors import DamagedError
from stackgrow.recipe.load import load_recipe
from stackgrow.report.curves import read_curves, seed_curve
from stackgrow.run_folder.folder import RunFolder
from stackgrow.run_folder.found import plan_of_run

REFITS = 400
COEFFICIENTS = 3  # of a parabola, for which a size needs as many timings
GUIDELINE = ("a", "b", "c")
COLUMNS = ("parameters", "flops", "loss")
SAME_FLOPS = 1e-3  # apart in the logarithm, no power law can be told
ITERATIONS = 100  # of Gauss and Newton's; a law is found in ten


@dataclass(frozen=True)
class Run:
    """The smoothed loss of a target model over C; ``at`` is its timing in tokens or its factor, None from scratch.
    No two runs have the same ``name``."""

    name: str
    parameters: float
    at: float | None
    flops: np.ndarray
    loss: np.ndarray


@dataclass(frozen=True)
class Valley:
    """One IsoFLOP curve: ``losses`` of ``runs`` at ``tried`` timings or factors; ``best`` at its valley, or
    ``problem``: why there is none."""

    parameters: float
    flops: float
    runs: tuple[str, ...]
    tried: tuple[float, ...]
    losses: tuple[float, ...]
    parabola: tuple[float, float, float]  # loss = p0 x^2 + p1 x + p2 with x = log10
    best: float | None
    problem: str | None

    def on_parabola(self) -> np.ndarray:
        """The losses as the parabola has them."""
        return np.polyval(self.parabola, np.log10(self.tried))


@dataclass(frozen=True)
class Fit:
    """Values and their standard deviations (NaN where the data do not tell), by name."""

    values: dict[str, float]
    errors: dict[str, float]
    points: int


def read_run(folder: Path, variable: str) -> Run:
    """A run; ``variable`` "timing" or "factor". Raises DamagedError where it has not come to its target model."""
    [curve] = read_curves([folder])
    if not curve.arrived:
        raise DamagedError(f"{folder} has not come to its target model; let it finish")
    recipe = load_recipe(RunFolder(folder).recipe_file, trusted=True)

    # The steps of a learn stage are the growth's own. A base that grows untrained has no curve.
    plan = plan_of_run(folder)
    learning = {stage.name for stage in plan.stages if stage.learns_maps}
    untrained = plan.train_stages[0].steps == 0
    bases = [stage for stage in curve.stages[:-1] if stage.stage not in learning]
    at = None
    if bases and variable == "timing":
        at = float(bases[-1].tokens[-1])
    elif untrained and variable == "timing":
        at = 0.0
    elif bases or untrained:
        layers = (
            recipe.base.n_layers
            if recipe.base and recipe.base.n_layers
            else recipe.model.n_layers
        )
        at = recipe.model.n_layers / layers

    # The guideline's N is without embedding and head; records count 6 N without the input embedding.
    parameters = recipe.model.non_embedding_parameters()
    head = recipe.model.vocab_size * recipe.model.dim
    flops = curve.target.flops * parameters / (parameters + head)
    return Run(str(folder), parameters, at, flops, curve.target.smooth)


class _Row(NamedTuple):
    """What tells the runs of a table apart."""

    parameters: float
    at: float | None
    seed: str


def read_table(file: Path, variable: str) -> list[Run]:
    """Runs from CSV rows: ``parameters``, ``timing`` or ``factor`` (empty: from scratch), ``flops``, ``loss``, and
    ``seed`` where there are several of one timing.

    Raises:
        DamagedError: a column is missing, or a value is no number.
    """
    points: dict[_Row, list[tuple[float, float]]] = {}
    with file.open(newline="", encoding="utf-8") as stream:
        for line, row in enumerate(csv.DictReader(stream), start=2):
            try:
                parameters, flops, loss = (float(row[name]) for name in COLUMNS)
                at = float(row[variable]) if row[variable] else None
            except (KeyError, TypeError, ValueError) as error:
                columns = f"parameters, {variable}, flops, loss"
                raise DamagedError(
                    f"{file}:{line}: {error}; each row needs numbers for {columns}"
                ) from None
            points.setdefault(_Row(parameters, at, row.get("seed") or ""), []).append(
                (flops, loss)
            )
    runs = []
    for key, pairs in points.items():
        flops_of, losses = np.array(pairs).T
        curve = seed_curve(flops_of, flops_of, losses)
        name = f"{file}: {key.parameters:g} parameters, {variable} {key.at}, seed {key.seed}"
        runs.append(Run(name, key.parameters, key.at, curve.flops, curve.smooth))
    return runs


def valleys(
    runs: Sequence[Run], points: int = 6, variable: str = "timing"
) -> list[Valley]:
    """The IsoFLOP curves of each size, at ``points`` FLOPs evenly spread over what its runs have in common. A run from
    scratch is a factor of 1, as in Figure 10, and no timing. A timing of 0 has no logarithm, and is left out."""
    from_scratch = 1.0 if variable == "factor" else None
    of_size: dict[float, list[Run]] = {}
    for run in runs:
        at = from_scratch if run.at is None else run.at
        if at:
            of_size.setdefault(run.parameters, []).append(replace(run, at=at))
    found: list[Valley] = []
    for _, swept in sorted(of_size.items()):
        found.extend(_valleys_of_size(swept, points))
    return found


def _valleys_of_size(swept: list[Run], points: int) -> Iterator[Valley]:
    swept.sort(key=lambda run: run.at or 0)
    tried = [run.at or 0 for run in swept]
    if len(set(tried)) < COEFFICIENTS:
        return
    low = max(run.flops[0] for run in swept)
    high = min(run.flops[-1] for run in swept)
    if low >= high:
        return
    # Right after growth a loss still falls steeply, and says little about the timing: the first point is left out.
    for flops in np.linspace(low, high, points + 1)[1:]:
        losses = [float(np.interp(flops, run.flops, run.loss)) for run in swept]
        names = [run.name for run in swept]
        yield _valley(swept[0].parameters, float(flops), names, tried, losses)


def _valley(
    parameters: float,
    flops: float,
    runs: Sequence[str],
    tried: Sequence[float],
    losses: Sequence[float],
) -> Valley:
    x = np.log10(tried)
    curvature, slope, level = np.polyfit(x, losses, 2).tolist()
    bottom = -slope / (2 * curvature) if curvature else math.inf
    problem = None
    if curvature <= 0:
        problem = "the losses do not curve upwards"
    elif bottom <= x[0]:
        problem = "the loss is still falling at the smallest value tried"
    elif bottom >= x[-1]:
        problem = "the loss is still falling at the largest value tried"
    best = None if problem else float(10**bottom)
    parabola = (curvature, slope, level)
    return Valley(
        parameters,
        flops,
        tuple(runs),
        tuple(tried),
        tuple(losses),
        parabola,
        best,
        problem,
    )


def fit_valleys(found: Sequence[Valley]) -> Fit:
    """a, b and c of eq. 2 from the valleys of timings, or of eq. 49 from those of factors.

    Raises:
        DamagedError: the valleys do not determine them.
    """
    good = [valley for valley in found if valley.best]
    best = _solve(good, np.log10([valley.best or 1 for valley in good]))
    if best is None:
        sizes = len({valley.parameters for valley in good})
        raise DamagedError(
            f"{len(good)} valleys of {sizes} sizes do not determine a, b and c: two sizes and two FLOPs do"
        )

    values = dict(zip(GUIDELINE, best.tolist(), strict=True))
    errors = dict.fromkeys(GUIDELINE, math.nan)
    noise, degrees = _noise(good)
    refits = _refits(good, noise)
    if degrees > 2 and len(refits) > REFITS // 2:
        # The noise is itself an estimate: Student's t is that much wider than a normal distribution.
        spread = np.std(refits, axis=0) * math.sqrt(degrees / (degrees - 2))
        errors = dict(zip(GUIDELINE, spread.tolist(), strict=True))
    return Fit(values, errors, points=len(good))


def _noise(good: Sequence[Valley]) -> tuple[float, int]:
    """The standard deviation of a run's losses from the parabolas, and its degrees of freedom: of each size's runs, a
    parabola takes three."""
    squares = 0.0
    degrees_of_points = 0
    runs_of_size: dict[float, int] = {}
    for valley in good:
        distances = valley.losses - valley.on_parabola()
        squares += float(np.square(distances).sum())
        degrees_of_points += len(valley.tried) - COEFFICIENTS
        runs_of_size[valley.parameters] = len(valley.tried)
    noise = math.sqrt(squares / degrees_of_points) if degrees_of_points else 0.0

    # A run's points at other FLOPs are off by the same number: each run counts once.
    degrees = 0
    for runs in runs_of_size.values():
        degrees += runs - COEFFICIENTS
    return noise, degrees


def _refits(good: Sequence[Valley], noise: float) -> list[np.ndarray]:
    """a, b and c again and again, as they would be had every run been off by another normal number."""
    rng = np.random.default_rng(0)
    shifts: dict[str, np.ndarray] = {}
    for valley in good:
        for run in valley.runs:
            if run not in shifts:
                shifts[run] = noise * rng.normal(size=REFITS)
    # log10 of the timing or factor at each valley's bottom, [valleys, refits]; NaN where a refit has no valley there.
    bottoms = np.array([_shifted_bottoms(valley, shifts) for valley in good])
    refits = []
    for number in range(REFITS):
        there = np.flatnonzero(np.isfinite(bottoms[:, number]))
        solution = _solve([good[i] for i in there], bottoms[there, number])
        if solution is not None:
            refits.append(solution)
    return refits


def _shifted_bottoms(valley: Valley, shifts: dict[str, np.ndarray]) -> np.ndarray:
    """Where the parabolas through a valley's shifted losses are lowest, [refits]."""
    x = np.log10(valley.tried)
    losses = valley.on_parabola()[:, None] + [shifts[run] for run in valley.runs]
    curvature, slope, _ = np.polyfit(x, losses, 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        bottoms = -slope / (2 * curvature)
    within = (curvature > 0) & (bottoms > x[0]) & (bottoms < x[-1])
    return np.where(within, bottoms, np.nan)


def _solve(good: Sequence[Valley], log_bottoms: np.ndarray) -> np.ndarray | None:
    """a, b and c by least squares from the valleys' sizes and FLOPs, and log10 of their timings or factors; None where
    they do not determine them."""
    if len(good) < len(GUIDELINE):
        return None
    rows = np.empty((len(good), len(GUIDELINE)))
    for i, valley in enumerate(good):
        rows[i] = (math.log10(valley.parameters), 1 / math.log10(valley.flops), 1.0)
    # Columns of one size, or the rank could not be told.
    scale = np.abs(rows).max(axis=0)
    solution, _, rank, _ = np.linalg.lstsq(rows / scale, log_bottoms, rcond=1e-9)
    return solution / scale if rank == len(GUIDELINE) else None


def fit_law(runs: Sequence[Run]) -> Fit | None:
    """L = a C^b through the final losses, the lowest one of each size; None for fewer than two sizes, or where all end
    at the same FLOPs, as the paper's sweeps of factors do.

    The squares that are least are those of the losses, as in the paper (section 4.2, Figure 7), not of their
    logarithms, which would weigh the small models' errors less.
    """
    # Of several timings or seeds of one size, the run that came lowest.
    lowest: dict[float, Run] = {}
    for run in runs:
        if (
            run.parameters not in lowest
            or run.loss[-1] < lowest[run.parameters].loss[-1]
        ):
            lowest[run.parameters] = run
    if len(lowest) < 2:
        return None
    log_flops = np.log([run.flops[-1] for run in lowest.values()])
    if np.ptp(log_flops) < SAME_FLOPS:
        return None
    losses = np.array([run.loss[-1] for run in lowest.values()])

    # Gauss and Newton's method for L = exp(log a + b log C), from the fit to the logarithms, which is linear. log C is
    # counted from its mean, without which the two would hardly be told apart.
    middle = log_flops.mean()
    b, log_a = np.polyfit(log_flops - middle, np.log(losses), 1)
    for _ in range(ITERATIONS):
        fitted = np.exp(log_a + b * (log_flops - middle))
        jacobian = np.stack([fitted, fitted * (log_flops - middle)], axis=1)
        change = np.linalg.lstsq(jacobian, losses - fitted, rcond=None)[0]
        log_a += change[0]
        b += change[1]

    values = {"a": math.exp(log_a - b * middle), "b": float(b)}
    errors = {"a": math.nan, "b": math.nan}
    degrees = len(losses) - 2
    if degrees:
        # The usual errors of least squares, with the scatter of the losses about the law.
        variance = np.square(losses - fitted).sum() / degrees
        covariance = variance * np.linalg.inv(jacobian.T @ jacobian)
        # log a at C = 1 is log_a - b * middle.
        log_a_error = math.sqrt(
            covariance[0, 0]
            - 2 * middle * covariance[0, 1]
            + middle**2 * covariance[1, 1]
        )
        errors = {"a": values["a"] * log_a_error, "b": math.sqrt(covariance[1, 1])}
    return Fit(values, errors, points=len(losses))
