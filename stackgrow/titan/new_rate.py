"""A rate of their own for the parameters that a growth made new, beside old ones in the same tensors (SPARKLING).

torch's AdamW has one rate for a tensor. Its update, weight decay included, is that rate times something which does not
depend on it: the update of new entries is multiplied by the ratio of the two rates, once it has been made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from stackgrow.growth.moments import new_entries
from stackgrow.growth.operators import growth_rules, settings_of
from stackgrow.growth.rules import Moment
from stackgrow.plan.stages import GrowStage
from stackgrow.titan.names import stored_name
from stackgrow.titan.shards import shard_of


@dataclass(frozen=True)
class _Piece:
    parameter: nn.Parameter
    is_new: Tensor  # of this rank's piece of it, bool


class NewParameters:
    """The entries of ``model`` that are new since ``growth``: a byte for each entry of this rank's tensors with any."""

    def __init__(self, model: nn.Module, growth: GrowStage):
        rules = growth_rules(
            growth.operator,
            growth.source,
            growth.target,
            growth.layer_map,
            growth.seed,
            moment=Moment(power=1, asymmetric=True),
            **settings_of(growth),
        )
        self.pieces: list[_Piece] = []
        for parameter_name, parameter in model.named_parameters():
            is_new = new_entries(rules, stored_name(parameter_name))
            if is_new is not None:
                shard = shard_of(parameter.detach())
                piece = is_new[shard.slices].to(shard.local.device)
                self.pieces.append(_Piece(parameter, piece))

    @contextmanager
    def rate_times(self, ratio: float) -> Iterator[None]:
        """Around an optimizer step: what it does to new entries, it does to them ``ratio`` times. Until it has, there
        is a copy of the weights."""
        before = [_local(piece.parameter).clone() for piece in self.pieces]
        yield
        for piece, old in zip(self.pieces, before, strict=True):
            local = _local(piece.parameter)
            more = (local - old).mul_(ratio - 1)
            local.add_(more.mul_(piece.is_new))


def _local(parameter: nn.Parameter) -> Tensor:
    return shard_of(parameter.detach()).local
