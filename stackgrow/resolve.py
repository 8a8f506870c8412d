"""Recipe -> Plan: every growth and every stage resolved, and every contradiction found on the way. No torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackgrow import guidelines
from stackgrow.growth import learned_shapes
from stackgrow.growth.depth import interleave_map, stack_map
from stackgrow.growth.operators import growth_rules
from stackgrow.growth.rules import GrowthError
from stackgrow.kinds import Duration, human, nearest
from stackgrow.load import Problem, RecipeError
from stackgrow.plan import GrowStage, LearnStage, Plan, Stage, TrainStage
from stackgrow.recipe import Growth, Model, Recipe, Train

MAX_LAYERS = 4096


def make_plan(recipe: Recipe, file: str | Path = "recipe") -> Plan:
    """The stages of a checked recipe.

    Raises:
        RecipeError: impossible geometry, unreachable layers, contradictory budgets or schedules; all at once.
    """
    problems = [*_geometry_problems(recipe), *_parallel_problems(recipe)]
    hops, blocking = _resolve_growths(recipe)
    parts = _parts(recipe, hops)
    blocking += [problem for part in parts for problem in _batch_problems(part, recipe.data.seq_len)]
    problems += [*blocking, *(problem for part in parts for problem in _train_problems(part, recipe))]
    stages = [] if blocking else _resolve_stages(recipe, parts, problems)
    if problems:
        raise RecipeError(file, list(dict.fromkeys(problems)))  # stages share the keys of [train]
    return Plan(recipe, tuple(stages), tuple(_notes(recipe, hops)))


@dataclass(frozen=True)
class _Hop:
    """One growth, resolved: the models on both sides and the layer map between them."""

    growth: Growth
    where: str
    source: Model
    target: Model
    layer_map: tuple[int, ...] | None


@dataclass(frozen=True)
class _Part:
    """A train stage before its steps are known: its model, [train] with its own keys, its growth, which it comes
    before; or which it ``learns``."""

    model: Model
    train: Train
    table: str
    own: Collection[str]
    hop: _Hop | None
    learns: bool = False

    def where(self, key: str) -> str:
        """The TOML path that this stage's value of ``key`` comes from."""
        return f"{self.table}.{key}" if key in self.own else f"train.{key}"


def _parts(recipe: Recipe, hops: Sequence[_Hop]) -> list[_Part]:
    models = [hops[0].source if hops else recipe.model, *(hop.target for hop in hops)]
    own = [recipe.base.train if recipe.base else {}, *(hop.growth.train for hop in hops)]
    tables = ["base.train", *(f"{hop.where}.train" for hop in hops)]
    parts = []
    for model, keys, table, hop in zip(models, own, tables, [*hops, None], strict=True):
        parts.append(_Part(model, dataclasses.replace(recipe.train, **keys), table, keys, hop))
        if hop and hop.growth.operator == "learn":
            train = dataclasses.replace(recipe.train, **hop.growth.learn)
            parts.append(_Part(hop.target, train, f"{hop.where}.learn", hop.growth.learn, hop, learns=True))
    return parts


def _geometry_problems(recipe: Recipe) -> Iterator[Problem]:
    yield from _head_problems(recipe.model, "model")
    if recipe.growth and recipe.base is None:
        yield (
            "base",
            "is missing; [[growth]] needs a table [base] that names the base model, e.g. n_layers = 2",
        )
    if recipe.base is not None and not recipe.growth:
        yield "growth", "is missing; [base] needs a [[growth]] that leads from it to [model]"


def _head_problems(m: Model, where: str) -> Iterator[Problem]:
    if m.dim % m.n_heads:
        yield f"{where}.n_heads", f"{m.n_heads} does not divide {where}.dim = {m.dim}; choose a divisor of {m.dim}"
    elif m.head_dim % 2:
        yield f"{where}.n_heads", f"gives heads of odd width {m.head_dim}; rotary embeddings need an even one"
    if m.n_heads % m.kv_heads:
        yield f"{where}.n_kv_heads", f"{m.kv_heads} does not divide {where}.n_heads = {m.n_heads}"


