"""The paper's formulas, as pure functions: Du et al., "Stacking Your Transformers", arXiv 2405.15319."""

from __future__ import annotations

import math

FITTED_PARAMETERS = 3e9  # section 4.2: fitted on 410M, 1.1B and 3B targets
FITTED_FLOPS = 1.2e21


def growth_timing(parameters: float, flops: float) -> float:
    """Tokens d that the base model trains before growth (section 4.2, eq. 2).

    log10(d) = 0.88 log10(N) + 163.27 / log10(C) - 5.74, with N the target's parameters and C = 6 N D its
    training FLOPs. Fitted for N <= 3e9 and C <= 1.2e21; ``in_fitted_range`` tells whether a use extrapolates.
    """
    return float(10 ** (0.88 * math.log10(parameters) + 163.27 / math.log10(flops) - 5.74))


def in_fitted_range(parameters: float, flops: float) -> bool:
    """Whether ``growth_timing`` interpolates the paper's own measurements."""
    return parameters <= FITTED_PARAMETERS and flops <= FITTED_FLOPS


def training_flops(parameters: float, tokens: float) -> float:
    """C = 6 N D: forward and backward matrix products of N parameters over D tokens."""
    return 6.0 * parameters * tokens


def attention_flops(n_layers: int, dim: int, seq_len: int, tokens: float) -> float:
    """The attention products that 6 N D leaves out: 12 L D S per token (PaLM, appendix B; not halved)."""
    return 12.0 * n_layers * dim * seq_len * tokens


def speed_up(scratch_flops: float, grown_flops: float) -> float:
    """Iso-loss speed-up: FLOPs(scratch) / FLOPs(grown, base included) - 1 at equal smoothed loss (B.2)."""
    return scratch_flops / grown_flops - 1
