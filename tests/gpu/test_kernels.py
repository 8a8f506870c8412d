"""Attention kernels and the chunked loss on the device that they are made for."""

import dataclasses

import pytest
import torch
from test_attention import check_equals_sdpa
from test_loss import ROUNDING, check_chunks_equal_the_whole

from stackgrow.recipe.keys import Model

# bf16 has 8 bits of mantissa: 4e-3 a rounding, and a few of them one after another.
BF16 = 3e-2
MODEL = Model(
    family="llama2", dim=256, n_layers=2, n_heads=4, ffn_dim=704, vocab_size=512
)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("kernel", ["flash_attn", "flex"])
def test_kernels_equal_sdpa(kernel: str, kv_heads: int, device: str) -> None:
    if device == "cpu":
        pytest.skip("has kernels for CUDA alone; see tests/titan/test_attention.py")
    if kernel == "flash_attn":
        pytest.importorskip("flash_attn")
    check_equals_sdpa(
        dataclasses.replace(MODEL, n_kv_heads=kv_heads), kernel, device, BF16
    )


@pytest.mark.parametrize("chunk", [7, 60, 1000])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_chunks_equal_the_whole(chunk: int, dtype: torch.dtype, device: str) -> None:
    check_chunks_equal_the_whole(chunk, dtype, device)


def test_memory_of_the_loss_is_that_of_a_chunk(device: str) -> None:
    """16384 x 32000 logits: 1 GB in bf16 and, while their gradient is made, three times 2 GB."""
    from torchtitan.components.loss import cross_entropy_loss

    from stackgrow.titan.loss import chunk_head

    if device == "cpu":
        pytest.skip("torch counts no CPU memory; see tests/titan/test_loss.py")
    head = torch.nn.Linear(1024, 32000, bias=False, device=device)
    hidden = torch.randn(8, 2048, 1024, device=device, requires_grad=True)
    labels = torch.randint(0, 32000, (8, 2048), device=device)
    peak = {}
    for chunk in (0, 2048):
        if chunk:
            chunk_head(head, chunk)
        head.weight.grad = hidden.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = (
                head(hidden, labels)
                if chunk
                else cross_entropy_loss(head(hidden), labels)
            )
        loss.backward()
        peak[chunk] = (torch.cuda.max_memory_allocated() - before) / 2**30
    assert peak[0] > 4
    assert peak[2048] < 1.5