def _parallel_problems(recipe: Recipe) -> Iterator[Problem]:
    p, m, seq_len = recipe.parallel, recipe.model, recipe.data.seq_len
    base = recipe.base.model if recipe.base else {}
    if p.pipeline > 1:
        yield (
            "parallel.pipeline",
            f"{p.pipeline} is not supported: torchtitan 0.2.2 does not divide pipeline gradients by the "
            "number of tokens, so clipping always fires; use parallel.shard and parallel.tensor",
        )
    if p.context > 1:
        yield "parallel.context", f"{p.context} is not supported; use parallel.shard and parallel.tensor"
    for name in ("n_heads", "n_kv_heads", "ffn_dim", "vocab_size"):
        for where, size in (("model", getattr(m, name)), ("base.model", base.get(name))):
            if size and size % p.tensor:
                yield "parallel.tensor", f"{p.tensor} does not divide {where}.{name} = {size}"
    if p.tensor > 1 and seq_len % (2 * p.tensor):
        yield "parallel.tensor", f"data.seq_len = {seq_len} must be a multiple of 2 x tensor = {2 * p.tensor}"


def _resolve_growths(recipe: Recipe) -> tuple[list[_Hop], list[Problem]]:
    """The growths in order, and what prevents them; none where [base] or [[growth]] is missing."""
    hops: list[_Hop] = []
    if not recipe.growth or recipe.base is None:
        return hops, []
    source = _resized(recipe.model, recipe.base.model, recipe.base.n_layers or recipe.model.n_layers)
    if recipe.base.model and (problems := list(_head_problems(source, "base.model"))):
        return hops, problems
    for index, growth in enumerate(recipe.growth):
        where, last = f"growth[{index}]", index == len(recipe.growth) - 1
        if problems := list(_growth_problems(recipe, growth, source.n_layers, where)):
            return hops, problems  # the next growth's source is unknown
        layer_map = _layer_map(growth, source.n_layers, recipe.model.n_layers if last else source.n_layers)
        n_layers = len(layer_map) if layer_map else source.n_layers
        target = _resized(recipe.model if last else source, growth.model, n_layers)
        if growth.operator == "learn":
            layer_map = None  # how layers mix is learned
        hops.append(_Hop(growth, where, source, target, layer_map))
        if growth.model and (problems := list(_head_problems(target, f"{where}.model"))):
            return hops, problems
        if problems := list(_operator_problems(hops[-1], recipe.model, last)):
            return hops, problems
        source = target
    if source.n_layers == recipe.model.n_layers:
        return hops, []
    path = " -> ".join(str(n) for n in [hops[0].source.n_layers, *(hop.target.n_layers for hop in hops)])
    rule = f"lead {path} layers, but model.n_layers = {recipe.model.n_layers}"
    return hops, [("growth", f"the growths {rule}; change base.n_layers, a factor, or give a layer_map")]


def _resized(model: Model, widths: dict[str, Any], n_layers: int) -> Model:
    """``model`` with other widths and depth; key/value heads follow the heads where there are as many."""
    if "n_heads" in widths and model.n_kv_heads == model.n_heads:
        widths = {"n_kv_heads": widths["n_heads"], **widths}
    return dataclasses.replace(model, n_layers=n_layers, **widths)


def _operator_problems(hop: _Hop, final: Model, last: bool) -> Iterator[Problem]:
    """Whether the operator is defined between these two models: its rules are made, and nothing is computed."""
    if last and hop.growth.model and dataclasses.replace(final, n_layers=hop.target.n_layers) != hop.target:
        yield f"{hop.where}.model", "differs from [model], to which the last growth leads; remove it"
        return
    if any(_head_problems(final, "model")):
        return  # told already
    if (hop.growth.ramp is None) == (hop.growth.operator == "random"):
        missing = 'is missing; "random" needs one, such as "1000 steps"'
        extra = f'has no meaning for "{hop.growth.operator}"; remove it'
        yield f"{hop.where}.ramp", missing if hop.growth.ramp is None else extra
    yield from _learn_keys_problems(hop)
    try:
        if hop.growth.operator == "learn":
            learned_shapes.check_learned(hop.source, hop.target)
        else:
            growth_rules(hop.growth.operator, hop.source, hop.target, hop.layer_map)
    except GrowthError as error:
        yield hop.where, str(error)


