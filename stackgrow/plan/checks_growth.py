"""What is wrong with a growth: depths it cannot reach, keys its operator needs or does not know, what it cannot carry
over. Each check yields (TOML path, message). No torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from stackgrow.growth import learned_shapes, own
from stackgrow.growth.operators import OPERATORS, growth_rules, settings_of
from stackgrow.growth.rules import GrowthError, Moment
from stackgrow.plan.checks import head_problems
from stackgrow.plan.parts import Hop, factor_of
from stackgrow.plan.stages import TrainStage
from stackgrow.recipe.keys import Growth, Recipe
from stackgrow.recipe.load import Problem
from stackgrow.recipe.write import to_dict

MAX_LAYERS = 4096
# What a schedule that goes on from one stage to the next must have in common in both: keys of [train], and what they
# come to in steps.
SCHEDULE_KEYS = (
    "learning_rate",
    "min_learning_rate",
    "schedule",
    "decay_fraction",
    "global_batch_tokens",
)
SCHEDULE_STEPS = ("warmup_steps", "horizon_steps")


def depth_problems(
    recipe: Recipe, growth: Growth, n_source: int, where: str
) -> Iterator[Problem]:
    """Whether factor, order and layer map say one thing, and one that can be: from ``n_source`` layers."""
    factor = factor_of(growth)
    if growth.layer_map is not None:
        yield from _layer_map_problems(growth, growth.layer_map, n_source, where)
    elif factor is not None:
        n_target = factor * n_source
        if n_target > MAX_LAYERS:
            yield (
                f"{where}.factor",
                f"{factor} makes {n_target} layers of {n_source}; the limit is {MAX_LAYERS}",
            )
    elif len(recipe.growth) > 1:
        if not growth.model:
            yield (
                f"{where}.factor",
                "is missing; with several growths each needs a factor, a layer_map or a model",
            )
    elif recipe.model.n_layers % n_source:
        yield (
            f"{where}.factor",
            f"is missing, and none leads from {n_source} layers to model.n_layers = {recipe.model.n_layers}; "
            "change base.n_layers or give a layer_map",
        )


def _layer_map_problems(
    growth: Growth, layer_map: tuple[int, ...], n_source: int, where: str
) -> Iterator[Problem]:
    if growth.factor is not None:
        yield f"{where}.layer_map", "stands beside a factor; give one of the two"
    if growth.order != "stack":
        yield (
            f"{where}.order",
            f'"{growth.order}" has no meaning beside a layer_map; remove one of the two',
        )
    highest = max(layer_map)
    if highest >= n_source:
        yield (
            f"{where}.layer_map",
            f"names layer {highest}; the source has layers 0 to {n_source - 1}",
        )
    n_target = len(layer_map)
    if not n_source <= n_target <= MAX_LAYERS:
        rule = f"at least the source's {n_source} and at most {MAX_LAYERS}"
        yield f"{where}.layer_map", f"makes {n_target} layers; it must make {rule}"


def operator_problems(hop: Hop, recipe: Recipe) -> Iterator[Problem]:
    """Whether the operator is defined between these two models: its rules are made, and nothing is computed."""
    final = recipe.model
    last = hop.growth is recipe.growth[-1]
    if (
        last
        and hop.growth.model
        and dataclasses.replace(final, n_layers=hop.target.n_layers) != hop.target
    ):
        yield (
            f"{hop.where}.model",
            "differs from [model], to which the last growth leads; remove it",
        )
        return
    if any(head_problems(final, "model")):
        return  # geometry_problems tell it
    yield from operator_key_problems(hop)
    yield from carry_problems(hop)
    try:
        _make_rules(hop)
    except GrowthError as error:
        yield hop.where, str(error)


def _make_rules(hop: Hop) -> None:
    """Raises GrowthError where the operator does not define this growth."""
    name = hop.growth.operator
    if hop.operator.learned:
        learned_shapes.check_learned(hop.source, hop.target)
    elif not own.is_own(name):
        settings = settings_of(hop.growth)
        growth_rules(name, hop.source, hop.target, hop.layer_map, **settings)
    elif own.trusted():
        growth_rules(name, hop.source, hop.target, hop.layer_map)
        carried = hop.growth.optimizer != "reset" or hop.growth.lr_new
        if carried:  # which not every function can
            growth_rules(name, hop.source, hop.target, hop.layer_map, moment=Moment(1))


def operator_key_problems(hop: Hop) -> Iterator[Problem]:
    """Keys of [[growth]] that the operator needs, and those that have no meaning for it."""
    operator = hop.operator
    given = _given_keys(hop.growth)
    for name, example in operator.needs.items():
        if name not in given:
            yield (
                f"{hop.where}.{name}",
                f'is missing; "{operator.name}" needs it, such as {example}',
            )
    for name, reason in operator.refuses.items():
        if name in given:
            value, default = given[name]
            remedy = (
                f"remove it, or use {json.dumps(default)}" if default else "remove it"
            )
            rule = f'is not defined for "{operator.name}", which {reason}; {remedy}'
            yield f"{hop.where}.{name}", f"{json.dumps(to_dict(value))} {rule}"
    for name in sorted(_keys_of_some_operators() - operator.keys):
        if name in given:
            yield (
                f"{hop.where}.{name}",
                f'has no meaning for "{operator.name}"; remove it',
            )


def _given_keys(growth: Growth) -> dict[str, tuple[Any, Any]]:
    """Key -> (its value, its default), of the keys of [[growth]] that say something else than their default."""
    given = {}
    for spec in dataclasses.fields(Growth):
        default = spec.default
        if spec.default_factory is not dataclasses.MISSING:
            default = spec.default_factory()
        value = getattr(growth, spec.name)
        if value != default:
            given[spec.name] = (value, default)
    return given


def _keys_of_some_operators() -> set[str]:
    keys: set[str] = set()
    for operator in OPERATORS.values():
        keys |= operator.keys
    return keys


def trust_problems(recipe: Recipe) -> Iterator[Problem]:
    """Operators that are code, and may not run."""
    for index, growth in enumerate(recipe.growth):
        if own.is_own(growth.operator) and not own.trusted():
            rule = "names code, which a recipe from a stranger may, too; read it, then give --trust on the command line"
            yield f"growth[{index}].operator", f'"{growth.operator}" {rule}'


def carry_problems(hop: Hop) -> Iterator[Problem]:
    """What is carried over must be there before the growth; and frozen layers must be the source's own, in place, with
    all new ones above them."""
    growth, where = hop.growth, hop.where
    if growth.timing == "start":
        rule = "has nothing to go on from: base.from brings weights alone; use"
        if growth.optimizer != "reset":
            yield f"{where}.optimizer", f'{rule} "reset"'
        if growth.lr != "restart":
            yield f"{where}.lr", f'{rule} "restart"'
    is_defined = "lr_new" not in hop.operator.refuses
    if growth.lr_new and is_defined and growth.lr != "continue":
        yield (
            f"{where}.lr_new",
            'stands beside a schedule that goes on for all other parameters; give lr = "continue", or remove it',
        )
    if growth.freeze is None:
        return
    own_layers = list(range(hop.source.n_layers))
    if hop.widens:
        yield (
            f"{where}.freeze",
            "has no meaning where widths grow: every layer has new parameters; remove it",
        )
    elif hop.target.tie_embeddings:
        yield (
            f"{where}.freeze",
            "is not defined with model.tie_embeddings: it freezes the embedding and trains the head, which are one "
            "matrix; remove it",
        )
    elif (
        hop.layer_map is None
        or list(hop.layer_map[: hop.source.n_layers]) != own_layers
    ):
        given = f"[{', '.join(map(str, hop.layer_map))}]" if hop.layer_map else "none"
        rule = f"needs a layer map that begins with {own_layers}, the layers that it freezes; it is {given}"
        yield (
            f"{where}.freeze",
            f"{rule}; change the order or the layer_map, or remove freeze",
        )


def continued_problems(
    stage: TrainStage, before: TrainStage, where: str
) -> Iterator[Problem]:
    """A schedule goes on only where it is the same one, and long enough."""
    ends_with_stage = stage.train.horizon == "stage"
    changes = []
    for name in SCHEDULE_KEYS:
        changes.append((name, getattr(before.train, name), getattr(stage.train, name)))
    if not ends_with_stage:
        for name in SCHEDULE_STEPS:
            changes.append((name, getattr(before, name), getattr(stage, name)))
    shown = [f"{name} {old} -> {new}" for name, old, new in changes if old != new]
    if shown:
        yield (
            f"{where}.lr",
            f'goes on with the schedule of {before.name}, but {", ".join(shown)}; keep them, or use "restart" with '
            f"a warm-up in [growth.train]",
        )
    if ends_with_stage:
        assert stage.schedule is not None
        yield (
            f"{where}.lr",
            f'goes on with the schedule of {before.name}, which ends with it: train.horizon is "stage"; give the '
            f'steps of all stages that share the schedule, "{stage.schedule.steps + stage.steps} steps" or more',
        )


def new_rate_problems(stage: TrainStage, where: str) -> Iterator[Problem]:
    """New parameters have a rate of their own beside a cosine, and as long as that is."""
    if not stage.new_rate or not stage.schedule:
        return
    if stage.train.schedule != "cosine":
        yield (
            f"{where}.lr_new",
            f'ends in a cosine (SPARKLING, eq. 28), and train.schedule is "{stage.train.schedule}"; use "cosine", or '
            "remove it",
        )
    left = stage.horizon_steps - stage.schedule.steps
    rising = stage.new_rate.rewarm.rewarm_steps
    if rising >= left:
        yield (
            f"{where}.lr_new",
            f"rises for {rising} of the {left} steps that its schedule has left, and then falls; lower rewarm_steps",
        )
