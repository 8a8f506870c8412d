"""Where a rank's piece of a tensor lies in the whole, and fingerprints of tensors that do not depend on sharding."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

CHUNK = 1 << 22  # elements hashed at a time: bounds the memory of a fingerprint to a few times 32 MB
_MIX = 0x9E3779B97F4A7C15 - (1 << 64)  # golden-ratio multiplier of splitmix64, as a signed 64-bit number


@dataclass(frozen=True)
class Shard:
    """This rank's piece of a tensor: ``whole[offset : offset + local.shape]`` in every dimension."""

    local: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    owned: bool  # one rank owns each piece: replicas do not

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.local.shape, strict=True))


def shard_of(tensor: Tensor) -> Shard:
    """The piece of ``tensor`` on this rank; a plain tensor is whole everywhere and owned by rank 0."""
    if not isinstance(tensor, DTensor):
        zero = (0,) * tensor.dim()
        return Shard(tensor, tuple(tensor.shape), zero, torch.distributed.get_rank() == 0)
    mesh, placements = tensor.device_mesh, tensor.placements
    _, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    replicas = [c for c, p in zip(coordinate, placements, strict=True) if isinstance(p, Replicate)]
    return Shard(tensor.to_local(), tuple(tensor.shape), tuple(offset), not any(replicas))


def fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """A 64-bit fingerprint of each float32 tensor's bits, equal for every sharding; collective over all ranks.

    The sum, modulo 2^64, of each element's bits times an odd number drawn from its place in the whole tensor: sums
    of pieces add up, and no single changed element, swapped tensor or shifted row goes unnoticed. It guards
    against faults, not against an attacker, who would be caught by the SHA-256 of the files.
    """
    names = sorted(tensors)
    device = tensors[names[0]].device
    sums = torch.zeros(len(names), dtype=torch.int64, device=device)
    for i, name in enumerate(names):
        shard = shard_of(tensors[name].detach())
        if shard.owned and shard.local.numel():
            sums[i] = _weighted_sum(shard)
    torch.distributed.all_reduce(sums)
    return {n: f"{s & (2**64 - 1):016x}" for n, s in zip(names, sums.tolist(), strict=True)}


def combined(prints: Mapping[str, str]) -> str:
    """One SHA-256 over all fingerprints of a model."""
    return hashlib.sha256("".join(f"{n}={prints[n]};" for n in sorted(prints)).encode()).hexdigest()


def _weighted_sum(shard: Shard) -> Tensor:
    flat = shard.local.reshape(shard.local.shape[0], -1).contiguous().view(torch.int32)
    rows, width = flat.shape
    row_stride = 1
    for size in shard.shape[1:]:
        row_stride *= size
    # Only the first dimension and, in 2-D tensors, the second are ever sharded.
    column = shard.offset[1] if len(shard.offset) > 1 else 0
    columns = torch.arange(column, column + width, device=flat.device, dtype=torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    step = max(1, CHUNK // max(width, 1))
    for start in range(0, rows, step):
        bits = flat[start : start + step].to(torch.int64)
        first = shard.offset[0] + start
        row = torch.arange(first, first + bits.shape[0], device=flat.device, dtype=torch.int64)
        place = (row * row_stride)[:, None] + columns[None, :]
        mixed = place * _MIX
        total += (bits * ((mixed ^ (mixed >> 29)) * _MIX | 1)).sum()
    return total
