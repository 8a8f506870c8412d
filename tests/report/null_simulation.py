"""How often a 95% interval of a speed-up excludes 0 where the truth is 0: it should be 5%.

    python tests/report/null_simulation.py                 the whole table, 500 comparisons a line, four minutes

Both sides of a comparison are runs of one law, calibrated on recipes/experiments/results (ratio_8x64_scratch): training
loss .79 + 1.58 (FLOPs / 1e14)^-.25 with a noise of .09 in every record, validation loss 2.14 + .78 (FLOPs / 1e14)^-.35
with one of .012; a seed is off by a normal number of .0135 (the spread of the last validation losses), and its FLOPs by
up to 0.4%. The "grown" side starts at 3% of the FLOPs.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np

from stackgrow.report.curves import (
    WINDOW,
    StageCurve,
    seed_curve,
    speed_ups,
    stage_curve,
)

TOTAL = 1.04e14  # FLOPs of a run
STEPS = 4000
SEED_SPREAD = 0.0135
FLOPS_SPREAD = 0.004


@dataclass(frozen=True)
class Case:
    name: str
    interval: int  # steps between records
    noise: float
    correlation: float = 0.0  # of a record's noise with that of the one before
    validation: bool = False

    def law(self, flops: np.ndarray) -> np.ndarray:
        if self.validation:
            return 2.14 + 0.78 * (flops / 1e14) ** -0.35
        return 0.79 + 1.58 * (flops / 1e14) ** -0.25


CASES = (
    Case("training loss, every step", 1, 0.09),
    Case("training loss, every step, rho .5", 1, 0.09, correlation=0.5),
    Case("training loss, every 20 steps", 20, 0.09),
    Case("training loss, every 20 steps, rho .5", 20, 0.09, correlation=0.5),
    Case("training loss, every 100 steps", 100, 0.09),
    Case("validation loss, every 250 steps", 250, 0.012, validation=True),
    Case(
        "validation loss, every 250 steps, rho .5",
        250,
        0.012,
        correlation=0.5,
        validation=True,
    ),
)


def correlated_noise(
    shape: tuple[int, int], correlation: float, rng: np.random.Generator
) -> np.ndarray:
    """Normal numbers of variance 1, [seeds, records], each correlated with the one before of its seed."""
    noise = rng.standard_normal(shape)
    if correlation:
        for i in range(1, shape[1]):
            noise[:, i] = (
                correlation * noise[:, i - 1]
                + np.sqrt(1 - correlation**2) * noise[:, i]
            )
    return noise


def simulated(
    case: Case, seeds: int, start: float, rng: np.random.Generator
) -> StageCurve:
    """A recipe's runs, whose target model is trained from the share ``start`` of the FLOPs on."""
    steps = np.arange(case.interval, STEPS + 1, case.interval)
    window = 0.0 if case.validation else WINDOW
    curves = []
    for noise in correlated_noise((seeds, len(steps)), case.correlation, rng):
        total = TOTAL * (1 + FLOPS_SPREAD * rng.uniform(-1, 1))
        flops = total * (start + (1 - start) * steps / STEPS)
        loss = (
            case.law(flops) + SEED_SPREAD * rng.standard_normal() + case.noise * noise
        )
        curves.append(seed_curve(flops, flops / 1e7, loss, window))
    curve = stage_curve("stage-0-train-8L", curves)
    assert curve is not None
    return curve


def excluded(
    case: Case, seeds: int, comparisons: int, seed: int = 0
) -> tuple[float, int]:
    """The share of intervals that exclude 0, and how many intervals there were."""
    rng = np.random.default_rng(seed)
    count = wrong = 0
    for _ in range(comparisons):
        baseline = simulated(case, seeds, 0.0, rng)
        run = simulated(case, seeds, 0.03, rng)
        for speed_up in speed_ups(baseline, run):
            if speed_up.interval is None:
                continue
            count += 1
            wrong += speed_up.interval.excludes_0
    return wrong / max(count, 1), count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--comparisons", type=int, default=500)
    arguments = parser.parse_args()
    print(f"{'':44}{'3 seeds':>10}{'5 seeds':>10}{'10 seeds':>10}")
    for case in CASES:
        shares = [
            excluded(case, seeds, arguments.comparisons)[0] for seeds in (3, 5, 10)
        ]
        print(
            f"{case.name:44}" + "".join(f"{share:>10.1%}" for share in shares),
            flush=True,
        )


if __name__ == "__main__":
    main()
