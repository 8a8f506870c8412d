"""The model of a recipe, built from torchtitan's Llama 3 with the recipe's own numbers.

What other families have besides stands here: heads of a width of their own, norms of queries and keys, biases, a tied
head. torchtitan's own Qwen 3 is not used: its rotation pairs a head's halves, so that weights, checkpoints and growths
would follow another order by family, and its tied head is a second name of one parameter, which FSDP2 shards twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module
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
from torchtitan.models.llama3.model.model import (
    Attention,
    FeedForward,
    apply_rotary_emb,
    precompute_freqs_cis,
)

from stackgrow.growth.draw import draw, generator
from stackgrow.growth.mask import kept_outputs
from stackgrow.plan.stages import GrowthMask
from stackgrow.recipe.keys import Model
from stackgrow.titan.attention import causal_mask, document_mask, use_flash_attention
from stackgrow.titan.loss import ChunkedHead, chunk_head, tie_head
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

    head_dim: int = 128
    qk_norm: bool = False
    attention_bias: bool = False
    tie_embeddings: bool = False
    init: str = "paper"  # how the weights are drawn
    seed: int = 0
    attention: str = "sdpa"  # the recipe's train.attention
    loss_chunk: int = 0  # the recipe's train.loss_chunk
    bos_id: int | None = (
        None  # the token that begins documents; given where they are kept apart
    )
    masked: MaskedGrowth | None = None

    @property
    def has_own_attention(self) -> bool:
        """Whether torchtitan's attention is not this model's."""
        own_width = self.head_dim * self.n_heads != self.dim
        return own_width or self.qk_norm or self.attention_bias

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """torchtitan's count, whose heads are dim / n_heads wide and whose head has a matrix of its own."""
        parameters = sum(parameter.numel() for parameter in model.parameters())
        embedding = 0 if self.tie_embeddings else self.vocab_size * self.dim
        attention = 2 * self.n_layers * self.n_heads * self.head_dim * seq_len
        return parameters, 6 * (parameters - embedding + attention)


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
    scaling = RoPEScalingArgs(scaling_factor=1.0)
    if model.rope_scaling:
        scaling = RoPEScalingArgs(
            scaling_factor=model.rope_scaling.factor,
            low_freq_factor=model.rope_scaling.low_freq_factor,
            high_freq_factor=model.rope_scaling.high_freq_factor,
            original_max_position_embeddings=model.rope_scaling.original_length,
        )
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
        rope_scaling_args=scaling,
        head_dim=model.head_dim,
        qk_norm=model.qk_norm,
        attention_bias=model.attention_bias,
        tie_embeddings=model.tie_embeddings,
        init=model.init,
        seed=seed,
        masked=MaskedGrowth(mask.source, model, mask.layer_map) if mask else None,
        attn_type="flex"
        if attention == "flex"
        else "sdpa",  # flash-attn's module stands in the place of sdpa's
        attention=attention,
        loss_chunk=loss_chunk,
    )


class OwnAttention(Attention):
    """torchtitan's attention with heads of any width, biases of queries, keys and values (Qwen 2), and norms of
    queries and keys before they are rotated (Qwen 3)."""

    def __init__(self, args: LlamaArgs):
        super().__init__(args)
        self.head_dim = args.head_dim
        queries = self.n_heads * args.head_dim
        keys = self.n_kv_heads * args.head_dim
        self.wq = nn.Linear(args.dim, queries, bias=args.attention_bias)
        self.wk = nn.Linear(args.dim, keys, bias=args.attention_bias)
        self.wv = nn.Linear(args.dim, keys, bias=args.attention_bias)
        self.wo = nn.Linear(queries, args.dim, bias=False)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if args.qk_norm:
            self.q_norm = nn.RMSNorm(args.head_dim, eps=args.norm_eps)
            self.k_norm = nn.RMSNorm(args.head_dim, eps=args.norm_eps)

    def forward(
        self,
        x: Tensor,
        freqs_cis: Tensor,
        attention_masks: BlockMask | None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """``x`` [B, T, D] -> [B, T, D]; under tensor parallel, of this rank's heads."""
        B, T, _ = x.shape
        q = self.wq(x).view(B, T, -1, self.head_dim)
        k = self.wk(x).view(B, T, -1, self.head_dim)
        v = self.wv(x).view(B, T, -1, self.head_dim)
        q = self.q_norm(q)
        k = self.k_norm(k)
        q, k = apply_rotary_emb(q, k, freqs_cis=freqs_cis, positions=positions)
        mask = {"block_mask": attention_masks} if self.attn_type == "flex" else {}
        attended = self.inner_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            enable_gqa=self.enable_gqa,
            **mask,
        )
        heads = attended.transpose(1, 2).contiguous()
        return self.wo(heads.view(B, T, -1))


class _Masked:
    """A module whose output is multiplied by its buffer ``growth_mask``, [d_out] or [1]."""

    growth_mask: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        return output * self.growth_mask.to(output.dtype)


MASKED = {}  # class of module -> the same, masked
for _plain in (nn.Embedding, nn.Linear, Attention, OwnAttention, FeedForward):
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
        if args.has_own_attention:
            for layer in self.layers.values():
                layer.attention = OwnAttention(args)
        self.masked: list[MaskedModule] = []
        if args.masked:
            self._mask_outputs(args.masked)
        if args.attention == "flash_attn":
            use_flash_attention(self)
        if args.loss_chunk:
            chunk_head(self.output, args.loss_chunk)
        if args.tie_embeddings:
            tie_head(self.output, self.tok_embeddings)

    def _precompute_freqs_cis(self) -> Tensor:
        args = self.model_args
        return precompute_freqs_cis(
            args.head_dim, args.max_seq_len, args.rope_theta, args.rope_scaling_args
        )

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
    if parallel_dims.tp_enabled and model.model_args.qk_norm:
        shard_head_norms(model, parallel_dims)
    model = parallelize_llama(model, parallel_dims, job_config)
    # The head reads the embedding's matrix after the embedding is through: it stays gathered for the backward pass.
    if model.model_args.tie_embeddings and isinstance(model.tok_embeddings, FSDPModule):
        model.tok_embeddings.set_reshard_after_forward(False)
    sum_on_gloo(model)
    return model


def shard_head_norms(model: Any, parallel_dims: ParallelDims) -> None:
    """Norms of queries and keys, [B, T, heads, head_dim], see the heads of their rank; their weights are whole, and
    their gradients summed over the ranks."""
    by_heads = SequenceParallel(sequence_dim=2, use_local_output=True)
    for layer in model.layers.values():
        parallelize_module(
            layer.attention,
            parallel_dims.get_mesh("tp"),
            {"q_norm": by_heads, "k_norm": by_heads},
        )


def sum_on_gloo(model: nn.Module) -> None:
    """FSDP is told to sum: gloo has no pre-multiplied sum."""
    if torch.distributed.get_backend() == "gloo":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
