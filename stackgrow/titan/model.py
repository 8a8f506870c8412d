"""The Llama-2-style model of a recipe, built from torchtitan's Llama 3 with the recipe's own numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention.flex_attention import BlockMask
from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3 import (
    Transformer,
    TransformerModelArgs,
    parallelize_llama,
)
from torchtitan.models.llama3.model.args import RoPEScalingArgs
from torchtitan.models.llama3.model.model import Attention, FeedForward

from stackgrow.growth.draw import draw, generator
from stackgrow.growth.mask import kept_outputs
from stackgrow.plan.stages import GrowthMask
from stackgrow.recipe.keys import Model
from stackgrow.titan.attention import causal_mask, document_mask, use_flash_attention
from stackgrow.titan.loss import ChunkedHead, chunk_head
from stackgrow.titan.names import stored_name, titan_name
from stackgrow.titan.shards import shard_of

# Blocks of every width that a run grows through are compiled from the same code: 8 are not enough.
torch._dynamo.config.recompile_limit = 64


@dataclass(frozen=True)
class MaskedGrowth:
    """The growth whose new parts a mask covers."""

    source: Model
    target: Model
    layer_map: tuple[int, ...] | None


@dataclass
class LlamaArgs(TransformerModelArgs):
    """torchtitan's arguments and ours."""

    init: str = "paper"  # how the weights are drawn
    seed: int = 0
    attention: str = "sdpa"  # the recipe's train.attention
    loss_chunk: int = 0  # the recipe's train.loss_chunk
    bos_id: int | None = (
        None  # the token that begins documents; given where they are kept apart
    )
    masked: MaskedGrowth | None = None


def model_args(
    model: Model,
    seed: int,
    mask: GrowthMask | None = None,
    attention: str = "sdpa",
    loss_chunk: int = 0,
) -> LlamaArgs:
    """torchtitan's arguments for exactly this geometry; ``mask`` is that of the growth that made the model.

    torchtitan computes the FFN width as ``int(multiplier * int(8 D / 3))``: the half below aims at the middle of the
    interval that truncates to the wanted width. Its RoPE scaling is always on; factor 1 leaves the frequencies alone.
    """
    return LlamaArgs(
        dim=model.dim,
        n_layers=model.n_layers,
        n_heads=model.n_heads,
        n_kv_heads=model.kv_heads,
        vocab_size=model.vocab_size,
        multiple_of=1,
        ffn_dim_multiplier=(model.ffn_dim + 0.5) / int(2 * 4 * model.dim / 3),
        norm_eps=model.norm_eps,
        rope_theta=model.rope_theta,
        rope_scaling_args=RoPEScalingArgs(scaling_factor=1.0),
        init=model.init,
        seed=seed,
        masked=MaskedGrowth(mask.source, model, mask.layer_map) if mask else None,
        attn_type="flex"
        if attention == "flex"
        else "sdpa",  # flash-attn's module stands in the place of sdpa's
        attention=attention,
        loss_chunk=loss_chunk,
    )


class _Masked:
    """A module whose output is multiplied by its buffer ``growth_mask``, [d_out] or [1]."""

    growth_mask: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        return output * self.growth_mask.to(output.dtype)


MASKED = {}  # class of module -> the same, masked
for _plain in (nn.Embedding, nn.Linear, Attention, FeedForward):
    MASKED[_plain] = type(f"Masked{_plain.__name__}", (_Masked, _plain), {})


@dataclass(frozen=True)
class MaskedModule:
    module: nn.Module
    kept: Tensor  # 1 where an output was there before the growth, 0 where it is new


class Llama(Transformer):
    """torchtitan's Llama, initialized alike on every layout.

    torchtitan draws each rank's shard from that rank's generator, so that weights depend on the number of ranks.
    Here every tensor has its own generator, seeded by the recipe's seed and the tensor's name; a rank draws the
    whole tensor on the CPU and keeps its piece.
    """

    model_args: LlamaArgs
    freqs_cis: Tensor

    def __init__(self, args: LlamaArgs):
        super().__init__(args)
        self.masked: list[MaskedModule] = []
        if args.masked:
            self._mask_outputs(args.masked)
        if args.attention == "flash_attn":
            use_flash_attention(self)
        if args.loss_chunk:
            chunk_head(self.output, args.loss_chunk)

    def _mask_outputs(self, growth: MaskedGrowth) -> None:
        with torch.device("cpu"):  # the model itself is built on the meta device
            outputs = kept_outputs(growth.source, growth.target, growth.layer_map)
        for name, kept in outputs.items():
            module = self.get_submodule(titan_name(name))
            module.register_buffer(
                "growth_mask", torch.empty(kept.shape), persistent=False
            )
            module.__class__ = MASKED[
                type(module)
            ]  # a forward hook would be passed over by torch.compile
            self.masked.append(MaskedModule(module, kept))

    def forward(
        self,
        tokens: Tensor,
        attention_masks: BlockMask | None = None,
        positions: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """``tokens`` [B, T] -> logits [B, T, V]; with ``labels`` [B, T], which need ``loss_chunk``, the summed loss."""
        if self.model_args.attn_type == "flex" and attention_masks is None:
            bos_id = self.model_args.bos_id
            if bos_id is None:
                attention_masks = causal_mask(tokens.shape[1], tokens.device)
            else:
                attention_masks = document_mask(tokens, bos_id)
        hidden = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            hidden = layer(hidden, self.freqs_cis, attention_masks, positions)
        hidden = self.norm(hidden)
        if labels is None:
            return self.output(hidden)
        return self.output(hidden, labels)

    @torch.no_grad()
    def set_mask(self, c: float) -> None:
        """Raises the mask of a G_random growth to ``c``: a value in a buffer, so that nothing is compiled anew."""
        for masked in self.masked:
            mask = masked.module.get_buffer("growth_mask")
            mask.copy_(masked.kept + c * (1 - masked.kept))

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        with torch.device(buffer_device or self.freqs_cis.device):
            self.freqs_cis = self._precompute_freqs_cis()
        self.set_mask(1.0)
        for parameter_name, parameter in self.named_parameters():
            name = stored_name(parameter_name)
            shard = shard_of(parameter)
            whole = draw(
                name,
                shard.shape,
                self.model_args,
                generator(self.model_args.seed, name),
            )
            shard.local.copy_(whole[shard.slices])


def parallelize(
    model: Any, parallel_dims: ParallelDims, job_config: JobConfig
) -> nn.Module:
    """torchtitan's parallelization, on gloo too; with torch.compile, the loss inside the head is compiled as well."""
    if isinstance(model.output, ChunkedHead):
        model.output.loss = build_cross_entropy_loss(job_config)
    model = parallelize_llama(model, parallel_dims, job_config)
    sum_on_gloo(model)
    return model


def sum_on_gloo(model: nn.Module) -> None:
    """FSDP is told to sum: gloo has no pre-multiplied sum."""
    if torch.distributed.get_backend() == "gloo":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
