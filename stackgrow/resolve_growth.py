"""What a [[growth]] asks of the stage after it, beside its operator: optimizer, lr, freeze. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from stackgrow.kinds import Rewarm
from stackgrow.load import Problem
from stackgrow.parts import Hop
from stackgrow.plan import Continued, TrainStage
from stackgrow.recipe import Growth

# What of a stage makes its schedule, step for step.
SCHEDULE = ("warmup_steps", "horizon_steps")
TRAIN = ("learning_rate", "min_learning_rate", "schedule", "decay_fraction", "global_batch_tokens")


def learn_problems(growth: Growth, where: str) -> Iterator[Problem]:
    """Keys that "learn" needs, or that have no meaning for it or without it."""
    if growth.operator == "learn":
        if growth.learn_steps is None:
            yield f"{where}.learn_steps", 'is missing; "learn" needs it, such as "100 steps"'
        for name, given in {"layer_map": growth.layer_map is not None, "order": growth.order != "stack"}.items():
            if given:
                yield f"{where}.{name}", 'has no meaning for "learn", which learns how layers mix; remove it'
        if growth.optimizer != "reset":
            rule = 'is not defined for "learn", which mixes many weights into one: their exp_avg_sq do not tell its'
            yield f"{where}.optimizer", f'"{growth.optimizer}" {rule}; use "reset"'
        return
    for name, given in {"learn_steps": growth.learn_steps is not None, "learn": bool(growth.learn)}.items():
        if given:
            yield f"{where}.{name}", f'has no meaning for "{growth.operator}"; remove it'


def carry_problems(hop: Hop) -> Iterator[Problem]:
    """What is carried over must be there before the growth; and frozen layers must be the source's own, in place, with
    all new ones above them."""
    growth, where, source, target = hop.growth, hop.where, hop.source, hop.target
    for name, given, plain in (("optimizer", growth.optimizer, "reset"), ("lr", growth.lr, "restart")):
        if growth.timing == "start" and given != plain:
            yield f"{where}.{name}", f'has nothing to go on from: base.from brings weights alone; use "{plain}"'
    if growth.freeze is None:
        return
    old = list(range(source.n_layers))
    if dataclasses.replace(source, n_layers=target.n_layers) != target:
        yield f"{where}.freeze", "has no meaning where widths grow: every layer has new parameters; remove it"
    elif hop.layer_map is None or list(hop.layer_map[: source.n_layers]) != old:
        given = f"[{', '.join(map(str, hop.layer_map))}]" if hop.layer_map else "none"
        rule = f"needs a layer map that begins with {old}, the layers that it freezes; it is {given}"
        yield f"{where}.freeze", f"{rule}; change the order or the layer_map, or remove freeze"


def continued(growth: Growth, before: TrainStage) -> Continued | None:
    """Where the schedule of the stage after ``growth`` begins; None where it restarts."""
    if growth.lr == "restart":
        return None
    steps = before.steps + (before.schedule.steps if before.schedule else 0)
    return Continued(steps, growth.lr if isinstance(growth.lr, Rewarm) else None)


def lr_problems(stage: TrainStage, before: TrainStage, where: str) -> Iterator[Problem]:
    """A schedule goes on only where it is the same one, and long enough."""
    pairs = [(name, getattr(before.train, name), getattr(stage.train, name)) for name in TRAIN]
    if stage.train.horizon != "stage":
        pairs += [(name, getattr(before, name), getattr(stage, name)) for name in SCHEDULE]
    if changes := [f"{name} {old} -> {new}" for name, old, new in pairs if old != new]:
        yield (
            f"{where}.lr",
            f'goes on with the schedule of {before.name}, but {", ".join(changes)}; keep them, or use "restart" with '
            f"a warm-up in [growth.train]",
        )
    if stage.train.horizon == "stage":
        assert stage.schedule is not None
        yield (
            f"{where}.lr",
            f'goes on with the schedule of {before.name}, which ends with it: train.horizon is "stage"; give the '
            f'steps of all stages that share the schedule, "{stage.schedule.steps + stage.steps} steps" or more',
        )
