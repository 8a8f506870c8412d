"""Growth timing or factor from a sweep of runs, as in the paper's section 4.2, and its scaling law (Figure 7).

For each target size and each of some FLOPs, the smoothed losses of the runs make an IsoFLOP curve over log10 of the
timing d (tokens before growth) or of the factor g; its valley is the minimum of a parabola through them (Figures 8 and
10). log10(d) = a log10(N) + b / log10(C) + c is fitted to the valleys (eq. 2), and L = a C^b to the runs' final losses.
N is the target's parameters and C = 6 N D, as in ``timing = "auto"``; what the base spent counts.

Uncertainties are standard deviations. Points of one run are not independent: those of a, b and c are from refits in
which all of a run's losses are shifted alike, by a normal number as large as the losses' distances from the parabolas.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stackgrow.errors import DamagedError
from stackgrow.recipe.load import load_recipe
from stackgrow.report.curves import make_part, read_curves
from stackgrow.run_folder.folder import RunFolder

BOOTSTRAP = 400
COLUMNS = ("parameters", "flops", "loss")


@dataclass(frozen=True)
class Run:
    """The smoothed loss of a target model over C; ``at`` is its timing in tokens or its factor, None from scratch."""

    name: str
    parameters: float
    at: float | None
    flops: np.ndarray
    loss: np.ndarray


@dataclass(frozen=True)
class Valley:
    """One IsoFLOP curve: ``losses`` at ``tried`` timings or factors; ``best`` at its valley, or ``problem``: why there
    is none."""

    parameters: float
    flops: float
    tried: tuple[float, ...]
    losses: tuple[float, ...]
    parabola: tuple[float, float, float]  # loss = p0 x^2 + p1 x + p2 with x = log10
    best: float | None
    problem: str | None


@dataclass(frozen=True)
class Fit:
    """Values and their standard deviations (NaN where the data do not tell), by name."""

    values: dict[str, float]
    errors: dict[str, float]
    points: int


def read_run(folder: Path, variable: str) -> Run:
    """A run; ``variable`` "timing" or "factor". Raises DamagedError where it has not come to its target model."""
    (curve,) = read_curves([folder])
    if not curve.arrived:
        raise DamagedError(f"{folder} has not come to its target model; let it finish")
    recipe = load_recipe(RunFolder(folder).recipe_file, trusted=True)
    n, embedding = recipe.model.parameters(), recipe.model.vocab_size * recipe.model.dim
    at = None
    bases = [part for part in curve.parts[:-1] if "-learn-" not in part.stage]  # whose steps are the growth's
    if bases:
        layers = recipe.base.n_layers if recipe.base and recipe.base.n_layers else recipe.model.n_layers
        at = bases[-1].tokens[-1] if variable == "timing" else recipe.model.n_layers / layers
    # Records count 6 N without the input embedding.
    return Run(str(folder), n, at, curve.target.flops * n / (n - embedding), curve.target.smooth)


def read_table(file: Path, variable: str) -> list[Run]:
    """Runs from CSV rows: ``parameters``, ``timing`` or ``factor`` (empty: from scratch), ``flops``, ``loss``.

    Raises:
        DamagedError: a column is missing, or a value is no number.
    """
    rows: dict[tuple[float, float | None], list[tuple[float, ...]]] = {}
    with file.open(newline="") as stream:
        for line, row in enumerate(csv.DictReader(stream), start=2):
            try:
                n, flops, loss = (float(row[name]) for name in COLUMNS)
                at = float(row[variable]) if row[variable] else None
            except (KeyError, TypeError, ValueError) as error:
                columns = f"parameters, {variable}, flops, loss"
                raise DamagedError(f"{file}:{line}: {error}; each row needs numbers for {columns}") from None
            rows.setdefault((n, at), []).append((flops, 0.0, loss, 0))
    parts = {key: make_part("", np.array(sorted(points))) for key, points in rows.items()}
    return [Run(f"{file}: {key}", *key, part.flops, part.smooth) for key, part in parts.items()]


def valleys(runs: Sequence[Run], points: int = 6) -> list[Valley]:
    """The IsoFLOP curves of each size, at ``points`` FLOPs evenly spread over what its runs have in common. A timing
    of 0 has no logarithm, and is left out."""
    found = []
    for n in sorted({run.parameters for run in runs}):
        group = sorted((r for r in runs if r.parameters == n and r.at), key=lambda r: r.at or 0)
        if len({r.at for r in group}) < 3:
            continue
        low, high = max(r.flops[0] for r in group), min(r.flops[-1] for r in group)
        # Right after growth a loss still falls steeply, and says little about the timing.
        for flops in np.linspace(low, high, points + 1)[1:] if low < high else ():
            losses = [float(np.interp(flops, r.flops, r.loss)) for r in group]
            found.append(_valley(n, float(flops), [r.at or 0 for r in group], losses))
    return found


def _valley(n: float, flops: float, tried: Sequence[float], losses: Sequence[float]) -> Valley:
    x = np.log10(tried)
    curvature, slope, level = (float(p) for p in np.polyfit(x, losses, 2))
    bottom = -slope / (2 * curvature) if curvature else math.inf
    problem = None
    if curvature <= 0:
        problem = "the losses do not curve upwards"
    elif not x[0] < bottom < x[-1]:
        side = "smallest" if bottom <= x[0] else "largest"
        problem = f"the loss is still falling at the {side} value tried"
    best = None if problem else float(10**bottom)
    return Valley(n, flops, tuple(tried), tuple(losses), (curvature, slope, level), best, problem)


def fit_timing(found: Sequence[Valley]) -> Fit:
    """a, b and c of eq. 2 from the valleys.

    Raises:
        DamagedError: the valleys do not determine them.
    """
    good = [v for v in found if v.best]
    best = _solve(good)
    if best is None:
        sizes = len({v.parameters for v in good})
        raise DamagedError(
            f"{len(good)} valleys of {sizes} sizes do not determine a, b and c: two sizes and two FLOPs do"
        )
    rng, again, (noise, freedom) = np.random.default_rng(0), [], _noise(good)
    for _ in range(BOOTSTRAP):
        shift = {(v.parameters, at): noise * rng.normal() for v in good for at in v.tried}
        solved = _solve([v for w in good if (v := _shifted(w, shift)).best])
        if solved is not None:
            again.append(solved)
    told = freedom > 2 and len(again) > BOOTSTRAP // 2
    # The noise is itself an estimate: Student's t is that much wider than a normal distribution.
    errors = np.std(again, axis=0) * math.sqrt(freedom / (freedom - 2)) if told else [math.nan] * 3
    values, spread = (dict(zip("abc", map(float, row), strict=True)) for row in (best, errors))
    return Fit(values, spread, points=len(good))


def _noise(good: Sequence[Valley]) -> tuple[float, int]:
    """The standard deviation of a run's losses from the parabolas, and its degrees of freedom: of each size's runs, a
    parabola takes three."""
    squares = sum(np.square(v.losses - np.polyval(v.parabola, np.log10(v.tried))).sum() for v in good)
    runs = {v.parameters: len(v.tried) for v in good}
    degrees = sum(len(v.tried) - 3 for v in good)
    return (math.sqrt(squares / degrees) if degrees else 0.0), sum(runs.values()) - 3 * len(runs)


def _solve(good: Sequence[Valley]) -> np.ndarray | None:
    if len(good) < 3:
        return None
    rows = np.array([[math.log10(v.parameters), 1 / math.log10(v.flops), 1.0] for v in good])
    scale = np.abs(rows).max(axis=0)
    solution, _, rank, _ = np.linalg.lstsq(rows / scale, np.log10([v.best or 1 for v in good]), rcond=1e-9)
    return solution / scale if rank == 3 else None


def _shifted(v: Valley, shift: dict[tuple[float, float], float]) -> Valley:
    curve = np.polyval(v.parabola, np.log10(v.tried))
    losses = [loss + shift[v.parameters, at] for at, loss in zip(v.tried, curve, strict=True)]
    return _valley(v.parameters, v.flops, v.tried, losses)


def fit_law(runs: Sequence[Run]) -> Fit | None:
    """L = a C^b through the final losses, the lowest one of each size, fitted to their logarithms; None for fewer than
    two sizes."""
    from_size = {r.parameters: r for r in sorted(runs, key=lambda r: -r.loss[-1])}
    ends = [(float(r.flops[-1]), float(r.loss[-1])) for r in from_size.values()]
    if len(ends) < 2:
        return None
    flops, losses = np.log(np.array(ends)).T
    b, log_a = np.polyfit(flops, losses, 1)
    values, errors = {"a": math.exp(log_a), "b": float(b)}, {"a": math.nan, "b": math.nan}
    if len(ends) > 2:
        spread = np.sqrt(np.diag(np.polyfit(flops, losses, 1, cov=True)[1]))
        errors = {"a": values["a"] * float(spread[1]), "b": float(spread[0])}
    return Fit(values, errors, points=len(ends))
