"""Attention kernels beside torch's own ("sdpa"): flash-attn's, and FlexAttention's causal mask."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torchtitan.models.attention import create_attention_mask
from torchtitan.models.llama3.infra import parallelize


class FlashAttention(nn.Module):
    """The package flash-attn in the place of torchtitan's inner attention: causal; q [B, H, T, d], k and v with as
    many heads or fewer, in bf16 on a GPU. Accepted by FSDP2, tensor parallel and torch.compile: its kernels are
    registered operators."""

    def __init__(self) -> None:
        super().__init__()
        from flash_attn import flash_attn_func  # the extra "flash"

        self.kernel = flash_attn_func
        self.deterministic = (
            torch.are_deterministic_algorithms_enabled()
        )  # its backward pass adds in any order

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, enable_gqa: bool = False
    ) -> Tensor:
        output = self.kernel(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            causal=True,
            deterministic=self.deterministic,
        )
        return output.transpose(1, 2)


def use_flash_attention(model: nn.Module) -> None:
    """Puts flash-attn into every layer; selective recomputation keeps its result, as it does torch's kernels'."""
    for layer in model.layers.values():
        layer.attention.inner_attention = FlashAttention()
    parallelize._op_sac_save_list.add(torch.ops.flash_attn._flash_attn_forward.default)


def document_mask(tokens: Tensor, bos_id: int) -> BlockMask:
    """What "flex" attends to where documents, each of which begins with BOS, are kept apart; ``tokens`` [B, T]."""
    B, T = tokens.shape
    document = (tokens == bos_id).cumsum(
        1
    )  # [B, T], the number of the document that each token is in

    def attends(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (q >= kv) & (document[b, q] == document[b, kv])

    create = (
        create_attention_mask if tokens.is_cuda else create_block_mask
    )  # compiled, it holds no [B, T, T]
    return create(attends, B, None, T, T, tokens.device)


@lru_cache(maxsize=4)
def causal_mask(length: int, device: torch.device) -> BlockMask:
    """What "flex" attends to where documents are not kept apart."""
    return create_block_mask(
        lambda b, h, q, kv: q >= kv, None, None, length, length, device=device
    )
