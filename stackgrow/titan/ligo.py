"""G_learn (LiGO) in training: a Llama whose weights are learned linear maps of a frozen, smaller one's.

What is trained, sharded by FSDP2 and saved are the maps alone. Every rank holds the source's weights, read from its
sealed checkpoint on every start, and makes the target's in each forward pass: 4 bytes times the parameters of both,
and as much again for the target's gradients. The maps are float32 throughout; the target computes in the stage's
precision, as under FSDP2, and not in autocast.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.func import functional_call
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3.infra.parallelize import disable_fsdp_gradient_division
from torchtitan.protocols.model import BaseModelArgs, ModelProtocol

from stackgrow.checkpoint.verified import read_sealed
from stackgrow.growth.learned import initial_network, widen, with_output
from stackgrow.growth.learned_shapes import matrix_names, shapes
from stackgrow.growth.width import kind, tensor_name
from stackgrow.plan.stages import LearnStage
from stackgrow.recipe.keys import Model
from stackgrow.titan.model import Llama, LlamaArgs, model_args, sum_on_gloo
from stackgrow.titan.names import titan_name
from stackgrow.titan.shards import shard_of


@dataclass
class LigoArgs(BaseModelArgs):
    """The two models, the sealed checkpoint of the source, and the precision of the target's matrix products."""

    source: Model | None = None
    target: Model | None = None
    maps: str = "paper"  # which are trained: growth/learned_shapes.py
    checkpoint: str = ""
    seed: int = 0
    precision: str = "float32"
    llama: LlamaArgs = field(
        default_factory=LlamaArgs
    )  # the target, as torchtitan has it

    def update_from_config(self, job_config: JobConfig, **kwargs: Any) -> None:
        self.llama.update_from_config(job_config, **kwargs)
        self.precision = job_config.training.mixed_precision_param

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        assert isinstance(model, LigoLlama)
        learned = sum(parameter.numel() for parameter in model.parameters())
        _, flops = self.llama.get_nparams_and_flops(model.skeleton, seq_len)
        return learned, flops


def ligo_args(stage: LearnStage, source: Path) -> LigoArgs:
    train = stage.train
    return LigoArgs(
        source=stage.source,
        target=stage.model,
        maps=stage.maps,
        checkpoint=str(source),
        seed=stage.seed,
        llama=model_args(
            stage.model,
            stage.seed,
            attention=train.attention,
            loss_chunk=train.loss_chunk,
        ),
    )


class LigoLlama(ModelProtocol):
    """Computes what the target does with the weights that ``growth.learned.learned_rules`` would fold."""

    def __init__(self, args: LigoArgs):
        super().__init__(args)
        assert args.source is not None
        assert args.target is not None
        self.args = args
        self.source = args.source
        self.target = args.target
        self.widths = nn.ParameterDict()
        self.depths = nn.ParameterDict()
        needed = shapes(self.source, self.target, args.maps)
        self.names = matrix_names(needed)
        for stored, (part, name) in self.names.items():
            matrices = self.widths if part == "widths" else self.depths
            matrices[stored.removeprefix(f"{part}.")] = nn.Parameter(
                torch.empty(needed[part][name])
            )
        with torch.device("meta"):
            skeleton = Llama(args.llama)
        # Neither is a part of the module: the target's weights are made, not kept, and the source's are not trained.
        self.__dict__["skeleton"] = skeleton
        self.frozen: dict[str, Tensor] = {}

    @torch.no_grad()
    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        start = initial_network(
            self.source, self.target, self.args.seed, self.args.maps
        )
        parameters = dict(self.named_parameters())
        for stored, (part, name) in self.names.items():
            shard = shard_of(parameters[stored])
            shard.local.copy_(getattr(start, part)[name][shard.slices])
        device = next(iter(parameters.values())).device
        whole = read_sealed(Path(self.args.checkpoint), self.source.tensors())
        self.frozen = {
            name: weight.to(device, torch.float32) for name, weight in whole.items()
        }
        with torch.device(device):
            self.freqs_cis = self.skeleton._precompute_freqs_cis()

    def forward(self, tokens: Tensor, **inputs: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False):
            precision = TORCH_DTYPE_MAP[self.args.precision]
            state = {
                titan_name(name): weight.to(precision)
                for name, weight in self.target_weights().items()
            }
            state["freqs_cis"] = self.freqs_cis
            return functional_call(self.skeleton, state, (tokens,), inputs, strict=True)

    def target_weights(self) -> dict[str, Tensor]:
        """Every weight of the target, in float32: the source's widened (eqs. 37-40), then its layers mixed (eqs.
        41-42). Fewer layers are widened so than if they were mixed first, as in folding."""
        matrices = dict(self.named_parameters())
        network: dict[str, dict[str, Tensor]] = {"widths": {}, "depths": {}}
        for stored, (part, name) in self.names.items():
            network[part][name] = matrices[stored]
        widths = with_output(network["widths"], self.source, self.target)
        wide = {
            name: widen(name, weight, widths) for name, weight in self.frozen.items()
        }
        mixed: dict[str, Tensor] = {}
        for weight_type, D in network[
            "depths"
        ].items():  # D [L, l], L layers of the target, l of the source
            source_names = [
                tensor_name(j, weight_type) for j in range(self.source.n_layers)
            ]
            stacked = torch.stack([wide[name] for name in source_names])  # [l, ...]
            layers = (D @ stacked.flatten(1)).view(-1, *stacked.shape[1:])  # [L, ...]
            for i, weight in enumerate(layers.unbind()):
                mixed[tensor_name(i, weight_type)] = weight

        weights = {}
        for name in self.target.tensors():
            is_mixed = kind(name) in network["depths"]
            weights[name] = mixed[name] if is_mixed else wide[name]
        return weights


def parallelize_ligo(
    model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig
) -> nn.Module:
    """FSDP2, or HSDP, over the maps as one unit: they are small. checks.py refuses what else torchtitan offers."""
    if parallel_dims.fsdp_enabled:
        names = (
            ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
        )
        policy = MixedPrecisionPolicy(
            reduce_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_reduce]
        )
        fully_shard(model, mesh=parallel_dims.get_mesh(names), mp_policy=policy)
        disable_fsdp_gradient_division(model)
        sum_on_gloo(model)
    return model
