"""The mask of G_random: what a grown model's new outputs are multiplied by while training raises it from 0 to 1.

Paper, eqs. 21, 27 and 34-36: widthwise a mask on the new outputs of the embedding and of every linear; depthwise
one on what the attention and the SwiGLU of a new layer add to the residual stream. Masked outputs are the outputs of
scaled weights, so that a masked model can be written down as an ordinary one at any time.
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


def kept_outputs(source: Model, target: Model, layer_map: tuple[int, ...] | None) -> dict[str, Tensor]:
    """Module name -> 1 at the outputs that the source had and 0 at the new ones, float32 [d_out]; [1] for a whole
    sub-block of a new layer."""
    import torch

    new = new_outputs(replace(source, n_layers=target.n_layers), target)
    kept = {name.removesuffix(".weight"): (~mask).float() for name, mask in new.items()}
    for layer in new_layers(layer_map, source.n_layers) if layer_map else []:
        kept |= {f"layers.{layer}.{block}": torch.zeros(1) for block in SUB_BLOCKS}
    return kept


def folding(
    source: Model, target: Model, layer_map: tuple[int, ...] | None, c: float
) -> Callable[[str, Tensor], Tensor]:
    """A function (tensor name, tensor) -> the tensor of the ordinary model that computes what mask ``c`` computes."""
    kept = kept_outputs(source, target, layer_map)

    def fold(name: str, tensor: Tensor) -> Tensor:
        keep = kept.get(name.removesuffix(".weight"))
        if keep is not None:
            scale = keep + c * (1 - keep)
            tensor = tensor * (scale if name == "tok_embeddings.weight" else scale[:, None])
        block = name.rpartition(".")[0].rpartition(".")[0]
        return tensor * c if name.endswith(BLOCK_OUTPUTS) and block in kept else tensor

    return fold