def _learn_keys_problems(hop: _Hop) -> Iterator[Problem]:
    growth = hop.growth
    if growth.operator == "learn":
        if growth.learn_steps is None:
            yield f"{hop.where}.learn_steps", 'is missing; "learn" needs it, such as "100 steps"'
        for name, given in {"layer_map": growth.layer_map is not None, "order": growth.order != "stack"}.items():
            if given:
                yield f"{hop.where}.{name}", 'has no meaning for "learn", which learns how layers mix; remove it'
        return
    for name, given in {"learn_steps": growth.learn_steps is not None, "learn": bool(growth.learn)}.items():
        if given:
            yield f"{hop.where}.{name}", f'has no meaning for "{growth.operator}"; remove it'


def _growth_problems(recipe: Recipe, growth: Growth, n_source: int, where: str) -> Iterator[Problem]:
    if growth.layer_map is not None:
        if growth.factor is not None:
            yield f"{where}.layer_map", "stands beside a factor; give one of the two"
        if growth.order != "stack":
            yield (
                f"{where}.order",
                f'"{growth.order}" has no meaning beside a layer_map; remove one of the two',
            )
        if (top := max(growth.layer_map)) >= n_source:
            yield f"{where}.layer_map", f"names layer {top}; the source has layers 0 to {n_source - 1}"
        if not n_source <= (n := len(growth.layer_map)) <= MAX_LAYERS:
            rule = f"at least the source's {n_source} and at most {MAX_LAYERS}"
            yield f"{where}.layer_map", f"makes {n} layers; it must make {rule}"
    elif growth.factor is not None:
        if (n := growth.factor * n_source) > MAX_LAYERS:
            yield (
                f"{where}.factor",
                f"{growth.factor} makes {n} layers of {n_source}; the limit is {MAX_LAYERS}",
            )
    elif len(recipe.growth) > 1:
        if not growth.model:
            yield f"{where}.factor", "is missing; with several growths each needs a factor, a layer_map or a model"
    elif recipe.model.n_layers % n_source:
        yield (
            f"{where}.factor",
            f"is missing, and none leads from {n_source} layers to model.n_layers = {recipe.model.n_layers}; "
            "change base.n_layers or give a layer_map",
        )


def _layer_map(growth: Growth, n_source: int, n_final: int) -> tuple[int, ...] | None:
    if growth.layer_map is not None:
        return growth.layer_map
    n_target = n_source * growth.factor if growth.factor else n_final
    if n_target == n_source:
        return None
    return tuple((stack_map if growth.order == "stack" else interleave_map)(n_source, n_target))


def _resolve_stages(recipe: Recipe, parts: Sequence[_Part], problems: list[Problem]) -> list[Stage]:
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
        problems += _schedule_problems(stage, part)
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


def _stage_steps(recipe: Recipe, part: _Part, tokens: int, steps: int) -> int:
    """Steps up to the growth (nearest step) or to the end of the budget (never beyond it)."""
    if part.hop is None:
        return (recipe.budget.tokens - tokens) // part.train.global_batch_tokens
    if part.learns and (length := part.hop.growth.learn_steps):
        return length.steps(part.train.global_batch_tokens)
    timing = _timing(recipe, part.hop)
    if timing.unit == "steps":
        return timing.amount - steps
    return nearest(timing.amount - tokens, part.train.global_batch_tokens)


def _timing(recipe: Recipe, hop: _Hop) -> Duration:
    timing = hop.growth.timing
    return timing if isinstance(timing, Duration) else Duration(_auto_timing(recipe, hop), "tokens")


def _auto_timing(recipe: Recipe, hop: _Hop) -> int:
    n = hop.target.parameters()
    return round(guidelines.growth_timing(n, guidelines.training_flops(n, recipe.budget.tokens)))


def _batch_problems(part: _Part, seq_len: int) -> Iterator[Problem]:
    batch = part.train.global_batch_tokens
    if batch % seq_len:
        below = batch // seq_len * seq_len
        choices = f"the nearest are {below} and {below + seq_len}" if below else f"the least is {seq_len}"
        rule = f"is not a whole number of sequences of data.seq_len = {seq_len} tokens"
        yield part.where("global_batch_tokens"), f"{batch} {rule}; {choices} (2Mi means 2 x 2^20)"


