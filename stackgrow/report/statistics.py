"""95% intervals from the spread between seeds: Welch's unequal variances, Student's t. numpy alone."""

from __future__ import annotations

import numpy as np

LEAST_SEEDS = 3  # of each recipe, below which no interval is stated
# 97.5% quantiles of Student's t by degrees of freedom; between them it is nearly a straight line in 1 / degrees.
DEGREES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 30, 60, np.inf)
QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.179, 2.131, 2.086, 2.042, 2.000, 1.960,
)  # fmt: skip


def student_t(degrees: np.ndarray | float) -> np.ndarray:
    """The 97.5% quantile of Student's t at ``degrees`` of freedom, at least 1 and not always whole."""
    inverse = 1 / np.array(DEGREES[::-1])
    return np.interp(1 / np.asarray(degrees), inverse, QUANTILES[::-1])


def half_width(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Half of the 95% interval of the difference between two means.

    ``first`` and ``second``: values of the seeds, [seeds, ...] with at least two seeds each; the rest broadcasts.
    """
    square_errors = [
        values.var(axis=0, ddof=1) / len(values) for values in (first, second)
    ]
    total = square_errors[0] + square_errors[1]
    weighted = square_errors[0] ** 2 / (len(first) - 1) + square_errors[1] ** 2 / (
        len(second) - 1
    )
    fewest = min(len(first), len(second)) - 1
    # Seeds that agree to the last bit leave nothing to weigh.
    degrees = np.divide(
        total**2, weighted, out=np.full_like(total, fewest), where=weighted > 0
    )
    return student_t(degrees) * np.sqrt(total)
