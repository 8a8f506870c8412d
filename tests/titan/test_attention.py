"""Attention kernels: each gives the model of torch's own. flash-attn's needs a GPU and stands in here as the formula
that its documentation states, so that what is handed to it and taken from it is checked; tests/gpu has the real one."""

import dataclasses
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from recipes_for_tests import plan_of
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask, flex_attention
from torchtitan.models.attention import FlexAttentionWrapper

from stackgrow.recipe.keys import Model
from stackgrow.titan import attention, device
from stackgrow.titan.model import Llama, model_args

T = 32


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    deterministic: bool = False,
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v; q [B, T, H, d], k and v [B, T, H / n, d], of which each serves n heads in turn."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    future = torch.ones(q.shape[1], k.shape[1], device=q.device).triu(1).bool()
    weights = scores.masked_fill(future & torch.tensor(causal), float("-inf")).softmax(
        -1
    )
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def outputs(
    model: Model, kernel: str, where: str = "cpu", train: bool = True
) -> list[Tensor]:
    """Logits, and the gradients of all parameters, of the same model on the same tokens; in bf16 on a GPU."""
    args = model_args(model, 0, attention=kernel)
    args.max_seq_len = T
    llama = Llama(args).to(where)
    with torch.no_grad():
        llama.init_weights()
    llama.requires_grad_(train)
    tokens = torch.randint(
        0, model.vocab_size, (2, T), generator=torch.Generator().manual_seed(1)
    ).to(where)
    with torch.autocast(where, dtype=torch.bfloat16, enabled=where == "cuda"):
        logits = llama(tokens)
    if train:
        logits.float().logsumexp(-1).sum().backward()
    return [logits, *(p.grad for p in llama.parameters() if p.grad is not None)]


def check_equals_sdpa(
    model: Model, kernel: str, where: str, tolerance: float, train: bool = True
) -> None:
    """``tests/gpu`` runs the same on a GPU."""
    for found, expected in zip(
        outputs(model, kernel, where, train),
        outputs(model, "sdpa", where, train),
        strict=True,
    ):
        assert (found - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_flash_attn_is_given_and_gives_what_sdpa_does(
    small: Model, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=flash_attn_func)
    )
    monkeypatch.setattr(
        torch.ops,
        "flash_attn",
        SimpleNamespace(_flash_attn_forward=SimpleNamespace(default="its op")),
    )
    monkeypatch.setattr(attention.parallelize, "_op_sac_save_list", set())
    check_equals_sdpa(
        dataclasses.replace(small, n_kv_heads=kv_heads), "flash_attn", "cpu", 1e-5
    )
    assert attention.parallelize._op_sac_save_list == {"its op"}


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flex_equals_sdpa_forward(
    small: Model, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch has no backward pass of it on CPUs."""
    monkeypatch.setattr(
        FlexAttentionWrapper, "_compiled_flex_attn", flex_attention
    )  # compiling takes a minute
    check_equals_sdpa(
        dataclasses.replace(small, n_kv_heads=kv_heads),
        "flex",
        "cpu",
        1e-5,
        train=False,
    )


def test_documents_are_kept_apart(
    small: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each document's logits are what it would have alone, wherever it stands; and the mask is the stated one."""
    monkeypatch.setattr(FlexAttentionWrapper, "_compiled_flex_attn", flex_attention)
    bos, cuts = 1, [0, 5, 6, 20, T]  # a window may begin inside a document
    tokens = torch.randint(
        2, small.vocab_size, (2, T), generator=torch.Generator().manual_seed(1)
    )
    tokens[0, cuts[1:-1]] = bos
    args = model_args(small, 0, attention="flex")
    args.max_seq_len, args.bos_id = T, bos
    llama = Llama(args)
    with torch.no_grad():
        llama.init_weights()
        together = llama(tokens)
        llama.model_args.bos_id = None
        assert (together[0] - llama(tokens)[0]).abs().max() > 1e-2
        torch.testing.assert_close(together[1], llama(tokens)[1], msg="one document")
        for start, stop in itertools.pairwise(cuts):
            alone = llama(tokens[:1, start:stop])[0]
            torch.testing.assert_close(
                together[0, start:stop], alone, rtol=0, atol=2e-5
            )
    mask = attention.document_mask(tokens, bos)
    dense = create_mask(mask.mask_mod, 2, None, T, T, device="cpu")[0, 0]
    number = torch.tensor([sum(cut <= i for cut in cuts) for i in range(T)])
    assert torch.equal(dense, (number[:, None] == number[None, :]).tril())


def problems(folder: Path, kernel: str) -> dict[str, str]:
    sets = [f"train.attention={kernel}", "train.precision=bf16"]
    return dict(device.problems(plan_of(folder, sets=sets)))


def test_what_a_machine_cannot_run_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert problems(tmp_path, "sdpa") == {}
    assert problems(tmp_path, "flex") == {
        "train.attention": '"flex" needs a GPU; there is none: use "sdpa"'
    }
    assert problems(tmp_path, "flash_attn")["train.attention"].startswith(
        '"flash_attn" needs a GPU'
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert problems(tmp_path, "flex") == {}
    assert (
        "pip install 'stackgrow[flash]'"
        in problems(tmp_path, "flash_attn")["train.attention"]
    )
