"""Where a rank's piece of a tensor lies in the whole, and fingerprints of tensors that do not depend on sharding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from stackgrow.seal.tensors import hexadecimal, weighted_sum


@dataclass(frozen=True)
class Shard:
    """This rank's piece of a tensor: ``whole[offset : offset + local.shape]`` in every dimension."""

    local: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    owned: bool  # one rank owns each piece: replicas do not

    @property
    def slices(self) -> tuple[slice, ...]:
        pairs = zip(self.offset, self.local.shape, strict=True)
        return tuple(slice(start, start + length) for start, length in pairs)


def shard_of(tensor: Tensor) -> Shard:
    """The piece of ``tensor`` on this rank; a plain tensor is whole everywhere and owned by rank 0."""
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Shard(
            tensor,
            shape,
            offset=(0,) * tensor.dim(),
            owned=torch.distributed.get_rank() == 0,
        )
    mesh = tensor.device_mesh
    _, offset = compute_local_shape_and_global_offset(
        tensor.shape, mesh, tensor.placements
    )
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    is_copy = False
    for position, placement in zip(coordinate, tensor.placements, strict=True):
        if isinstance(placement, Replicate) and position != 0:
            is_copy = True
    return Shard(tensor.to_local(), shape, tuple(offset), owned=not is_copy)


def fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The fingerprint of each tensor, equal for every sharding; collective over all ranks."""
    names = sorted(tensors)
    sums = torch.zeros(len(names), dtype=torch.int64, device=tensors[names[0]].device)
    for i, name in enumerate(names):
        shard = shard_of(tensors[name].detach())
        if shard.owned and shard.local.numel():
            local = shard.local.reshape(
                shard.local.shape or (1,)
            )  # a step counter has no dimension
            sums[i] = weighted_sum(local, shard.shape or (1,), shard.offset or (0,))
    torch.distributed.all_reduce(sums)
    return {
        name: hexadecimal(total)
        for name, total in zip(names, sums.tolist(), strict=True)
    }
