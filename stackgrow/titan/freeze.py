"""MSLT: for the first part of a stage only the top layers are trained (arXiv 2011.13635).

A frozen parameter asks for no gradient: the backward pass ends above it, the norm of the gradient is that of the
trained ones, and AdamW passes it over, weight decay included, so that its bits and its moments stay.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule

from stackgrow.plan.stages import TrainStage
from stackgrow.titan.names import EMBEDDING, layer_name, stored_name


def begin_frozen(model: nn.Module) -> None:
    """To be called once, while every parameter is trained: FSDP then takes from them the types in which it reduces
    gradients, and would have none for a layer that it first sees frozen."""
    if isinstance(model, FSDPModule):
        model._get_fsdp_state()._lazy_init()


def freeze(model: nn.Module, stage: TrainStage, step: int) -> None:
    """Makes trainable what optimizer step ``step`` trains: all, or the layers from ``stage.freeze.layers`` on with
    the last norm and the head."""
    frozen: set[str] = set()
    if step <= stage.frozen_steps and stage.frozen_layers:
        frozen = {EMBEDDING, *map(layer_name, range(stage.frozen_layers))}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_module_of(stored_name(name)) not in frozen)


def _module_of(name: str) -> str:
    """``layers.3.attention.wq.weight`` -> ``layers.3``; ``norm.weight`` -> ``norm``."""
    parts = name.split(".")
    if parts[0] == "layers":
        return layer_name(int(parts[1]))
    return parts[0]
