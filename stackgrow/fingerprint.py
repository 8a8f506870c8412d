"""A 64-bit fingerprint of a tensor's bits that adds up over the pieces of any sharding.

The sum, modulo 2^64, of each element's bits times an odd number drawn from its place in the whole tensor: no single
changed element, swapped tensor or shifted row goes unnoticed. It guards against faults; an attacker is caught by the
SHA-256 of the files.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Elements hashed at a time. A GPU wants few large kernels, at a few times 32 MB; a CPU wants what fits its caches.
CHUNK, CPU_CHUNK = 1 << 22, 1 << 16
_MIX = 0x9E3779B97F4A7C15 - (1 << 64)  # golden-ratio multiplier of splitmix64, as a signed 64-bit number
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensor: Tensor) -> str:
    """The fingerprint of a whole tensor."""
    return hexadecimal(int(weighted_sum(tensor, tuple(tensor.shape), (0,) * tensor.dim()).item()))


def hexadecimal(total: int) -> str:
    """A sum as the 16 digits that manifests hold."""
    return f"{total & (2**64 - 1):016x}"


def weighted_sum(piece: Tensor, shape: tuple[int, ...], offset: tuple[int, ...]) -> Tensor:
    """The sum over the ``piece`` of a tensor of ``shape`` that begins at ``offset``, int64 on the piece's device.

    Only the first dimension and, in matrices, the second are ever sharded.
    """
    flat = piece.reshape(piece.shape[0], -1).contiguous().view(_BITS[piece.element_size()])
    rows, width = flat.shape
    row_stride, column = math.prod(shape[1:]), offset[1] if len(offset) > 1 else 0
    columns = torch.arange(column, column + width, device=flat.device, dtype=torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    step = max(1, (CHUNK if flat.is_cuda else CPU_CHUNK) // max(width, 1))
    for start in range(0, rows, step):
        bits = flat[start : start + step].to(torch.int64)
        first = offset[0] + start
        row = torch.arange(first, first + bits.shape[0], device=flat.device, dtype=torch.int64)
        mixed = ((row * row_stride)[:, None] + columns[None, :]) * _MIX
        total += (bits * ((mixed ^ (mixed >> 29)) * _MIX | 1)).sum()
    return total
