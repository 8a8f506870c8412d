"""What the paper's formulas and a fit of one's own say of runs that nobody has trained: its Figures 6b, 7 and 9.

All of it extrapolates. N is a model's parameters without embedding and head and C = 6 N D, as in ``report.isoflop``;
with the nominal sizes of the Llama families ("13B") the guideline is that of the paper's Table 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stackgrow.errors import DamagedError
from stackgrow.plan import guidelines
from stackgrow.report.isoflop import GUIDELINE, Fit, Run

LATE = 0.1  # of the last FLOPs: before them a grown model's loss still falls steeply, and says little of later ones
POINTS = 200


class Target(NamedTuple):
    """A model of ``parameters`` that is to train on ``tokens``."""

    parameters: float
    tokens: float

    @property
    def flops(self) -> float:
        return guidelines.training_flops(self.parameters, self.tokens)


@dataclass(frozen=True)
class Prediction:
    """Of one target: the timing by the paper's eq. 2 and by ``own`` fit, the factor by its preliminary eq. 50, and by
    two laws the ``loss`` from scratch and the FLOPs after which a grown model has it. None: there is no such fit."""

    target: Target
    timing: float
    own_timing: float | None
    factor: float
    loss: float | None = None
    grown_flops: float | None = None

    @property
    def speed_up(self) -> float | None:
        """FLOPs from scratch over those with growth, less 1, at that loss."""
        return self.target.flops / self.grown_flops - 1 if self.grown_flops else None


def predict(
    target: Target, timing: Fit | None = None, laws: dict[str, Fit] | None = None
) -> Prediction:
    """``laws``: L = a C^b of "scratch" and of "grown", as Figure 7 is read at 13B and 70B."""
    n, flops = target.parameters, target.flops
    own_timing = None
    if timing:
        a, b, c = (timing.values[name] for name in GUIDELINE)
        own_timing = guidelines.growth_timing(n, flops, (a, b, c))
    loss = grown_flops = None
    if laws and laws.keys() >= {"scratch", "grown"}:
        scratch, grown = laws["scratch"].values, laws["grown"].values
        loss = scratch["a"] * flops ** scratch["b"]
        grown_flops = (loss / grown["a"]) ** (1 / grown["b"])
    return Prediction(
        target,
        guidelines.growth_timing(n, flops),
        own_timing,
        guidelines.preliminary_factor(n, flops),
        loss,
        grown_flops,
    )


@dataclass(frozen=True)
class Difference:
    """How far a grown model's loss is below that from scratch at equal FLOPs: a + b log10(C), fitted from ``first`` to
    ``last`` FLOPs. ``rms``: how far the losses are from it; ``checked``: what the first half alone has for ``last``,
    where the losses differ by ``measured``."""

    parameters: float
    a: float
    b: float
    first: float
    last: float
    rms: float
    checked: float
    measured: float

    def at(self, flops: float) -> float:
        return self.a + self.b * math.log10(flops)

    @property
    def vanishes(self) -> float | None:
        """The FLOPs at which nothing is left of it; None where it does not shrink."""
        return 10 ** (-self.a / self.b) if self.b < 0 else None


def fit_difference(runs: Sequence[Run]) -> list[Difference]:
    """Figure 6b: a logarithm through the difference of losses, for every size of which there are runs from scratch and
    grown ones; several of either are averaged. The paper states neither its values nor which points it is fitted to:
    here they are spread evenly over the FLOPs that all runs have, less the first tenth.

    Raises:
        DamagedError: no size has both, or they have no FLOPs in common.
    """
    found = []
    for parameters in sorted({run.parameters for run in runs}):
        of_size = [run for run in runs if run.parameters == parameters]
        scratch = [run for run in of_size if run.at is None]
        grown = [run for run in of_size if run.at is not None]
        if scratch and grown:
            found.append(_difference(parameters, scratch, grown))
    if not found:
        raise DamagedError(
            "a difference of losses needs runs from scratch and grown ones of the same size; there are none"
        )
    return found


def _difference(
    parameters: float, scratch: Sequence[Run], grown: Sequence[Run]
) -> Difference:
    last = min(run.flops[-1] for run in (*scratch, *grown))
    first = max(LATE * last, *(run.flops[0] for run in (*scratch, *grown)))
    if first >= last:
        raise DamagedError(
            f"the runs of {parameters:g} parameters have no FLOPs in common"
        )
    flops = np.linspace(first, last, POINTS)
    losses = _mean_loss(scratch, flops) - _mean_loss(grown, flops)
    x = np.log10(flops)
    b, a = np.polyfit(x, losses, 1).tolist()
    rms = float(np.sqrt(np.square(losses - (a + b * x)).mean()))

    # How well such a line foretells: the second half from the first.
    half = POINTS // 2
    checked = float(np.polyval(np.polyfit(x[:half], losses[:half], 1), x[-1]))
    return Difference(
        parameters, a, b, first, last, rms, checked, measured=float(losses[-1])
    )


def _mean_loss(runs: Sequence[Run], flops: np.ndarray) -> np.ndarray:
    """The mean of the runs' smoothed losses at ``flops``, interpolated over their logarithm."""
    losses = [np.interp(np.log(flops), np.log(run.flops), run.loss) for run in runs]
    return np.mean(losses, axis=0)
