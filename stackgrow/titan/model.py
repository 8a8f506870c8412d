"""The Llama-2-style model of a recipe, built from torchtitan's Llama 3 with the recipe's own numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3 import Transformer, TransformerModelArgs, parallelize_llama
from torchtitan.models.llama3.model.args import RoPEScalingArgs

from stackgrow.growth.draw import draw, generator
from stackgrow.recipe import Model
from stackgrow.titan.shards import shard_of

WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # put into names by torch.compile and recomputation


@dataclass
class LlamaArgs(TransformerModelArgs):
    """torchtitan's arguments, and how the weights are drawn."""

    init: str = "paper"
    seed: int = 0


def model_args(model: Model, seed: int) -> LlamaArgs:
    """torchtitan's arguments for exactly this geometry.

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
    )


class Llama(Transformer):
    """torchtitan's Llama, initialized alike on every layout.

    torchtitan draws each rank's shard from that rank's generator, so that weights depend on the number of ranks.
    Here every tensor has its own generator, seeded by the recipe's seed and the tensor's name; a rank draws the
    whole tensor on the CPU and keeps its piece.
    """

    model_args: LlamaArgs
    freqs_cis: Tensor

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        with torch.device(buffer_device or self.freqs_cis.device):
            self.freqs_cis = self._precompute_freqs_cis()
        for name, parameter in self.named_parameters():
            shard, name = shard_of(parameter), plain_name(name)
            whole = draw(name, shard.shape, self.model_args, generator(self.model_args.seed, name))
            shard.local.copy_(whole[shard.slices])


def plain_name(name: str) -> str:
    """The parameter's name without what torch.compile and activation checkpointing insert."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def parallelize(model: Any, parallel_dims: ParallelDims, job_config: JobConfig) -> nn.Module:
    """torchtitan's parallelization, with FSDP told to sum on gloo, which has no pre-multiplied sum."""
    model = parallelize_llama(model, parallel_dims, job_config)
    if torch.distributed.get_backend() == "gloo":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
    return model
