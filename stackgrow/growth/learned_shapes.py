"""G_learn (LiGO) before anything is learned: where it is defined, its matrices' shapes, what it costs. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from stackgrow.growth.rules import GrowthError
from stackgrow.growth.width import AXES, check_widths, kept_channels, kind
from stackgrow.recipe.keys import Model

LAYER_KINDS = tuple(name for name in AXES if name not in ("tok_embeddings", "norm", "output"))
CHANNELS = {"emb": "stream", "q": "query", "k": "key", "v": "key", "mlp": "ffn"}  # of each B, in the words of AXES


def check_learned(source: Model, target: Model) -> None:
    """Raise GrowthError unless G_learn is defined between the two."""
    check_widths(source, replace(target, n_layers=source.n_layers))
    kept_channels(source, target)
    if target.n_layers < source.n_layers:
        raise GrowthError(f"growth adds layers: {target.n_layers} are fewer than the source's {source.n_layers}")
    if not (wider(source, target) or target.n_layers > source.n_layers):
        raise GrowthError("nothing grows: the target has the source's layers and widths")


def wider(source: Model, target: Model) -> bool:
    return any(getattr(source, key) != getattr(target, key) for key in ("dim", "n_heads", "kv_heads", "ffn_dim"))


def shapes(source: Model, target: Model) -> dict[str, dict[str, tuple[int, int]]]:
    """{"widths": {name: shape of B}, "depths": {weight type: shape of D}}. A direction that does not grow has no
    matrices, as in the paper, whose depthwise G_learn (eqs. 41-42) has no B and whose widthwise one no D."""
    sizes = [
        {"stream": m.dim, "query": m.dim, "key": m.kv_heads * m.head_dim, "ffn": m.ffn_dim} for m in (target, source)
    ]
    widths = {name: (sizes[0][axis], sizes[1][axis]) for name, axis in CHANNELS.items()}
    depths = dict.fromkeys(LAYER_KINDS, (target.n_layers, source.n_layers))
    return {
        "widths": widths if wider(source, target) else {},
        "depths": depths if target.n_layers != source.n_layers else {},
    }


def matrix_names(parts: Mapping[str, Mapping[str, object]]) -> dict[str, tuple[str, str]]:
    """{name in a checkpoint: (part, name in it)}, such as depths.attention_wq: ("depths", "attention.wq")."""
    return {f"{part}.{name.replace('.', '_')}": (part, name) for part, names in parts.items() for name in names}


def parameters(source: Model, target: Model) -> int:
    """How many numbers are learned."""
    return sum(math.prod(shape) for part in shapes(source, target).values() for shape in part.values())


def mapping_flops(source: Model, target: Model) -> int:
    """Matrix products of one forward and backward pass through the maps, at 2 per multiplication and addition.

    For W [r, c] of the source and W' [R, C] of the target, W B_in^T costs 2 r c C, and as much again for the gradient
    of B_in, W being frozen; B_out (W B_in^T) costs 2 R r C, and twice as much again for its two gradients. Mixing a
    weight type's l layers into L costs 2 L l R C, as much again for the gradient of D, and once more, where
    widths are learned, for that of what is mixed. What makes wo's B_o of B_V is left out: it is no matrix product.
    """
    total, wanted, wide = 0, target.tensors(), wider(source, target)
    for name, (r, *columns) in source.tensors().items():
        (R, *wanted_columns), in_layer = wanted[name], kind(name) in LAYER_KINDS
        c, C = math.prod(columns), math.prod(wanted_columns)
        if wide and columns:
            total += 2 * (2 * r * c * C) + (3 * (2 * R * r * C) if in_layer else 0)  # the vocabulary does not grow
        elif wide:
            total += 2 * (2 * R * r)
        if in_layer and target.n_layers != source.n_layers:
            total += (3 if wide else 2) * (2 * target.n_layers * R * C)
    return total
