from dataclasses import replace
from pathlib import Path

import pytest
import torch
from growth_for_tests import apply, assert_same, through_checkpoints, weights

from stackgrow.growth.depth import depth_rules, stack_map
from stackgrow.growth.draw import generator
from stackgrow.growth.noise import noise_std, noisy_rules
from stackgrow.growth.rules import GrowthError, Rules
from stackgrow.growth.width import split_rules
from stackgrow.recipe.keys import Model

SMALL = Model(
    dim=16, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=20, vocab_size=4100
)  # more rows than one block
DEEP = replace(SMALL, n_layers=6)
WIDE = replace(SMALL, dim=32, n_heads=8, n_kv_heads=4)
RULES = {
    "stack": depth_rules(stack_map(2, 6), SMALL, DEEP),
    "split": split_rules(SMALL, WIDE, 3),
}
LAYERS = {"stack": 6, "split": 2}


def dense(
    rules: Rules, n_layers: int, ratio: float, seed: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Eqs. 53-54 in float64, rounded once; eps is drawn whole here."""
    grown = apply(rules, weights(SMALL, dtype))
    for name, W in grown.items():
        if W.dim() == 2:
            d = W.shape[1]
            std = (
                1 / (d**0.5 * n_layers)
                if ".wo." in name or ".w2." in name
                else (2 / (5 * d)) ** 0.5
            )
            eps = (
                torch.empty(W.shape)
                .normal_(0.0, std, generator=generator(seed, "noise", name))
                .double()
            )
            grown[name] = ((1 - ratio) * W.double() + ratio * eps).to(dtype)
    return grown


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("growth", RULES)
def test_noise_equals_the_blend(growth: str, dtype: torch.dtype) -> None:
    """Where a tensor has more rows than one block, eps comes in blocks: the embedding and the head only."""
    rules, n = RULES[growth], LAYERS[growth]
    have, want = (
        apply(noisy_rules(rules, n, 0.2, 7), weights(SMALL, dtype)),
        dense(rules, n, 0.2, 7, dtype),
    )
    assert_same(
        {k: w for k, w in have.items() if w.shape[0] < 4096},
        {k: w for k, w in want.items() if w.shape[0] < 4096},
    )
    for name in ("tok_embeddings.weight", "output.weight"):
        assert torch.equal(have[name][:4096], want[name][:4096]), name
        rest = (
            have[name][4096:].double()
            - 0.8 * apply(rules, weights(SMALL, dtype))[name][4096:].double()
        ) / 0.2
        assert (
            0.5 < rest.std().item() / noise_std(name, tuple(have[name].shape), n) < 1.5
        ), name


def test_noise_leaves_norms_alone_and_has_the_initial_deviation() -> None:
    clean = apply(RULES["stack"], weights(SMALL))
    noisy = apply(noisy_rules(RULES["stack"], 6, 0.2, 7), weights(SMALL))
    for name, W in clean.items():
        if W.dim() == 1:
            assert torch.equal(noisy[name], W), name
            continue
        eps = (noisy[name] - 0.8 * W) / 0.2
        std = (
            1 / (W.shape[1] ** 0.5 * 6)
            if ".wo." in name or ".w2." in name
            else (2 / (5 * W.shape[1])) ** 0.5
        )
        assert abs(eps.std().item() / std - 1) < 6 / (2 * W.numel()) ** 0.5, name


def test_copies_get_different_noise_and_seeds_differ() -> None:
    first, again, other = (
        apply(noisy_rules(RULES["stack"], 6, 0.2, seed), weights(SMALL))
        for seed in (7, 7, 8)
    )
    assert_same(first, again)
    name = "layers.{}.attention.wk.weight"
    assert not torch.equal(first[name.format(0)], first[name.format(2)])
    assert not torch.equal(first[name.format(0)], other[name.format(0)])


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_noise_through_checkpoints(parts: int, tmp_path: Path) -> None:
    for growth, rules in RULES.items():
        noisy = noisy_rules(rules, LAYERS[growth], 0.2, 7)
        small = weights(SMALL)
        assert_same(
            through_checkpoints(noisy, small, tmp_path / growth, parts),
            apply(noisy, small),
        )


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.1])
def test_ratios_outside_the_blend_are_refused(ratio: float) -> None:
    with pytest.raises(
        GrowthError, match=f"noise ratio {ratio} must be above 0 and at most 1"
    ):
        noisy_rules(RULES["stack"], 6, ratio, 0)
