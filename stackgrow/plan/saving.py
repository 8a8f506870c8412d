"""What a growth can be expected to save, by the speed-ups that the paper measured. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from stackgrow.growth.operators import operator_named
from stackgrow.plan.stages import Plan
from stackgrow.text import human

NEAR = math.log(1.2)  # what differs by less than a fifth was measured here


class Measured(NamedTuple):
    """A speed-up that the paper measured for G_stack, g = 4, d = 10B."""

    target: str
    non_embedding_parameters: float
    tokens: float  # of the scratch run
    speed_up: float  # FLOPs(scratch) / FLOPs(grown) - 1
    source: str


MEASURED = (
    Measured("410M", 308e6, 400e9, 0.531, "section 4.1, Figure 6"),
    Measured("410M", 308e6, 700e9, 0.310, "section 4.1, Figure 6"),
    Measured("1.1B", 1233e6, 100e9, 0.491, "section 3.2, Figure 3"),
    Measured("3B", 2234e6, 180e9, 0.486, "section 4.1, Figure 4"),
    Measured("3B", 2234e6, 240e9, 0.545, "section 4.1, Figure 4"),
    Measured("7B", 5671e6, 160e9, 0.408, "section 4.1, Figure 5"),
    Measured("7B", 5671e6, 220e9, 0.553, "section 4.1, Figure 5"),
    Measured("7B", 5671e6, 280e9, 0.538, "section 4.1, Figure 5"),
    Measured("7B", 5671e6, 300e9, 0.546, "section 1, Figure 1"),
)


@dataclass(frozen=True)
class Saving:
    """What a scratch run to the same loss would cost more, if the nearest speed-up that was measured holds here."""

    target: str
    tokens: float
    speed_up: float
    source: str
    flops: float
    caveats: tuple[str, ...]


def expected_saving(plan: Plan) -> Saving | None:
    """By the measured speed-up whose target and scratch tokens are nearest, in logarithms; None without growth."""
    if not plan.growths:
        return None
    n = plan.train_stages[-1].model.non_embedding_parameters()

    def distance(measured: Measured) -> float:
        of_size = abs(math.log(measured.non_embedding_parameters / n))
        return of_size + abs(
            math.log(measured.tokens / _scratch_tokens(plan, measured.speed_up))
        )

    nearest = min(MEASURED, key=distance)
    return Saving(
        target=nearest.target,
        tokens=nearest.tokens,
        speed_up=nearest.speed_up,
        source=nearest.source,
        flops=nearest.speed_up * plan.flops,
        caveats=tuple(_caveats(plan, nearest)),
    )


def _scratch_tokens(plan: Plan, speed_up: float) -> float:
    """Tokens of a scratch run that takes by ``speed_up`` more FLOPs than the plan."""
    return plan.flops * (1 + speed_up) / plan.train_stages[-1].flops_per_token


def _caveats(plan: Plan, nearest: Measured) -> Iterator[str]:
    """In what the plan differs from what was measured."""
    if len(plan.growths) > 1:
        yield f"{len(plan.growths)} growths, measured with one"
    if any(
        growth.noise or not operator_named(growth.operator).studied
        for growth in plan.growths
    ):
        yield "another operator than G_stack"
    n = plan.train_stages[-1].model.non_embedding_parameters()
    if abs(math.log(n / nearest.non_embedding_parameters)) > NEAR:
        measured = human(nearest.non_embedding_parameters)
        yield f"{human(n)} parameters without embeddings, measured with {measured}"
    tokens = _scratch_tokens(plan, nearest.speed_up)
    if abs(math.log(tokens / nearest.tokens)) > NEAR:
        yield f"the scratch run would have {human(tokens)} tokens, measured at {human(nearest.tokens)}"
