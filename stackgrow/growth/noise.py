"""The paper's noise: every weight of a grown model blended with a random one, which breaks function preservation.

Appendix I.2 (eqs. 53-54) blends all linears, section 5.2 speaks of the new neurons: as in I.2 here.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from stackgrow.growth.draw import generator, paper_std
from stackgrow.growth.rules import (
    Alias,
    Compute,
    GrowthError,
    Moment,
    Rule,
    Rules,
    Shape,
    Zeros,
)

ROWS = 4096  # blended in float64 at a time


def noisy_rules(
    rules: Rules, n_layers: int, ratio: float, seed: int, moment: Moment | None = None
) -> Rules:
    """W <- (1 - ratio) W + ratio eps for the embedding, the head and every linear of what ``rules`` grows; norms
    and biases are left alone (paper, appendix I.2, eqs. 53-54). ``n_layers`` is the target's. Blended in float64, then
    rounded. With the rules of a ``moment``: that moment's.

    eps ~ N(0, 2 / (5 d_in)), but N(0, 1 / (d_in L^2)) for attention.wo and feed_forward.w2. Raises GrowthError
    unless 0 < ratio <= 1.
    """
    if not 0 < ratio <= 1:
        raise GrowthError(
            f"the noise ratio {ratio} must be above 0 and at most 1; 0.2 is the paper's"
        )
    targets = dict(rules.targets)
    for name, rule in rules.targets.items():
        shape = rules.target_shapes[name]
        is_norm_or_bias = len(shape) == 1
        if is_norm_or_bias:
            continue
        if not moment:
            std = noise_std(name, shape, n_layers)
            targets[name] = _blended(name, rule, shape, std, ratio, seed)
        # A moment has no noise of its own: it is that of a weight times (1 - ratio).
        elif not isinstance(rule, Zeros):
            factor = (1 - ratio) ** moment.power
            targets[name] = _shrunk(rule, factor)
    return replace(rules, targets=targets)


def noise_std(name: str, shape: tuple[int, ...], n_layers: int) -> float:
    """As the initialization, but wo has the small noise of w2 too (eq. 53)."""
    if name.endswith("attention.wo.weight"):
        return 1 / (math.sqrt(shape[1]) * n_layers)
    return paper_std(name, shape, n_layers)


def _shrunk(rule: Alias | Compute, factor: float) -> Compute:
    def fn(*sources: Tensor) -> Tensor:
        moment = rule.fn(*sources) if isinstance(rule, Compute) else sources[0]
        return moment.mul_(factor)

    return Compute(rule.sources, fn, f"times {factor:g}")


def _blended(
    name: str, rule: Rule, shape: Shape, std: float, ratio: float, seed: int
) -> Compute:
    """(1 - ratio) W + ratio eps, with W what ``rule`` makes."""

    def fn(*sources: Tensor) -> Tensor:
        # The grown weight without noise. It may be the source itself, which a Compute may overwrite.
        if isinstance(rule, Compute):
            weight = rule.fn(*sources)
        elif isinstance(rule, Zeros):
            weight = sources[0].new_zeros(shape)
        else:
            weight = sources[0]

        # Some rows at a time: float64 copies of a whole embedding would take twice its memory.
        rng = generator(seed, "noise", name)
        for rows in weight.split(ROWS):
            eps = torch.empty(rows.shape)
            eps.normal_(0.0, std, generator=rng)
            blended = (1 - ratio) * rows.double() + ratio * eps.double()
            rows.copy_(blended)
        return weight

    inner = f", {rule.note}" if isinstance(rule, Compute) else ""
    return Compute(rule.sources, fn, f"noise {ratio:g}{inner}")
