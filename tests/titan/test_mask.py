"""The mask of G_random on the real model: nothing at 0, the ordinary model at 1, and its folded form in between."""

import dataclasses

import pytest
import torch

from stackgrow.growth.mask import folding, kept_outputs
from stackgrow.growth.operators import growth_rules
from stackgrow.growth.rules import Alias
from stackgrow.plan.stages import GrowthMask
from stackgrow.recipe.keys import Model
from stackgrow.recipe.values import Duration
from stackgrow.titan.model import Llama, model_args

SOURCE = Model(
    family="llama2",
    dim=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    ffn_dim=48,
    vocab_size=61,
    norm_eps=2e-5,
)
DEEPER = dataclasses.replace(SOURCE, n_layers=4)
WIDER = dataclasses.replace(
    SOURCE, dim=64, n_heads=8, n_kv_heads=4, ffn_dim=80, norm_eps=1e-5
)
BOTH = dataclasses.replace(WIDER, n_layers=4)
CASES = {
    "depth": (DEEPER, (0, 1, 0, 1)),
    "width": (WIDER, None),
    "both": (BOTH, (0, 0, 1, 1)),
}
TOKENS = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(5))
# float32 rounding, relative to the largest logit: sums of other lengths in other orders.
ROUNDING = 1e-5


def build(model: Model, mask: GrowthMask | None = None) -> Llama:
    args = model_args(model, 11, mask)
    args.max_seq_len = 16
    llama = Llama(args)
    with torch.no_grad():
        llama.init_weights()
    return llama


def grown(case: str) -> tuple[Llama, Llama, Model, tuple[int, ...] | None]:
    target, layer_map = CASES[case]
    source = build(SOURCE)
    weights = source.state_dict()
    with torch.no_grad():
        for name in weights:  # norms other than 1, so that a wrong one shows
            if weights[name].dim() == 1:
                weights[name].uniform_(
                    0.5, 1.5, generator=torch.Generator().manual_seed(len(name))
                )
    rules = growth_rules("random", SOURCE, target, layer_map, 3)
    state = {
        name: weights[rule.source]
        if isinstance(rule, Alias)
        else rule.fn(*(weights[s].clone() for s in rule.sources))
        for name, rule in rules.targets.items()
    }
    masked = build(target, GrowthMask(SOURCE, layer_map, Duration(10, "steps")))
    masked.load_state_dict(state)
    return source, masked, target, layer_map


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() < ROUNDING * expected.abs().max())


@pytest.mark.parametrize("case", CASES)
def test_function_is_preserved_at_0_and_not_at_1(case: str) -> None:
    source, masked, _, _ = grown(case)
    with torch.no_grad():
        masked.set_mask(0.0)
        assert close(masked(TOKENS), source(TOKENS))
        masked.set_mask(1.0)
        assert not close(masked(TOKENS), source(TOKENS))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("c", [0.0, 0.37, 1.0])
def test_masked_model_equals_the_ordinary_model_of_folded_weights(
    case: str, c: float
) -> None:
    _, masked, target, layer_map = grown(case)
    fold = folding(SOURCE, target, layer_map, c)
    ordinary = build(target)
    ordinary.load_state_dict(
        {name: fold(name, tensor) for name, tensor in masked.state_dict().items()}
    )
    with torch.no_grad():
        masked.set_mask(c)
        assert close(masked(TOKENS), ordinary(TOKENS))


@pytest.mark.parametrize("case", CASES)
def test_parameters_have_the_ordinary_names_and_the_mask_is_in_no_checkpoint(
    case: str,
) -> None:
    _, masked, target, _ = grown(case)
    assert {
        n: tuple(p.shape) for n, p in masked.state_dict().items()
    } == target.tensors()
    assert len(masked.masked) == len(kept_outputs(SOURCE, target, CASES[case][1]))


def test_the_mask_keeps_what_the_source_computes() -> None:
    assert kept_outputs(SOURCE, DEEPER, (0, 1, 0, 1)).keys() == {
        f"layers.{layer}.{block}"
        for layer in (2, 3)
        for block in ("attention", "feed_forward")
    }
    wide = kept_outputs(SOURCE, WIDER, None)
    assert wide["tok_embeddings"].tolist() == [1.0] * 32 + [0.0] * 32
    assert wide["layers.1.feed_forward.w1"].tolist() == [1.0] * 48 + [0.0] * 32
    assert wide["layers.0.attention.wk"].sum() == 16
    assert "output" not in wide


def test_a_compiled_block_follows_the_mask_without_another_compilation() -> None:
    """Its output and its gradients, in the graphs that AOTAutograd makes for any compiler."""
    _, masked, _, _ = grown("both")
    block = masked.layers["1"]
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    hidden = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0))
    hidden.requires_grad_()
    weights = [hidden, *block.parameters()]
    seen = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for c in (0.0, 0.25, 1.0):
            masked.set_mask(c)
            found, expected = (
                layer(hidden, masked.freqs_cis, None) for layer in (compiled, block)
            )
            assert torch.equal(found, expected)
            gradients = torch.autograd.grad(found.square().sum(), weights)
            expected_gradients = torch.autograd.grad(expected.square().sum(), weights)
            for one, other in zip(gradients, expected_gradients, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
            seen.append(found.detach())
    assert not torch.equal(seen[0], seen[1])


def test_every_new_parameter_gets_a_gradient_in_the_first_step() -> None:
    """Training's first step has c = 1/ramp, not 0."""
    _, masked, _, _ = grown("both")
    masked.set_mask(0.1)
    masked(TOKENS).square().mean().backward()
    assert not [
        name
        for name, p in masked.named_parameters()
        if p.grad is None or not p.grad.abs().sum() > 0
    ]
