"""Recipe -> Plan: every growth and every stage resolved, and every contradiction found on the way. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stackgrow.growth.depth import interleave_map, stack_map
from stackgrow.growth.operators import operator_named
from stackgrow.plan.batches import Batches
from stackgrow.plan.checks import (
    base_problems,
    batch_problems,
    data_problems,
    geometry_problems,
    growth_problems,
    head_problems,
    lr_problems,
    operator_problems,
    parallel_problems,
    schedule_problems,
    train_problems,
)
from stackgrow.plan.parts import Hop, Part, factor_of, parts_of, resized
from stackgrow.plan.stages import Continued, Freeze, GrowStage, ImportStage, LearnStage, Plan, Stage, TrainStage
from stackgrow.plan.timing import bounds_note, due, factor_note, shown, timing_note
from stackgrow.plan.until import Until
from stackgrow.recipe.keys import Growth, LossSlope, Recipe
from stackgrow.recipe.load import Problem, RecipeError
from stackgrow.recipe.values import Duration, Rewarm, Share
from stackgrow.text import human

Ends = Callable[[str, Until], int]  # the steps of a stage, by its name, whose end the loss decides


def make_plan(recipe: Recipe, file: str | Path = "recipe", found: Mapping[str, int | str] | None = None) -> Plan:
    """The stages of a checked recipe; ``found`` is what stages have found out as they ran (see found.py).

    Raises:
        RecipeError: impossible geometry, unreachable layers, contradictory budgets or schedules; all at once.
    """
    known = dict(found or {})
    hops, blocking = _resolve_growths(recipe)
    parts = parts_of(recipe, hops)
    blocking += [problem for part in parts if part.trained for problem in batch_problems(part, recipe.data.seq_len)]
    problems = [*data_problems(recipe), *geometry_problems(recipe), *base_problems(recipe), *blocking]
    for part in parts:
        problems += (*parallel_problems(part, recipe), *train_problems(part, recipe)) if part.trained else ()
    stages: list[Stage] = []
    earliest = stages
    if not blocking:
        stages = _resolve_stages(recipe, parts, problems, lambda name, until: int(known.get(name, until.max_steps)))
        earliest = _resolve_stages(recipe, parts, problems, lambda _, until: until.min_steps)
    if problems:
        raise RecipeError(file, list(dict.fromkeys(problems)))  # stages share the keys of [train]
    return Plan(recipe, tuple(stages), tuple(_notes(recipe, hops, stages, earliest)), known)


def _resolve_growths(recipe: Recipe) -> tuple[list[Hop], list[Problem]]:
    """The growths in order, and what prevents them; none where [base] or [[growth]] is missing."""
    hops: list[Hop] = []
    if not recipe.growth or recipe.base is None:
        return hops, []
    source = resized(recipe.model, recipe.base.model, recipe.base.n_layers or recipe.model.n_layers)
    if recipe.base.model and (problems := list(head_problems(source, "base.model"))):
        return hops, problems
    for index, growth in enumerate(recipe.growth):
        where, last = f"growth[{index}]", index == len(recipe.growth) - 1
        if problems := list(growth_problems(recipe, growth, source.n_layers, where)):
            return hops, problems  # the next growth's source is unknown
        alone = len(recipe.growth) == 1  # it must lead to the target's depth; of several, each says its own
        layer_map = _layer_map(growth, source.n_layers, recipe.model.n_layers if alone else source.n_layers)
        n_layers = len(layer_map) if layer_map else source.n_layers
        target = resized(recipe.model if last else source, growth.model, n_layers)
        if operator_named(growth.operator).learned:
            layer_map = None  # how layers mix is learned
        hops.append(Hop(growth, where, source, target, layer_map))
        if growth.model and (problems := list(head_problems(target, f"{where}.model"))):
            return hops, problems
        if problems := list(operator_problems(hops[-1], recipe.model, last)):
            return hops, problems
        source = target
    if source.n_layers == recipe.model.n_layers:
        return hops, []
    path = " -> ".join(str(n) for n in [hops[0].source.n_layers, *(hop.target.n_layers for hop in hops)])
    rule = f"lead {path} layers, but model.n_layers = {recipe.model.n_layers}"
    return hops, [("growth", f"the growths {rule}; change base.n_layers, a factor, or give a layer_map")]


def _layer_map(growth: Growth, n_source: int, n_final: int) -> tuple[int, ...] | None:
    if growth.layer_map is not None:
        return growth.layer_map
    factor = factor_of(growth)
    n_target = n_source * factor if factor else n_final
    if n_target == n_source:
        return None
    return tuple((stack_map if growth.order == "stack" else interleave_map)(n_source, n_target))


def _resolve_stages(recipe: Recipe, parts: Sequence[Part], problems: list[Problem], ends: Ends) -> list[Stage]:
    stages: list[Stage] = []
    if recipe.base and (folder := recipe.base.from_):
        model = parts[0].model
        stages = [
            ImportStage(0, model, model, "import", None, 0.0, recipe.seed, folder=folder, position=recipe.base.position)
        ]
    grown: Hop | None = None  # the growth before this part
    for part in parts:
        hop = part.hop
        if part.trained:
            stage = _train_stage(recipe, part, stages, ends)
            if stage.steps < 1:
                problems.append(_order_problem(recipe, part, stage.start_tokens))
                break
            if grown and not part.learns:
                stage, wrong = _carried(stage, grown, stages)
                problems += wrong
            problems += schedule_problems(stage, part)
            stages.append(stage)
        if hop and (part.learns or not hop.operator.learned):
            index, growth = len(stages), hop.growth
            optimizer = None if growth.optimizer == "reset" else growth.optimizer
            how = (growth.operator, hop.layer_map, growth.noise, recipe.seed + index, growth.ramp, optimizer)
            stages.append(GrowStage(index, hop.source, hop.target, *how))
            grown = hop
    return stages


def _carried(stage: TrainStage, grown: Hop, stages: Sequence[Stage]) -> tuple[TrainStage, list[Problem]]:
    """The stage after a growth, with what the growth says of its schedule and its layers."""
    before = [s for s in stages if isinstance(s, TrainStage) and not isinstance(s, LearnStage)]
    freeze = Freeze(grown.source.n_layers, grown.growth.freeze) if grown.growth.freeze else None
    schedule = continued(grown.growth, before[-1]) if before else None
    stage = dataclasses.replace(stage, schedule=schedule, freeze=freeze)
    return stage, list(lr_problems(stage, before[-1], grown.where)) if schedule else []


def _train_stage(recipe: Recipe, part: Part, stages: Sequence[Stage], ends: Ends) -> TrainStage:
    """The stage after ``stages``, up to the growth (nearest step) or to the end of the budget (never beyond it); its
    steps are below 1 where there is no room for it."""
    before = [stage for stage in stages if isinstance(stage, TrainStage)]
    tokens, steps, flops = (sum(getattr(s, name) for s in before) for name in ("tokens", "steps", "flops"))
    position = before[-1].position(before[-1].steps) if before else recipe.base.position if recipe.base else 0
    mask = stages[-1].mask if stages and isinstance(stages[-1], GrowStage) else None
    common: dict[str, Any] = {"parallel": part.parallel, "document_mask": recipe.data.document_mask}
    own, batches, hop = (len(stages), part.model, part.train, recipe.data.seq_len), Batches.of(part.train), part.hop

    def stage(count: int, until: Until | None = None) -> TrainStage:
        return TrainStage(*own, count, tokens, position, flops, mask, until=until, **common)

    def up_to(timing: Duration | Share | str, hop: Hop) -> int:
        length = due(recipe, hop, timing)
        return length.amount - steps if length.unit == "steps" else batches.nearest(length.amount - tokens)

    if hop is None:
        return stage(batches.within(recipe.budget.tokens - tokens))
    if part.learns and hop.growth.learn_steps:
        count, seed = stage(0).reached(hop.growth.learn_steps), recipe.seed + len(stages)
        return LearnStage(*own, count, tokens, position, flops, source=hop.source, seed=seed, **common)
    if isinstance(timing := hop.growth.timing, LossSlope):
        until = Until(timing.loss_slope, up_to(timing.min, hop), up_to(timing.max, hop))
        return stage(ends(stage(0).name, until), until)
    return stage(up_to(timing, hop))


def _order_problem(recipe: Recipe, part: Part, tokens: int) -> Problem:
    step = f"{human(Batches.of(part.train).at(1))} tokens"
    if part.hop is None:
        return (
            "budget.tokens",
            f"{human(recipe.budget.tokens)} leaves no step of {step} after {human(tokens)} of earlier "
            "stages; raise the budget or lower the timings",
        )
    return (
        f"{part.hop.where}.timing",
        f"{shown(recipe, part.hop)} is not at least one step of {step} after the previous growth or the start, at "
        f"{human(tokens)}; timings count from the start of the run and must rise",
    )


def _notes(recipe: Recipe, hops: Sequence[Hop], stages: list[Stage], earliest: list[Stage]) -> Iterator[str]:
    flops = [sum(s.flops for s in plan if isinstance(s, TrainStage)) for plan in (earliest, stages)]
    for hop in hops:
        yield from timing_note(recipe, hop)
        before = [s for s in stages if isinstance(s, TrainStage) and s.model == hop.source and s.until]
        yield from bounds_note(before[0], hop, (flops[0], flops[1])) if before else ()
        yield from factor_note(hop)
        if unused := sorted(set(range(hop.source.n_layers)) - set(hop.layer_map or range(hop.source.n_layers))):
            yield f"{hop.where}.layer_map: source layers {', '.join(map(str, unused))} are dropped"


def continued(growth: Growth, before: TrainStage) -> Continued | None:
    """Where the schedule of the stage after ``growth`` begins; None where it restarts."""
    if growth.lr == "restart":
        return None
    steps = before.steps + (before.schedule.steps if before.schedule else 0)
    return Continued(steps, growth.lr if isinstance(growth.lr, Rewarm) else None)
