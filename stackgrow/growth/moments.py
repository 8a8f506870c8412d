"""AdamW's state at growth: the moments follow the weights by the same map, or by a part of it.

All operators but G_learn make an entry of the target from at most one of the source, W'_i = c_i W_s(i) + b_i, where
b_i is what is new. Then, for "copy",

    exp_avg'_i = c_i exp_avg_s(i),    exp_avg_sq'_i = c_i^2 exp_avg_sq_s(i),    and 0 where nothing is copied:

c^2 because exp_avg_sq is the mean of a square, so that a copy's next step, lr exp_avg / sqrt(exp_avg_sq), is its
source's in size, for every c above 0 (eps aside). These are the moments of the map, not of the gradients that the
grown model will see: a split also divides what flows back to a copy, by shares that differ between its readers.
"asymmetric" (as SPARKLING does to copied channels, arXiv 2602.02472) lets the first copy of each entry keep its
moments and gives all others 0, so that copies part. Its own split, ``shares = "rms"``, leaves out c: its eq. 24 has
S' = [S, 0], and scaling S brought it nothing. G_learn mixes many entries into one: exp_avg_sq, which knows no
covariances, has no image there.

The step counter, which corrects the bias of moments that began at 0, is one per tensor: the source's, or 0 for a
tensor that copies nothing. New entries of a tensor with old ones are thus not corrected: at betas 0.9 and 0.95 their
first steps have 0.45 to 1.1 times the size of corrected ones, at beta2 = 0.999 up to 6.6 times. A warm-up bounds that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from stackgrow.growth.rules import Alias, Compute, Moment, Rule, Rules, Shape, Zeros

if TYPE_CHECKING:
    from torch import Tensor

OPTIMIZER_STATE = "optimizer.state."  # AdamW's moments and step counters
POWERS = {
    "exp_avg": 1,
    "exp_avg_sq": 2,
    "step": 1,
}  # a step counter goes where the moments go


def with_moments(rules_of: Callable[[Moment | None], Rules], asymmetric: bool) -> Rules:
    """The rules of a growth's weights, ``rules_of(None)``, and of their state in AdamW, as a checkpoint names it."""
    weights = rules_of(None)
    targets = dict(weights.targets)
    dropped = set(weights.dropped)
    source_shapes = dict(weights.source_shapes)
    target_shapes = dict(weights.target_shapes)
    for state, power in POWERS.items():
        rules = rules_of(Moment(power, asymmetric))
        for name, rule in rules.targets.items():
            targets[key(name, state)] = _of_state(rule, state)
        dropped.update(key(name, state) for name in rules.dropped)
        source_shapes.update(_state_shapes(weights.source_shapes, state))
        target_shapes.update(_state_shapes(weights.target_shapes, state))
    return Rules(targets, source_shapes, target_shapes, frozenset(dropped))


def new_entries(rules: Rules, name: str) -> Tensor | None:
    """True where the target's tensor ``name`` has an entry that is new, or copies what one before it copies, too; None
    where it has none. ``rules`` are those of an asymmetric moment, which leave it 0 there."""
    import torch

    rule = rules.targets[name]
    if isinstance(rule, Alias):
        return None
    if isinstance(rule, Zeros):
        return torch.ones(rules.target_shapes[name], dtype=torch.bool)
    ones = [torch.ones(rules.source_shapes[source]) for source in rule.sources]
    return rule.fn(*ones) == 0


def _state_shapes(shapes: Mapping[str, Shape], state: str) -> dict[str, Shape]:
    return {
        key(name, state): () if state == "step" else shape
        for name, shape in shapes.items()
    }


def key(name: str, state: str) -> str:
    """The name in a checkpoint of a tensor's ``state``: exp_avg, exp_avg_sq or step."""
    return f"{OPTIMIZER_STATE}{name}.{state}"


def _of_state(rule: Rule, state: str) -> Rule:
    source = key(rule.sources[0], state)
    if isinstance(rule, Zeros):
        return Zeros(source)
    if isinstance(rule, Compute) and state != "step":
        return replace(rule, sources=(source,))
    return Alias(source)
