"""The paper's noise: every weight of a grown model blended with a random one, which breaks function preservation."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from stackgrow.growth.draw import generator, paper_std
from stackgrow.growth.rules import Alias, Compute, GrowthError, Moment, Rule, Rules, Shape, Zeros

ROWS = 4096  # blended in float64 at a time


def noisy_rules(rules: Rules, n_layers: int, ratio: float, seed: int, moment: Moment | None = None) -> Rules:
    """W <- (1 - ratio) W + ratio eps for the embedding, the head and every linear of what ``rules`` grows; norms
    are left alone (paper, appendix I.2, eqs. 53-54). ``n_layers`` is the target's. Blended in float64, then rounded.
    With the rules of a ``moment``: that moment's.

    eps ~ N(0, 2 / (5 d_in)), but N(0, 1 / (d_in L^2)) for attention.wo and feed_forward.w2. Raises GrowthError
    unless 0 < ratio <= 1.
    """
    if not 0 < ratio <= 1:
        raise GrowthError(f"the noise ratio {ratio} must be above 0 and at most 1; 0.2 is the paper's")
    shapes = rules.target_shapes

    def noisy(name: str, rule: Rule) -> Rule:
        if moment:
            return rule if isinstance(rule, Zeros) else _shrunk(rule, (1 - ratio) ** moment.power)
        return _blended(name, rule, shapes[name], noise_std(name, shapes[name], n_layers), ratio, seed)

    linears = {name: noisy(name, rule) for name, rule in rules.targets.items() if len(shapes[name]) == 2}
    return replace(rules, targets={**rules.targets, **linears})


def noise_std(name: str, shape: tuple[int, ...], n_layers: int) -> float:
    """As the initialization, but wo has the small noise of w2 too (eq. 53)."""
    if name.endswith("attention.wo.weight"):
        return 1 / (math.sqrt(shape[1]) * n_layers)
    return paper_std(name, shape, n_layers)


def _shrunk(rule: Alias | Compute, factor: float) -> Compute:
    def fn(*sources: Tensor) -> Tensor:
        return (sources[0] if isinstance(rule, Alias) else rule.fn(*sources)).mul_(factor)

    return Compute(rule.sources, fn, f"times {factor:g}")


def _blended(name: str, rule: Rule, shape: Shape, std: float, ratio: float, seed: int) -> Compute:
    def fn(*sources: Tensor) -> Tensor:
        if isinstance(rule, Compute):
            weight = rule.fn(*sources)
        else:
            weight = sources[0] if isinstance(rule, Alias) else sources[0].new_zeros(shape)
        rng = generator(seed, "noise", name)
        for rows in weight.split(ROWS):
            eps = rows.new_empty(rows.shape, dtype=weight.dtype).float().normal_(0.0, std, generator=rng)
            rows.copy_((1 - ratio) * rows.double() + ratio * eps.double())
        return weight

    inner = f", {rule.note}" if isinstance(rule, Compute) else ""
    return Compute(rule.sources, fn, f"noise {ratio:g}{inner}")
