"""Shrink, zero-pad, perturb: the source's weights made smaller, beside zeros, under the noise of a new model.

arXiv 2411.07340 ("Warmstarting for Scaling Language Models") and 2605.13405 ("When is Warmstarting Effective for
Scaling Language Models?"). Taken from their abstracts and their experiments (Neeratyoy/warmstarting_exps): a tensor is
padded with zeros after its last row and column; it is shrunk to 0.4 of itself; the larger model, all of it, is
perturbed with its own initialization, so that a factor of 0 would leave a model from scratch.

OURS, for neither says it in what could be read: norms and biases keep what they have, and begin beside it as always;
heads stay whole, a query head beside those that share its keys, where theirs would be cut by a padding at the end; and
the initialization is that of ``model.init``, theirs that of muP, whose rates by tensor there are none of here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from stackgrow.growth.draw import draw, generator
from stackgrow.growth.rules import Alias, Compute, GrowthError, Moment, Rule, Rules
from stackgrow.growth.width import AXES, check_widths, kept_channels, kind
from stackgrow.recipe.keys import Model

if TYPE_CHECKING:  # a plan checks a growth by its rules, and needs no torch for that
    from torch import Tensor

ROWS = 4096  # added in float64 at a time


def shrink_rules(
    source: Model,
    target: Model,
    seed: int,
    moment: Moment | None = None,
    shrink_factor: float = 0.4,
    perturbation: float = 1.0,
) -> Rules:
    """W' = shrink_factor [[W, 0], [0, 0]] + perturbation E for the embedding, the head and every linear, E drawn like
    the target's initialization; mu' = [mu, 1], b' = [b, 0]. In float64, then rounded. GrowthError where heads or
    norm_eps change."""
    check_widths(source, target)
    _check_kept(source, target)
    kept = kept_channels(source, target)
    have, want = source.tensors(), target.tensors()
    targets: dict[str, Rule] = {}
    for name, shape in want.items():
        places = [kept[axis] for axis in AXES[kind(name)]]
        if len(shape) == 2:
            make = _shrunk(
                name, places, target, seed, moment, shrink_factor, perturbation
            )
            targets[name] = Compute((name,), make, "shrink, pad, perturb")
        elif have[name] == shape:
            targets[name] = Alias(name)
        else:
            make = _padded(name, places[0], target, moment)
            targets[name] = Compute((name,), make, "pad")
    return Rules(targets, have, want)


def _check_kept(source: Model, target: Model) -> None:
    if source.norm_eps != target.norm_eps:
        raise GrowthError(
            f'"shrink" keeps norm_eps: {source.norm_eps:g}, not {target.norm_eps:g}'
        )
    if source.head_dim != target.head_dim:
        raise GrowthError(
            f'"shrink" keeps the head width: {source.head_dim} -> {target.head_dim} would pad inside of heads; use '
            f"{target.dim // source.head_dim} heads for dim {target.dim}"
        )


def _shrunk(
    name: str,
    places: list[list[int]],
    target: Model,
    seed: int,
    moment: Moment | None,
    shrink_factor: float,
    perturbation: float,
) -> Callable[[Tensor], Tensor]:
    """A matrix; ``places`` are those of the source's rows and columns in the target."""
    shape = target.tensors()[name]
    power = moment.power if moment else 1

    def fn(weight: Tensor) -> Tensor:
        import torch

        rows, columns = map(torch.tensor, places)
        wide = weight.new_zeros(shape)
        wide[rows[:, None], columns] = weight
        if moment:  # which knows no noise
            return wide.mul_(shrink_factor**power)

        # Some rows at a time: float64 copies of a whole embedding would take twice its memory.
        noise = draw(name, shape, target, generator(seed, "perturb", name))
        for some, fresh in zip(wide.split(ROWS), noise.split(ROWS), strict=True):
            some.copy_(shrink_factor * some.double() + perturbation * fresh.double())
        return wide

    return fn


def _padded(
    name: str, places: list[int], target: Model, moment: Moment | None
) -> Callable[[Tensor], Tensor]:
    """A norm as [mu, 1], a bias as [b, 0]; of a moment, 0 beside it."""
    shape = target.tensors()[name]
    is_norm = not name.endswith(".bias")

    def fn(vector: Tensor) -> Tensor:
        wide = vector.new_zeros(shape)
        if is_norm and not moment:
            wide += 1
        wide[places] = vector
        return wide

    return fn
