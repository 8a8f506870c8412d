"""Recipe -> Plan: every growth and every stage resolved, and every contradiction found on the way. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from stackgrow import guidelines
from stackgrow.checks import (
    batch_problems,
    data_problems,
    geometry_problems,
    growth_problems,
    head_problems,
    operator_problems,
    parallel_problems,
    schedule_problems,
    train_problems,
)
from stackgrow.growth.depth import interleave_map, stack_map
from stackgrow.kinds import Duration, human, nearest
from stackgrow.load import Problem, RecipeError
from stackgrow.parts import Hop, Part, parts_of, resized
from stackgrow.plan import GrowStage, LearnStage, Plan, Stage, TrainStage
from stackgrow.recipe import Growth, Recipe


def make_plan(recipe: Recipe, file: str | Path = "recipe") -> Plan:
    """The stages of a checked recipe.

    Raises:
        RecipeError: impossible geometry, unreachable layers, contradictory budgets or schedules; all at once.
    """
    problems = [*data_problems(recipe), *geometry_problems(recipe), *parallel_problems(recipe)]
    hops, blocking = _resolve_growths(recipe)
    parts = parts_of(recipe, hops)
    blocking += [problem for part in parts for problem in batch_problems(part, recipe.data.seq_len)]
    problems += [*blocking, *(problem for part in parts for problem in train_problems(part, recipe))]
    stages = [] if blocking else _resolve_stages(recipe, parts, problems)
    if problems:
        raise RecipeError(file, list(dict.fromkeys(problems)))  # stages share the keys of [train]
    return Plan(recipe, tuple(stages), tuple(_notes(recipe, hops)))


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
        layer_map = _layer_map(growth, source.n_layers, recipe.model.n_layers if last else source.n_layers)
        n_layers = len(layer_map) if layer_map else source.n_layers
        target = resized(recipe.model if last else source, growth.model, n_layers)
        if growth.operator == "learn":
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
    n_target = n_source * growth.factor if growth.factor else n_final
    if n_target == n_source:
        return None
    return tuple((stack_map if growth.order == "stack" else interleave_map)(n_source, n_target))


def _resolve_stages(recipe: Recipe, parts: Sequence[Part], problems: list[Problem]) -> list[Stage]:
    stages: list[Stage] = []
    tokens, sequences, steps, flops = 0, 0, 0, 0.0
    for part in parts:
        count = _stage_steps(recipe, part, tokens, steps)
        if count < 1:
            problems.append(_order_problem(recipe, part, tokens))
            break
        index, seq_len = len(stages), recipe.data.seq_len
        mask = stages[-1].mask if stages and isinstance(stages[-1], GrowStage) else None
        stage = TrainStage(index, part.model, part.train, seq_len, count, tokens, sequences, flops, mask)
        if part.learns and part.hop:
            values = (index, part.model, part.train, seq_len, count, tokens, sequences, flops)
            stage = LearnStage(*values, source=part.hop.source, seed=recipe.seed + index)
        problems += schedule_problems(stage, part)
        stages.append(stage)
        tokens, sequences = tokens + stage.tokens, sequences + count * stage.batch_sequences
        steps, flops = steps + count, flops + stage.flops
        if (hop := part.hop) and (part.learns or hop.growth.operator != "learn"):
            growth, seed = hop.growth, recipe.seed + index + 1
            stages.append(
                GrowStage(
                    index + 1, hop.source, hop.target, growth.operator, hop.layer_map, growth.noise, seed, growth.ramp
                )
            )
    return stages


def _stage_steps(recipe: Recipe, part: Part, tokens: int, steps: int) -> int:
    """Steps up to the growth (nearest step) or to the end of the budget (never beyond it)."""
    if part.hop is None:
        return (recipe.budget.tokens - tokens) // part.train.global_batch_tokens
    if part.learns and (length := part.hop.growth.learn_steps):
        return length.steps(part.train.global_batch_tokens)
    timing = _timing(recipe, part.hop)
    if timing.unit == "steps":
        return timing.amount - steps
    return nearest(timing.amount - tokens, part.train.global_batch_tokens)


def _timing(recipe: Recipe, hop: Hop) -> Duration:
    timing = hop.growth.timing
    return timing if isinstance(timing, Duration) else Duration(_auto_timing(recipe, hop), "tokens")


def _auto_timing(recipe: Recipe, hop: Hop) -> int:
    n = hop.target.parameters()
    return round(guidelines.growth_timing(n, guidelines.training_flops(n, recipe.budget.tokens)))


def _order_problem(recipe: Recipe, part: Part, tokens: int) -> Problem:
    step = f"{human(part.train.global_batch_tokens)} tokens"
    if part.hop is None:
        return (
            "budget.tokens",
            f"{human(recipe.budget.tokens)} leaves no step of {step} after {human(tokens)} of earlier "
            "stages; raise the budget or lower the timings",
        )
    timing = part.hop.growth.timing
    given = f'"auto" (here {human(_auto_timing(recipe, part.hop))})' if timing == "auto" else f'"{timing}"'
    return (
        f"{part.hop.where}.timing",
        f"{given} is not at least one step of {step} after the previous growth or the start, at "
        f"{human(tokens)}; timings count from the start of the run and must rise",
    )


def _notes(recipe: Recipe, hops: Sequence[Hop]) -> Iterator[str]:
    for hop in hops:
        if hop.growth.timing == "auto":
            n = hop.target.parameters()
            c = guidelines.training_flops(n, recipe.budget.tokens)
            note = f"{hop.where}.timing: guideline d = {human(_auto_timing(recipe, hop))} tokens"
            fit = "" if guidelines.in_fitted_range(n, c) else ", extrapolated: fitted up to 3B, 1.2e21"
            yield f"{note} (N = {human(n)}, C = 6 N D = {c:.2e}{fit})"
        if unused := sorted(set(range(hop.source.n_layers)) - set(hop.layer_map or range(hop.source.n_layers))):
            yield f"{hop.where}.layer_map: source layers {', '.join(map(str, unused))} are dropped"
