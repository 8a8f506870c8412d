"""The end of a stage that its training loss decides: when the loss no longer falls fast enough. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import linear_regression

from stackgrow.plan.batches import Batches

SLOPE_POINTS = 128  # losses in the window of a slope: enough to smooth, and rarely more than are logged anyhow


@dataclass(frozen=True)
class Until:
    """Ends a stage at its first step from ``min_steps`` on at which the loss falls by less than ``slope`` per billion
    tokens, or at ``max_steps``: the slope of a line through the losses looked at in the last ``window`` steps."""

    slope: float
    min_steps: int
    max_steps: int

    @property
    def window(self) -> int:
        return self.min_steps // 2

    def looks_at(self, step: int) -> bool:
        return step % max(1, self.window // SLOPE_POINTS) == 0

    def fall(self, losses: Mapping[int, float], batches: Batches, step: int) -> float:
        """By how much the loss fell per billion tokens over the window before ``step``; ``losses`` by their steps."""
        steps = [logged for logged in losses if step - self.window < logged <= step]
        if len(steps) < 2:
            return math.inf
        billions = [batches.tokens(logged) / 1e9 for logged in steps]
        line = linear_regression(billions, [losses[logged] for logged in steps])
        return -line.slope
