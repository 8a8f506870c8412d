"""The paper's formulas against the numbers that it and its README print."""

from __future__ import annotations

import math

import pytest

from stackgrow.plan import guidelines


@pytest.mark.parametrize(
    ("parameters", "tokens", "timing"),
    [
        (8e9, 15e12, 6.58e9),
        (7e9, 2e12, 11.11e9),
        (13e9, 2e12, 15.84e9),
        (70e9, 2e12, 42.48e9),
    ],
    ids=["Llama3-8B", "Llama2-7B", "Llama2-13B", "Llama2-70B"],
)
def test_growth_timing_is_the_papers_table(
    parameters: float, tokens: float, timing: float
) -> None:
    flops = guidelines.training_flops(parameters, tokens)
    assert guidelines.growth_timing(parameters, flops) == pytest.approx(
        timing, abs=0.005e9
    )


def test_timing_falls_as_flops_grow() -> None:
    assert guidelines.growth_timing(3e9, 1e21) > guidelines.growth_timing(3e9, 2e21)


def test_the_fitted_range_ends_at_the_largest_model_and_budget() -> None:
    assert guidelines.in_fitted_range(3e9, 1.2e21)
    assert not guidelines.in_fitted_range(3.1e9, 1.2e21)
    assert not guidelines.in_fitted_range(3e9, 1.3e21)


def test_flops_are_6_n_d_and_attention_apart() -> None:
    assert guidelines.training_flops(7e9, 300e9) == 6 * 7e9 * 300e9
    # Forward: scores and values, 2 products x 2 S D FLOPs per token and layer; backward twice that.
    assert guidelines.attention_flops(32, 4096, 2048, 1) == 3 * 2 * 2 * 2048 * 4096 * 32


def test_the_preliminary_factor_of_a_7b_is_far_from_the_papers_own() -> None:
    """Appendix F, eq. 50, for a nominal 7B and 300B tokens: 17, where the paper uses 4."""
    n = 7e9
    g = guidelines.preliminary_factor(n, guidelines.training_flops(n, 300e9))
    assert math.log10(g) == pytest.approx(
        1.01 * math.log10(n) - 29.88 / math.log10(6 * n * 300e9) - 7.36
    )
    assert g == pytest.approx(17.04, abs=0.01)
