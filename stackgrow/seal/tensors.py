"""A 64-bit fingerprint of a tensor's bits that adds up over the pieces of any sharding.

The sum, modulo 2^64, of each element's bits times an odd number drawn from its place in the whole tensor: no single
changed element, swapped tensor or shifted row goes unnoticed. It guards against faults; an attacker is caught by the
SHA-256 of the files.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 22  # elements hashed at a time: a GPU wants few large kernels, of a few times 32 MB,
CPU_CHUNK = 1 << 14  # and a CPU what fits its nearest caches
_MIX = 0x9E3779B97F4A7C15 - (1 << 64)  # golden-ratio multiplier of splitmix64, as a signed 64-bit number
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensor: Tensor) -> str:
    """The fingerprint of a whole tensor."""
    tensor = tensor.reshape(tensor.shape or (1,))  # a step counter has no dimension
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
    if not flat.is_cuda:
        return torch.tensor(_cpu_sum(flat.numpy(), offset[0] * row_stride + column, row_stride))
    columns = torch.arange(column, column + width, device=flat.device, dtype=torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    step = max(1, CHUNK // max(width, 1))
    for start in range(0, rows, step):
        bits = flat[start : start + step].to(torch.int64)
        first = offset[0] + start
        row = torch.arange(first, first + bits.shape[0], device=flat.device, dtype=torch.int64)
        mixed = ((row * row_stride)[:, None] + columns[None, :]) * _MIX
        total += (bits * ((mixed ^ (mixed >> 29)) * _MIX | 1)).sum()
    return total


def _cpu_sum(bits: np.ndarray, first: int, row_stride: int) -> int:
    """The same on one core, without memory of the size of ``bits``, whose element [i, j] has the place
    first + i row_stride + j. Many small steps are slow in torch, whose threads meet after each of them."""
    if bits.shape[1] == row_stride:
        bits = bits.reshape(1, -1)  # whole rows: their places run on
    mixed = np.arange(min(CPU_CHUNK, bits.shape[1]), dtype=np.int64) * _MIX
    factor, other = np.empty_like(mixed), np.empty_like(mixed)
    total = 0
    for i, row in enumerate(bits):
        for start in range(0, row.size, CPU_CHUNK):
            part = row[start : start + CPU_CHUNK]
            if not part[0] and not part.any():  # as all of what G_zero makes
                continue
            a, b = factor[: part.size], other[: part.size]
            np.add(mixed[: part.size], _signed((first + i * row_stride + start) * _MIX), out=a)
            np.right_shift(a, 29, out=b)
            np.bitwise_xor(a, b, out=a)
            np.multiply(a, _MIX, out=a)
            np.bitwise_or(a, 1, out=a)
            np.copyto(b, part)
            total += int(np.multiply(a, b, out=b).sum())  # in two steps, which numpy vectorizes
    return _signed(total)


def _signed(number: int) -> int:
    """Modulo 2^64, as a signed 64-bit number."""
    return (number + 2**63) % 2**64 - 2**63