def _train_problems(part: _Part, recipe: Recipe) -> Iterator[Problem]:
    peak, floor = part.train.learning_rate, part.train.min_learning_rate
    if floor > peak:
        yield part.where("min_learning_rate"), f"{floor:g} is above learning_rate = {peak:g}; lower it"
    if part.learns and recipe.parallel.tensor > 1:
        rule = '"learn" makes every weight on every rank; use parallel.shard'
        yield "parallel.tensor", f"{recipe.parallel.tensor} is not supported with {part.table}: {rule}"
    for name, off in (("compile", False), ("activation_checkpoint", "none"), ("cpu_offload", False)):
        if part.learns and (given := getattr(part.train, name)) != off:
            rule = f"is not supported where weights are made in the forward pass; set {part.table}.{name}"
            yield part.where(name), f"{json.dumps(given)} {rule} = {json.dumps(off)}"
    if recipe.parallel.async_tensor and recipe.parallel.tensor > 1 and not part.train.compile:
        yield "parallel.async_tensor", f"true needs {part.where('compile')} = true"


def _order_problem(recipe: Recipe, part: _Part, tokens: int) -> Problem:
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


def _schedule_problems(stage: TrainStage, part: _Part) -> Iterator[Problem]:
    if stage.mask and stage.every(stage.mask.ramp) > stage.steps:
        yield (
            part.table.replace(".train", ".ramp"),
            f"{stage.every(stage.mask.ramp)} steps are more than the {stage.steps} steps of {stage.name}; shorten it",
        )
    if stage.horizon_steps < stage.steps:
        yield (
            part.where("horizon"),
            f"{stage.horizon_steps} steps are fewer than the {stage.steps} steps of {stage.name}; "
            'make it longer, or "stage"',
        )
    if stage.warmup_steps > stage.steps:
        yield (
            part.where("warmup"),
            f"{stage.warmup_steps} steps are more than the {stage.steps} steps of {stage.name}; shorten it",
        )


def _notes(recipe: Recipe, hops: Sequence[_Hop]) -> Iterator[str]:
    for hop in hops:
        if hop.growth.timing == "auto":
            n = hop.target.parameters()
            c = guidelines.training_flops(n, recipe.budget.tokens)
            note = f"{hop.where}.timing: guideline d = {human(_auto_timing(recipe, hop))} tokens"
            fit = "" if guidelines.in_fitted_range(n, c) else ", extrapolated: fitted up to 3B, 1.2e21"
            yield f"{note} (N = {human(n)}, C = 6 N D = {c:.2e}{fit})"
        if unused := sorted(set(range(hop.source.n_layers)) - set(hop.layer_map or range(hop.source.n_layers))):
            yield f"{hop.where}.layer_map: source layers {', '.join(map(str, unused))} are dropped"


def world_problems(plan: Plan, world_size: int) -> Iterator[Problem]:
    """What does not fit the number of ranks that is there now."""
    p = plan.recipe.parallel
    fixed = p.replicate * p.tensor * max(p.shard, 1)
    if (p.shard > 0 and fixed != world_size) or world_size % fixed:
        remedy = f"start a multiple of {fixed} ranks"
        if p.shard > 0:
            remedy = f"start {fixed} ranks, or set parallel.shard = -1"
        yield (
            "parallel",
            f"replicate {p.replicate} x shard {p.shard} x tensor {p.tensor} does not make {world_size} ranks; {remedy}",
        )
        return
    data_ranks = world_size // p.tensor
    if p.replicate > 1 and data_ranks == p.replicate:
        yield (
            "parallel.replicate",
            f"{p.replicate} without sharding is DDP, in which torchtitan 0.2.2 divides gradients by the number of "
            "ranks once too often; use parallel.shard, alone or with replicate (HSDP)",
        )
    if p.tensor > 1 and data_ranks == 1 and any(s.train.precision == "bf16" for s in plan.train_stages):
        yield (
            "train.precision",
            'torchtitan ignores "bf16" with tensor parallel alone; add data-parallel ranks or use "fp32"',
        )
    for stage in plan.train_stages:
        if p.tensor > 1 and stage.mask and stage.mask.source.dim != stage.model.dim:
            yield "parallel.tensor", f'{p.tensor} cannot shard the widthwise mask of "random"; use parallel.shard'
        if stage.batch_sequences % data_ranks:
            yield (
                "train.global_batch_tokens",
                f"{stage.name}: {stage.batch_sequences} sequences per step cannot be shared equally by "
                f"{data_ranks} data ranks; use a multiple of {data_ranks * stage.seq_len} tokens",
            )
