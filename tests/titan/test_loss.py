"""The chunked head and loss: exactly what torch's own do with all logits, in any chunk, and in less memory."""

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchtitan.components.loss import IGNORE_INDEX, cross_entropy_loss

from stackgrow.recipe.keys import Model
from stackgrow.titan.loss import chunk_head
from stackgrow.titan.model import Llama, model_args

B, T, D, V = 3, 20, 32, 97
# float32 sums in another order; bf16 gradients of logits are rounded before they are divided by the number of tokens.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 8e-3}


def inputs(device: str = "cpu") -> tuple[nn.Linear, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    head = nn.Linear(D, V, bias=False)
    head.weight.data.normal_(generator=draw)
    labels = torch.randint(0, V, (B, T), generator=draw)
    labels[1, 3:9] = IGNORE_INDEX
    return (
        head.to(device),
        torch.randn(B, T, D, generator=draw).to(device),
        labels.to(device),
    )


def gradients(head: nn.Linear, hidden: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    head.weight.grad = hidden.grad = None
    (loss / (B * T)).backward()
    assert head.weight.grad is not None
    assert hidden.grad is not None
    return head.weight.grad, hidden.grad


def check_chunks_equal_the_whole(
    chunk: int, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """``tests/gpu`` runs the same on a GPU."""
    head, hidden, labels = inputs(device)
    hidden.requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        whole = cross_entropy_loss(head(hidden), labels)
        expected = gradients(head, hidden, whole)
        chunk_head(head, chunk)
        assert torch.equal(head(hidden), F.linear(hidden, head.weight)), (
            "logits where no labels are given"
        )
        found = head(hidden, labels)
    assert found.dtype == torch.float32
    assert abs(found / whole - 1) < 1e-6
    for name, have, want in zip(
        ("weight", "hidden"), gradients(head, hidden, found), expected, strict=True
    ):
        assert have.dtype == want.dtype
        assert (have - want).abs().max() < ROUNDING[dtype] * want.abs().max(), name
    if dtype == torch.float32:
        with torch.no_grad():
            assert torch.equal(head(hidden, labels), found)


@pytest.mark.parametrize("chunk", [1, 7, 60, 1000])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_chunks_equal_the_whole(chunk: int, dtype: torch.dtype) -> None:
    check_chunks_equal_the_whole(chunk, dtype)


def test_equal_to_torchs_own_chunked_loss() -> None:
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("torch 2.13 has it")
    head, hidden, labels = inputs()
    hidden.requires_grad_()
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=16)
    theirs = F.linear_cross_entropy(
        hidden.flatten(0, 1), head.weight, labels.flatten(), reduction="sum", options=options
    )  # fmt: skip
    expected = gradients(head, hidden, theirs)
    chunk_head(head, 16)
    for have, want in zip(
        gradients(head, hidden, head(hidden, labels)), expected, strict=True
    ):
        assert (have - want).abs().max() < ROUNDING[torch.float32] * want.abs().max()


def test_an_inner_gradient_reaches_every_parameter_of_the_model(small: Model) -> None:
    draw = torch.Generator().manual_seed(1)
    tokens, labels = (
        torch.randint(0, small.vocab_size, (2, 16), generator=draw) for _ in range(2)
    )
    gradient: dict[int, list[Tensor]] = {}
    for chunk in (0, 5):
        args = model_args(small, 0, loss_chunk=chunk)
        args.max_seq_len = 16
        model = Llama(args)
        with torch.no_grad():
            model.init_weights()
        loss = (
            model(tokens, labels=labels)
            if chunk
            else cross_entropy_loss(model(tokens), labels)
        )
        loss.backward()
        gradient[chunk] = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradient[0]) == len(small.tensors())
    for have, want in zip(gradient[5], gradient[0], strict=True):
        assert (have - want).abs().max() < 1e-5 * want.abs().max()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max(
            [
                self.elements,
                *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)),
            ]
        )
        return out


def test_no_more_logits_than_a_chunks_are_ever_made() -> None:
    head, hidden, labels = inputs()
    hidden.requires_grad_()
    with Largest() as whole:
        cross_entropy_loss(head(hidden), labels).backward()
    assert whole.elements == B * T * V
    chunk_head(head, 10)
    with Largest() as chunked:
        head(hidden, labels).backward()
    assert chunked.elements == V * D > 10 * V


def test_a_chunks_logits_are_gone_before_the_next_are_made() -> None:
    head, hidden, labels = inputs()
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        alive.append(sum(earlier() is not None for earlier in made))
        assert logits._base is not None
        made.append(weakref.ref(logits._base))
        return cross_entropy_loss(logits, labels)

    chunk_head(head, 10)
    head.loss = loss
    head(hidden.requires_grad_(), labels).backward()
    assert alive == [0] * 6
