"""A 64-bit fingerprint of a tensor's bits that adds up over the pieces of any sharding.

The sum, modulo 2^64, of each element's bits times an odd number drawn from its place in the whole tensor: no single
changed element, swapped tensor or shifted row goes unnoticed. It guards against faults, not against an attacker: a sum
can be made to come out the same (two sign flips cancel where the numbers of their places agree in 33 bits), and who can
write the files can write the SHA-256 beside them too. See SECURITY.md.

The odd number of place p is mix(p) with signed 64-bit arithmetic that wraps around:
    m = p * _MIX;  mix(p) = ((m xor (m >> 29)) * _MIX) | 1
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

CHUNK = (
    1 << 22
)  # elements hashed at a time: a GPU wants few large kernels, of a few times 32 MB,
CPU_CHUNK = 1 << 14  # and a CPU what fits its nearest caches
_MIX = 0x9E3779B97F4A7C15 - (
    1 << 64
)  # golden-ratio multiplier of splitmix64, as a signed 64-bit number
_INTEGERS = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
}  # by their size in bytes


def fingerprint(tensor: Tensor) -> str:
    """The fingerprint of a whole tensor."""
    if tensor.dim() == 0:  # a step counter
        tensor = tensor.reshape(1)
    total = weighted_sum(tensor, shape=tuple(tensor.shape), offset=(0,) * tensor.dim())
    return hexadecimal(int(total.item()))


def hexadecimal(total: int) -> str:
    """A sum as the 16 digits that manifests hold."""
    return f"{total & (2**64 - 1):016x}"


def weighted_sum(
    piece: Tensor, shape: tuple[int, ...], offset: tuple[int, ...]
) -> Tensor:
    """The sum over the ``piece`` of a tensor of ``shape`` that begins at ``offset``, int64 on the piece's device.

    Only the first dimension and, in matrices, the second are ever sharded.
    """
    rows_of_bits = (
        piece.reshape(piece.shape[0], -1)
        .contiguous()
        .view(_INTEGERS[piece.element_size()])
    )
    first_row = offset[0]
    first_column = offset[1] if len(offset) > 1 else 0
    row_length = math.prod(shape[1:])  # of the whole tensor
    if rows_of_bits.is_cuda:
        return _sum_on_gpu(rows_of_bits, first_row, first_column, row_length)
    total = _sum_on_cpu(
        rows_of_bits.numpy(), first_row * row_length + first_column, row_length
    )
    return torch.tensor(total)


def _sum_on_gpu(
    rows_of_bits: Tensor, first_row: int, first_column: int, row_length: int
) -> Tensor:
    rows, width = rows_of_bits.shape
    device = rows_of_bits.device
    columns = torch.arange(
        first_column, first_column + width, device=device, dtype=torch.int64
    )
    total = torch.zeros((), dtype=torch.int64, device=device)
    rows_at_once = max(1, CHUNK // max(width, 1))
    for start in range(0, rows, rows_at_once):
        bits = rows_of_bits[start : start + rows_at_once].to(torch.int64)
        first = first_row + start
        row = torch.arange(
            first, first + bits.shape[0], device=device, dtype=torch.int64
        )
        places = (row * row_length)[:, None] + columns[None, :]
        mixed = places * _MIX
        odd = (mixed ^ (mixed >> 29)) * _MIX | 1
        total += (bits * odd).sum()
    return total


def _sum_on_cpu(rows_of_bits: np.ndarray, first: int, row_length: int) -> int:
    """The same on one core, without memory of the size of the bits, whose element [i, j] has the place
    first + i row_length + j. Many small steps are slow in torch, whose threads meet after each of them."""
    if rows_of_bits.shape[1] == row_length:
        rows_of_bits = rows_of_bits.reshape(1, -1)  # whole rows: their places run on
    # (start + k) * _MIX = start * _MIX + k * _MIX: the second term is the same for every chunk.
    mixed_steps = (
        np.arange(min(CPU_CHUNK, rows_of_bits.shape[1]), dtype=np.int64) * _MIX
    )
    odd_buffer = np.empty_like(mixed_steps)
    spare_buffer = np.empty_like(mixed_steps)
    total = 0
    for i, row in enumerate(rows_of_bits):
        for start in range(0, row.size, CPU_CHUNK):
            bits = row[start : start + CPU_CHUNK]
            if not bits[0] and not bits.any():  # as all of what G_zero makes
                continue
            place = first + i * row_length + start
            odd = odd_buffer[: bits.size]
            spare = spare_buffer[: bits.size]
            np.add(mixed_steps[: bits.size], _signed(place * _MIX), out=odd)
            np.right_shift(odd, 29, out=spare)
            np.bitwise_xor(odd, spare, out=odd)
            np.multiply(odd, _MIX, out=odd)
            np.bitwise_or(odd, 1, out=odd)
            np.copyto(spare, bits)  # in two steps, which numpy vectorizes
            np.multiply(odd, spare, out=spare)
            total += int(spare.sum())
    return _signed(total)


def _signed(number: int) -> int:
    """Modulo 2^64, as a signed 64-bit number."""
    return (number + 2**63) % 2**64 - 2**63
