"""The mask of G_random: what a grown model's new outputs are multiplied by while training raises it from 0 to 1.

Paper, eqs. 21, 27 and 34-36: widthwise a mask on the new outputs of the embedding and of every linear; depthwise
one on what the attention and the SwiGLU of a new layer add to the residual stream. Masked outputs are the outputs of
scaled weights, so that a masked model can be written down as an ordinary one at any time.

The official code (tongxuluo/prts) differs: depthwise it masks the whole block, y c + x (1 - c); widthwise it raises
three masks one after the other, of the SwiGLU, the stream and the queries, keys and values, and leaves a norm's weights
unscaled, multiplying what it returns by sqrt(sum of the mask) / sqrt(D), which is alpha at first and 1 in the end. Its
``grow_step``, how long each takes, is 5000 optimizer steps by default. Here it is as in the equations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from stackgrow.growth.zero import BLOCK_OUTPUTS, new_layers, new_outputs
from stackgrow.recipe.keys import Model

if TYPE_CHECKING:
    from torch import Tensor

SUB_BLOCKS = ("attention", "feed_forward")


def kept_outputs(
    source: Model, target: Model, layer_map: tuple[int, ...] | None
) -> dict[str, Tensor]:
    """Module name -> 1 at the outputs that the source had and 0 at the new ones, float32 [d_out]; [1] for a whole
    sub-block of a new layer."""
    import torch

    kept = {}
    for name, is_new in new_outputs(
        replace(source, n_layers=target.n_layers), target
    ).items():
        kept[name.removesuffix(".weight")] = (~is_new).float()
    layers = new_layers(layer_map, source.n_layers) if layer_map else []
    for layer in layers:
        for block in SUB_BLOCKS:
            kept[f"layers.{layer}.{block}"] = torch.zeros(1)
    return kept


def folding(
    source: Model, target: Model, layer_map: tuple[int, ...] | None, c: float
) -> Callable[[str, Tensor], Tensor]:
    """A function (tensor name, tensor) -> the tensor of the ordinary model that computes what mask ``c`` computes."""
    kept = kept_outputs(source, target, layer_map)

    def fold(name: str, tensor: Tensor) -> Tensor:
        module = name.rpartition(".")[0]
        if module in kept:
            scale = kept[module] + c * (1 - kept[module])
            is_by_columns = name == "tok_embeddings.weight" or tensor.dim() == 1
            tensor = tensor * (scale if is_by_columns else scale[:, None])
        block = module.rpartition(".")[0]
        if name.endswith(BLOCK_OUTPUTS) and block in kept:
            tensor = tensor * c
        return tensor

    return fold
