"""G_zero and G_random: the source's parameters beside new ones, which at first leave the function as it was.

Zero weights keep the new outputs of G_zero at zero. Those of G_random are masked by c, which training raises from 0
to 1: ``new_outputs`` and ``new_layers`` say what to mask; the mask itself belongs to the training stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from stackgrow.growth.depth import depth_rules
from stackgrow.growth.draw import draw, generator
from stackgrow.growth.rules import Alias, Compute, GrowthError, Moment, Rule, Rules, Zeros
from stackgrow.growth.width import AXES, check_widths, head_channels, kept_channels, kind, repeats, times
from stackgrow.recipe.keys import Model

if TYPE_CHECKING:  # a plan checks a growth by its rules, and needs no torch for that
    from torch import Tensor

BLOCK_OUTPUTS = ("attention.wo.weight", "feed_forward.w2.weight")


def zero_width_rules(source: Model, target: Model, seed: int, moment: Moment | None = None) -> Rules:
    """G_zero (eqs. 12-19): E' = [E, 0], W' = [[W, A], [0, C]], mu' = [alpha mu, 1]; see ``_padded``."""
    return _padded(source, target, seed, True, moment)


def random_width_rules(source: Model, target: Model, seed: int, moment: Moment | None = None) -> Rules:
    """G_random (eqs. 20-33): E' = [E, random], W' = [[W, A], [B, C]], mu' = [alpha mu, 1]; see ``_padded``."""
    return _padded(source, target, seed, False, moment)


def new_outputs(source: Model, target: Model) -> dict[str, Tensor]:
    """Eqs. 21 and 27: for each embedding and linear whose output has new channels, True at those, which training
    multiplies by c. The head has none: its outputs are the vocabulary."""
    import torch

    kept, masks = kept_channels(source, target), {}
    for name, shape in target.tensors().items():
        if len(shape) == 2:
            made = int(name == "tok_embeddings.weight")
            masks[name] = torch.ones(shape[made], dtype=torch.bool)
            masks[name][kept[AXES[kind(name)][made]]] = False
    return {name: mask for name, mask in masks.items() if mask.any()}


def zero_depth_rules(layer_map: Sequence[int], source: Model, target: Model) -> Rules:
    """G_zero depthwise (A.4): target layer i copies source layer ``layer_map[i]``, and a layer of ``new_layers``
    adds nothing to the residual stream, its attention.wo and feed_forward.w2 being zero."""
    return _with_new(layer_map, source, target, BLOCK_OUTPUTS, lambda name, like: Zeros(like))


def random_depth_rules(
    layer_map: Sequence[int], source: Model, target: Model, seed: int, moment: Moment | None = None
) -> Rules:
    """G_random depthwise (eqs. 34-36): the layers of ``new_layers`` are drawn like the initialization, and training
    masks what their attention and SwiGLU add to the residual stream; the others are copies."""

    def drawn(name: str, like: str) -> Rule:
        def fn(replaced: Tensor) -> Tensor:  # in the dtype of the layer that it replaces
            shape = tuple(replaced.shape)
            return draw(name, shape, target, generator(seed, "new", name)).to(replaced.dtype)

        return Zeros(like) if moment else Compute((like,), fn, "random instead of")

    return _with_new(layer_map, source, target, tuple(source.layer_tensors()), drawn)


def new_layers(layer_map: Sequence[int], n_source: int) -> list[int]:
    """The target layers that are new: all but the first copy of each source layer. GrowthError unless those first
    copies are all the source layers in their order, without which no choice of new layers preserves the function."""
    new = [i for i, layer in enumerate(layer_map) if layer in layer_map[:i]]
    old = [layer for i, layer in enumerate(layer_map) if i not in new]
    if old != list(range(n_source)):
        raise GrowthError(
            f"layer map {list(layer_map)}: without repetitions it must name the source layers 0 to {n_source - 1} in "
            f"order, for the function to be preserved; it names {old}"
        )
    return new


def _with_new(
    layer_map: Sequence[int],
    source: Model,
    target: Model,
    tensors: Sequence[str],
    make: Callable[[str, str], Rule],
) -> Rules:
    rules = depth_rules(layer_map, source, target)
    new = [f"layers.{i}.{tensor}" for i in new_layers(layer_map, source.n_layers) for tensor in tensors]
    made = {name: make(name, rules.targets[name].sources[0]) for name in new}
    return replace(rules, targets={**rules.targets, **made})


def _padded(source: Model, target: Model, seed: int, zero: bool, moment: Moment | None) -> Rules:
    """A, B, C are drawn like the initialization, alpha = sqrt(d)/sqrt(D), and a norm's new entries are 1, as initially.

    head_dim may grow by a whole factor n: pair p becomes pair n p, whose frequency in the wider head is the same,
    and W_Q is multiplied by sqrt(n), because scores are divided by sqrt(head_dim). A new query head that shares an
    old key/value head would pass on the mean of its values: the columns of wo that read it start at zero.

    The paper's RMSNorm has no epsilon; with one, [x, 0] meets eps D / d. The function is preserved exactly where
    target.norm_eps = source.norm_eps d / D, and otherwise as far as mean(x^2) exceeds eps.
    """
    check_widths(source, target)
    exact = source.norm_eps * source.dim / target.dim
    if target.norm_eps != source.norm_eps and not math.isclose(target.norm_eps, exact, rel_tol=1e-6):
        raise GrowthError(
            f"norm_eps {source.norm_eps:g} -> {target.norm_eps:g}: keep it, as the paper does, or preserve the "
            f"function exactly with {exact:g} (source norm_eps * {source.dim} / {target.dim})"
        )
    kept, have, want = kept_channels(source, target), source.tensors(), target.tensors()
    targets: dict[str, Rule] = {}
    for name, shape in want.items():
        places = [kept[axis] for axis in AXES[kind(name)]]
        fn = _pad(name, places, source, target, seed, zero, moment)
        pad = Compute((name,), fn, f"pad, {'zero' if zero or moment else 'random'}")
        targets[name] = Alias(name) if have[name] == shape else pad
    return Rules(targets, have, want)


def _pad(
    name: str, places: list[list[int]], source: Model, target: Model, seed: int, zero: bool, moment: Moment | None
) -> Callable[[Tensor], Tensor]:
    """``places`` are those of the source's rows, and columns, in the target."""
    tensor, power = kind(name), moment.power if moment else 1
    alpha = (math.sqrt(source.dim) / math.sqrt(target.dim)) ** power
    n = target.head_dim // source.head_dim

    def fn(weight: Tensor) -> Tensor:
        import torch

        shape = target.tensors()[name]
        if moment:
            whole = weight.new_zeros(shape)
        else:
            whole = draw(name, shape, target, generator(seed, "new", name)).to(weight.dtype)
        if whole.dim() == 1:
            whole[places[0]] = times(weight, alpha)
            return whole
        rows, columns = map(torch.tensor, places)
        if zero:
            whole[:, ... if tensor == "tok_embeddings" else columns] = 0
        if tensor == "attention.wo":
            whole[:, _sharing_channels(source, target)] = 0
        if tensor == "attention.wq" and n > 1:
            weight = times(weight, math.sqrt(n) ** power)
        whole[rows[:, None], columns] = weight
        return whole

    return fn


def _sharing_channels(source: Model, target: Model) -> list[int]:
    """The channels of new query heads that share an old key/value head."""
    r, R = repeats(source), repeats(target)
    heads = [g * R + t for g in range(source.kv_heads) for t in range(r, R)]
    return head_channels(heads, range(target.head_dim), target.head_dim)
