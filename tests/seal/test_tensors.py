import pytest
import torch

from stackgrow.seal.tensors import CPU_CHUNK, fingerprint, hexadecimal, weighted_sum


def definition(tensor: torch.Tensor) -> str:
    """Element by element, in Python's unbounded integers."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[
        tensor.element_size()
    ]
    total = 0
    for place, bits in enumerate(tensor.contiguous().view(-1).view(integers).tolist()):
        mixed = (place * 0x9E3779B97F4A7C15) % 2**64
        mixed ^= (
            (mixed - 2**64 if mixed >= 2**63 else mixed) >> 29
        ) % 2**64  # as signed numbers are shifted
        total += bits * (mixed * 0x9E3779B97F4A7C15 % 2**64 | 1)
    return hexadecimal(total)


@pytest.mark.parametrize(
    "shape", [(3,), (5, 7), (2, CPU_CHUNK + 3), (CPU_CHUNK + 1, 2), (2, 3, 4)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_fingerprint_equals_its_definition(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert fingerprint(tensor) == definition(tensor)


def test_zeros_between_and_alone() -> None:
    tensor = torch.zeros(3 * CPU_CHUNK)
    assert fingerprint(tensor) == "0" * 16
    tensor[[1, -1]] = torch.tensor([1.0, -0.0])
    assert fingerprint(tensor) == definition(tensor)


def test_pieces_add_up() -> None:
    """Of rows and of columns, wider than what is hashed at a time."""
    whole = torch.randn(
        6, 2 * CPU_CHUNK + 10, generator=torch.Generator().manual_seed(0)
    )
    shape, cut = tuple(whole.shape), CPU_CHUNK + 5
    pieces = [
        (whole[:2], (0, 0)),
        (whole[2:, :cut], (2, 0)),
        (whole[2:, cut:], (2, cut)),
    ]
    total = sum(int(weighted_sum(piece, shape, offset)) for piece, offset in pieces)
    assert hexadecimal(total) == fingerprint(whole)
