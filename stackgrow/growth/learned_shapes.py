"""G_learn (LiGO) before anything is learned: where it is defined, its matrices' shapes, what it costs. No torch.

l, L layers of source and target; [r, c] a weight of the source and [R, C] that of the target.

``maps`` says which matrices are trained. "paper": a direction that does not grow has none, as in the paper, whose
depthwise G_learn (eqs. 41-42) has no B and whose widthwise one (eqs. 37-40) no D. "official": all of them in either
direction, those of one that does not grow from the identity, as the official code has it (tongxuluo/prts).
That code also cuts the joined matrix of queries, keys and values in thirds, where its model has those of each head lie
together (lit_gpt/model.py), so that its Q, K and V maps act on thirds of the heads. Here they are those of eq. 38.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from stackgrow.growth.rules import GrowthError
from stackgrow.growth.width import AXES, check_widths, kept_channels, kind
from stackgrow.recipe.keys import Model

CHANNELS = {
    "emb": "stream",
    "q": "query",
    "k": "key",
    "v": "key",
    "mlp": "ffn",
}  # of each B, in the words of AXES


def check_learned(source: Model, target: Model) -> None:
    """Raise GrowthError unless G_learn is defined between the two."""
    wide = replace(target, n_layers=source.n_layers)
    check_widths(source, wide)
    kept_channels(source, target)  # raises where heads do not fit
    if target.n_layers < source.n_layers:
        raise GrowthError(
            f"growth adds layers: {target.n_layers} are fewer than the source's {source.n_layers}"
        )
    if not (wider(source, target) or target.n_layers > source.n_layers):
        raise GrowthError(
            "nothing grows: the target has the source's layers and widths"
        )


def wider(source: Model, target: Model) -> bool:
    return any(
        getattr(source, key) != getattr(target, key)
        for key in ("dim", "n_heads", "kv_heads", "ffn_dim")
    )


def learns_widths(source: Model, target: Model, maps: str) -> bool:
    return maps == "official" or wider(source, target)


def learns_depths(source: Model, target: Model, maps: str) -> bool:
    return maps == "official" or target.n_layers != source.n_layers


def shapes(
    source: Model, target: Model, maps: str = "paper"
) -> dict[str, dict[str, tuple[int, int]]]:
    """{"widths": {name: shape of B}, "depths": {weight type: shape of D}}, of those that ``maps`` has."""
    small = _channel_counts(source)
    large = _channel_counts(target)
    wanted: dict[str, dict[str, tuple[int, int]]] = {"widths": {}, "depths": {}}
    if learns_widths(source, target, maps):
        for name, axis in CHANNELS.items():
            wanted["widths"][name] = (large[axis], small[axis])
    if learns_depths(source, target, maps):
        for name in layer_kinds(source):
            wanted["depths"][name] = (target.n_layers, source.n_layers)
    return wanted


def layer_kinds(model: Model) -> list[str]:
    """The kinds of tensors in a layer, whose layers are mixed."""
    return [kind(name) for name in model.layer_tensors()]


def _channel_counts(model: Model) -> dict[str, int]:
    """By the words of ``AXES``, the vocabulary aside."""
    return {
        "stream": model.dim,
        "query": model.query_width,
        "key": model.kv_heads * model.head_dim,
        "ffn": model.ffn_dim,
    }


def matrix_names(
    parts: Mapping[str, Mapping[str, object]],
) -> dict[str, tuple[str, str]]:
    """{name in a checkpoint: (part, name in it)}, such as depths.attention_wq: ("depths", "attention.wq")."""
    stored = {}
    for part, names in parts.items():
        for name in names:
            stored[f"{part}.{name.replace('.', '_')}"] = (part, name)
    return stored


def parameters(source: Model, target: Model, maps: str = "paper") -> int:
    """How many numbers are learned."""
    total = 0
    for matrices in shapes(source, target, maps).values():
        total += sum(math.prod(shape) for shape in matrices.values())
    return total


def mapping_flops(source: Model, target: Model, maps: str = "paper") -> int:
    """Matrix products of one forward and backward pass through the maps, at 2 per multiplication and addition.

    W B_in^T costs 2 r c C, and as much again for the gradient of B_in, W being frozen; B_out (W B_in^T) costs 2 R r C,
    and twice as much again for its two gradients. Mixing a weight type's l layers into L costs 2 L l R C, as much again
    for the gradient of D, and once more, where widths are learned, for that of what is mixed. What makes wo's B_o of
    B_V is left out: it is no matrix product.
    """
    widens = learns_widths(source, target, maps)
    deepens = learns_depths(source, target, maps)
    after = target.tensors()
    total = 0
    for name, shape in source.tensors().items():
        r = shape[0]
        R = after[name][0]
        c = C = 1  # of a norm or a bias, which has no columns
        is_vector = len(shape) == 1
        if not is_vector:
            c = shape[1]
            C = after[name][1]
        in_layer = kind(name) in layer_kinds(source)
        is_widened = AXES[kind(name)] != ("head",)

        # Widening: W B_in^T with its one gradient, then B_out times that with two.
        if widens and is_vector and is_widened:
            total += 2 * (2 * R * r)
        elif widens and not is_vector:
            total += 2 * (2 * r * c * C)
            if in_layer:  # the vocabulary does not grow
                total += 3 * (2 * R * r * C)

        # Mixing layers: forward, the gradient of D, and that of what is mixed where something below it is learned.
        if deepens and in_layer:
            passes = 3 if widens else 2
            total += passes * (2 * target.n_layers * R * C)
    return total
