"""Recipe -> Plan: every growth and every stage resolved, and every contradiction found on the way. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from stackgrow.growth.depth import interleave_map, stack_map
from stackgrow.growth.operators import operator_named
from stackgrow.plan.checks import (
    base_problems,
    batch_problems,
    data_problems,
    geometry_problems,
    head_problems,
    parallel_problems,
    train_problems,
)
from stackgrow.plan.checks_growth import depth_problems, operator_problems
from stackgrow.plan.parts import Hop, factor_of, parts_of, resized
from stackgrow.plan.stages import Plan, Stage, TrainStage
from stackgrow.plan.timeline import lay_out, train_stages
from stackgrow.plan.timing import (
    bounds_note,
    connections_note,
    factor_note,
    timing_note,
    warmup_note,
)
from stackgrow.plan.until import Until
from stackgrow.recipe.keys import Growth, Model, Recipe
from stackgrow.recipe.load import Problem, RecipeError


def make_plan(
    recipe: Recipe,
    file: str | Path = "recipe",
    found: Mapping[str, int | str] | None = None,
) -> Plan:
    """The stages of a checked recipe; ``found`` is what stages have found out as they ran (see found.py).

    Raises:
        RecipeError: impossible geometry, unreachable layers, contradictory budgets or schedules; all at once.
    """
    found = dict(found or {})
    hops, growth_faults = resolve_growths(recipe)
    parts = parts_of(recipe, hops)
    trained = [part for part in parts if part.trained]

    # Without growths that lead somewhere and batches of whole sequences there are no stages.
    blocking = list(growth_faults)
    for part in trained:
        blocking.extend(batch_problems(part, recipe.data.seq_len))
    problems = [
        *data_problems(recipe),
        *geometry_problems(recipe),
        *base_problems(recipe),
        *blocking,
    ]
    for part in trained:
        problems.extend(parallel_problems(part, recipe))
        problems.extend(train_problems(part, recipe))

    # Where the loss decides when to grow, the plan has the latest growth, or the one that was found: the earliest must
    # be possible, too.
    stages: list[Stage] = []
    earliest: list[Stage] = []
    if not blocking:

        def steps_found(stage: TrainStage, until: Until) -> int:
            return int(found.get(stage.name, until.max_steps))

        stages, faults = lay_out(recipe, parts, steps_found)
        earliest, earliest_faults = lay_out(
            recipe, parts, lambda _, until: until.min_steps
        )
        problems.extend(faults + earliest_faults)
    if problems:
        without_repeats = list(
            dict.fromkeys(problems)
        )  # stages share the keys of [train]
        raise RecipeError(file, without_repeats)
    return Plan(
        recipe, tuple(stages), tuple(_notes(recipe, hops, stages, earliest)), found
    )


def resolve_growths(recipe: Recipe) -> tuple[list[Hop], list[Problem]]:
    """The growths in order, and what prevents them; none where [base] or [[growth]] is missing."""
    hops: list[Hop] = []
    if not recipe.growth or recipe.base is None:
        return hops, []
    source = resized(
        recipe.model, recipe.base.model, recipe.base.n_layers or recipe.model.n_layers
    )
    if recipe.base.model:
        problems = list(head_problems(source, "base.model"))
        if problems:
            return hops, problems
    for index, growth in enumerate(recipe.growth):
        problems = list(
            depth_problems(recipe, growth, source.n_layers, f"growth[{index}]")
        )
        if problems:
            return hops, problems  # the next growth's source is unknown
        hop = _hop(recipe, index, source)
        hops.append(hop)
        if growth.model:
            problems = list(head_problems(hop.target, f"{hop.where}.model"))
        if not problems:
            problems = list(operator_problems(hop, recipe))
        if problems:
            return hops, problems
        source = hop.target
    if source.n_layers == recipe.model.n_layers:
        return hops, []
    last = hops[-1]
    if last.growth.layer_map is not None:
        length = f"has {len(last.growth.layer_map)} entries, one for each layer after this growth"
        rule = f"{length}, but model.n_layers = {recipe.model.n_layers}; change one of the two"
        return hops, [(f"{last.where}.layer_map", rule)]
    depths = [hops[0].source.n_layers] + [hop.target.n_layers for hop in hops]
    path = " -> ".join(str(depth) for depth in depths)
    rule = f"lead {path} layers, but model.n_layers = {recipe.model.n_layers}"
    return hops, [
        (
            "growth",
            f"the growths {rule}; change base.n_layers, a factor, or give a layer_map",
        )
    ]


def _hop(recipe: Recipe, index: int, source: Model) -> Hop:
    """Growth ``index`` of ``source``: the last one leads to [model]."""
    growth = recipe.growth[index]
    last = index == len(recipe.growth) - 1
    # A growth that is alone must lead to the target's depth; of several, each says its own.
    alone = len(recipe.growth) == 1
    layer_map = _layer_map(
        growth, source.n_layers, recipe.model.n_layers if alone else source.n_layers
    )
    n_layers = len(layer_map) if layer_map else source.n_layers
    target = resized(recipe.model if last else source, growth.model, n_layers)
    if operator_named(growth.operator).learned:
        layer_map = None  # how layers mix is learned
    return Hop(growth, f"growth[{index}]", source, target, layer_map)


def _layer_map(growth: Growth, n_source: int, n_final: int) -> tuple[int, ...] | None:
    """The source layer of every target layer; None where the depth stays."""
    if growth.layer_map is not None:
        return growth.layer_map
    factor = factor_of(growth)
    n_target = n_source * factor if factor else n_final
    if n_target == n_source:
        return None
    if growth.order == "stack":
        return tuple(stack_map(n_source, n_target))
    return tuple(interleave_map(n_source, n_target))


def _notes(
    recipe: Recipe, hops: Sequence[Hop], stages: list[Stage], earliest: list[Stage]
) -> Iterator[str]:
    """What a reader should know before the run."""
    flops_of_earliest = sum(stage.flops for stage in train_stages(earliest))
    flops = sum(stage.flops for stage in train_stages(stages))
    for stage in train_stages(stages):
        yield from warmup_note(stage)
    for hop in hops:
        yield from timing_note(recipe, hop)
        waiting = [
            stage
            for stage in train_stages(stages)
            if stage.until and stage.model == hop.source
        ]
        if waiting:
            yield from bounds_note(waiting[0], hop, (flops_of_earliest, flops))
        yield from factor_note(recipe, hop)
        yield from connections_note(hop)
        if hop.layer_map:
            unused = sorted(set(range(hop.source.n_layers)) - set(hop.layer_map))
            if unused:
                yield f"{hop.where}.layer_map: source layers {', '.join(map(str, unused))} are dropped"
