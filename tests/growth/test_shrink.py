"""Shrink, zero-pad, perturb (arXiv 2411.07340, 2605.13405): what is exact, how the noise is spread, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from growth_for_tests import (
    apply,
    assert_same,
    deviation,
    logits,
    through_checkpoints,
    weights,
)

from stackgrow.growth.draw import draw, generator, paper_std
from stackgrow.growth.rules import Alias, Compute, GrowthError, Moment
from stackgrow.growth.shrink import shrink_rules
from stackgrow.recipe.keys import Model

MHA = Model(dim=32, n_layers=2, n_heads=4, ffn_dim=40, vocab_size=31)
WIDE = replace(MHA, dim=64, n_heads=8, n_kv_heads=8, ffn_dim=80)
GQA = replace(MHA, n_kv_heads=2)
SEED = 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_definition_bit_for_bit(dtype: torch.dtype) -> None:
    """The source ends where the padding begins, as in the authors' code, and all of the target has noise."""
    small = weights(MHA, dtype)
    grown = apply(shrink_rules(MHA, WIDE, SEED, None, 0.4, 0.5), small)
    for name, shape in WIDE.tensors().items():
        W = small[name].double()
        if len(shape) == 1:
            padding = torch.ones(shape[0] - len(W))
            want = torch.cat([small[name], padding.to(dtype)])
        else:
            padded = torch.zeros(shape, dtype=torch.float64)
            padded[: W.shape[0], : W.shape[1]] = W
            noise = draw(name, shape, WIDE, generator(SEED, "perturb", name))
            want = (0.4 * padded + 0.5 * noise.double()).to(dtype)
        assert torch.equal(grown[name], want), name


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_through_checkpoints(parts: int, tmp_path: Path) -> None:
    small = weights(MHA)
    rules = shrink_rules(MHA, WIDE, SEED)
    assert_same(through_checkpoints(rules, small, tmp_path, parts), apply(rules, small))


def test_the_noise_is_a_new_models_weights() -> None:
    """Its deviation is the initialization's, over the old entries as over the new; it differs by seed and by tensor."""
    source = replace(MHA, dim=256, n_heads=8, n_kv_heads=8, ffn_dim=256)
    target = replace(source, dim=512, n_heads=16, n_kv_heads=16, ffn_dim=512)
    small = weights(source)
    grown = apply(shrink_rules(source, target, SEED), small)
    noises = {}
    for name, shape in target.tensors().items():
        if len(shape) == 1:
            continue
        rows, columns = small[name].shape
        noise = grown[name].clone()
        noise[:rows, :columns] -= 0.4 * small[name]
        noises[name] = noise
        std = paper_std(name, shape, target.n_layers)
        for some in (noise[:rows, :columns], noise[:, columns:]):
            assert some.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(some.mean().item()) < 5 * std / some.numel() ** 0.5, name
    wq, wk = (noises[f"layers.0.attention.{name}.weight"] for name in ("wq", "wk"))
    correlation = (wq * wk).mean() / (wq.std() * wk.std())
    assert abs(correlation.item()) < 5 / wq.numel() ** 0.5
    other = apply(shrink_rules(source, target, SEED + 1), small)
    assert not torch.equal(other["output.weight"], grown["output.weight"])


def test_without_noise_a_factor_is_all_that_is_done() -> None:
    small = weights(MHA)
    grown = apply(shrink_rules(MHA, WIDE, SEED, None, 1.0, 0.0), small)
    for name, weight in small.items():
        kept = tuple(slice(size) for size in weight.shape)
        assert torch.equal(grown[name][kept], weight), name
        beside = grown[name].sum() - weight.sum()
        wanted = WIDE.tensors()[name][0] - len(weight) if weight.dim() == 1 else 0
        assert beside.item() == pytest.approx(wanted, abs=1e-3), name


def test_the_function_changes() -> None:
    """Neither as it is meant to be, nor without noise: RMSNorm sees other means, and the logits are 0.4 of theirs."""
    small = weights(MHA)
    for perturbation in (1.0, 0.0):
        rules = shrink_rules(MHA, WIDE, SEED, None, 0.4, perturbation)
        grown = apply(rules, small)
        assert deviation(logits(WIDE, grown), logits(MHA, small)) > 0.3


def test_query_heads_stay_with_their_keys() -> None:
    """With 4 query heads to each key/value head instead of 2, sources 0 1 2 3 become heads 0 1 4 5."""
    target = replace(GQA, dim=64, n_heads=8)
    small = weights(GQA)
    grown = apply(shrink_rules(GQA, target, SEED, None, 1.0, 0.0), small)
    e = GQA.head_dim
    for name, by_columns in (("wq", False), ("wo", True)):
        have = grown[f"layers.0.attention.{name}.weight"]
        want = small[f"layers.0.attention.{name}.weight"]
        if by_columns:
            have, want = have.T, want.T
        for head, place in enumerate((0, 1, 4, 5)):
            moved = have[place * e : (place + 1) * e, : GQA.dim]
            assert torch.equal(moved, want[head * e : (head + 1) * e]), (name, head)
        assert have.count_nonzero() == want.count_nonzero()


def test_where_only_the_ffn_grows_all_matrices_are_shrunk_and_no_norm() -> None:
    target = replace(MHA, ffn_dim=47)
    rules = shrink_rules(MHA, target, SEED)
    for name, shape in target.tensors().items():
        is_norm = len(shape) == 1
        assert isinstance(rules.targets[name], Alias if is_norm else Compute), name


@pytest.mark.parametrize("power", [1, 2])
def test_moments_are_shrunk_like_their_weights_and_have_no_noise(power: int) -> None:
    source = replace(MHA, attention_bias=True, tie_embeddings=True)
    target = replace(WIDE, attention_bias=True, tie_embeddings=True)
    small = weights(source)
    grown = apply(shrink_rules(source, target, SEED, Moment(power), 0.4), small)
    for name, weight in small.items():
        kept = tuple(slice(size) for size in weight.shape)
        factor = 0.4**power if weight.dim() == 2 else 1
        assert torch.equal(grown[name][kept], weight * factor), name
        assert grown[name].count_nonzero() == weight.count_nonzero(), name


def test_biases_are_padded_with_zeros_and_head_norms_kept() -> None:
    source = replace(MHA, attention_bias=True, qk_norm=True)
    target = replace(WIDE, attention_bias=True, qk_norm=True)
    small = weights(source)
    grown = apply(shrink_rules(source, target, SEED), small)
    bias, head_norm = "layers.0.attention.wq.bias", "layers.0.attention.q_norm.weight"
    assert torch.equal(grown[bias], torch.cat([small[bias], torch.zeros(32)]))
    assert torch.equal(grown[head_norm], small[head_norm])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_heads": 4, "n_kv_heads": 4}, "keeps the head width: 8 -> 16"),
        ({"norm_eps": 1e-6}, '"shrink" keeps norm_eps: 1e-05, not 1e-06'),
        ({"ffn_dim": 39}, "ffn_dim 40 -> 39 must not shrink"),
        ({"n_kv_heads": 4, "n_heads": 8, "tie_embeddings": True}, "tie_embeddings"),
    ],
)
def test_what_is_not_defined_is_refused(change: dict, message: str) -> None:
    with pytest.raises(GrowthError, match=message):
        shrink_rules(MHA, replace(WIDE, **change), SEED)
