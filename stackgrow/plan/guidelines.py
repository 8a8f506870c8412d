"""The paper's formulas, as pure functions: Du et al., "Stacking Your Transformers", arXiv 2405.15319."""

from __future__ import annotations

import math

# Section 4.2: fitted on 410M, 1.1B and 3B targets grown after 0 to 50B tokens. Without embeddings the smallest has 308M
# parameters; 3B is the paper's own word for the largest.
FITTED_PARAMETERS = (3.08e8, 3e9)
FITTED_FLOPS = 1.2e21
TIMING = (0.88, 163.27, -5.74)  # a, b, c of eq. 2
# Section 4.2: best between 2 and 4 of the factors 2 to 24 (1.1B) and 4 to 32 (3B), so the paper uses 4 throughout. The
# equation that it fits for the factor it calls preliminary; it gives 17 for a 7B of 300B tokens: shown, never used.
GROWTH_FACTOR = 4
PRELIMINARY_FACTOR = (1.01, -29.88, -7.36)  # a, b, c of eq. 49, as eq. 50 has them
BEST_FACTORS = (2, 4)


def growth_timing(
    parameters: float, flops: float, fit: tuple[float, float, float] = TIMING
) -> float:
    """Tokens d that the base model trains before growth (section 4.2, eq. 2).

    log10(d) = a log10(N) + b / log10(C) + c, with N the target's parameters without embedding and head, and
    C = 6 N D. The
    paper's a, b, c hold for N <= 3e9 and C <= 1.2e21; ``in_fitted_range`` tells whether a use extrapolates.
    """
    return by_size_and_flops(parameters, flops, fit)


def by_size_and_flops(
    parameters: float, flops: float, fit: tuple[float, float, float]
) -> float:
    """10 ** (a log10(N) + b / log10(C) + c), the form of eqs. 2 and 49."""
    a, b, c = fit
    return float(10 ** (a * math.log10(parameters) + b / math.log10(flops) + c))


def preliminary_factor(parameters: float, flops: float) -> float:
    """Growth factor g by appendix F, eq. 50: log10(g) = 1.01 log10(N) - 29.88 / log10(C) - 7.36, fitted on 1.1B and 3B
    alone; its authors call the result mediocre."""
    return by_size_and_flops(parameters, flops, PRELIMINARY_FACTOR)


def in_fitted_range(parameters: float, flops: float) -> bool:
    """Whether ``growth_timing`` interpolates the paper's own measurements."""
    return (
        FITTED_PARAMETERS[0] <= parameters <= FITTED_PARAMETERS[1]
        and flops <= FITTED_FLOPS
    )


def training_flops(parameters: float, tokens: float) -> float:
    """C = 6 N D: forward and backward matrix products of N parameters over D tokens."""
    return 6.0 * parameters * tokens


def attention_flops(n_layers: int, dim: int, seq_len: int, tokens: float) -> float:
    """The attention products that 6 N D leaves out: 12 L D S per token (PaLM, appendix B; not halved)."""
    return 12.0 * n_layers * dim * seq_len * tokens
