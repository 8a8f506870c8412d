"""What is wrong with a recipe beyond single keys: impossible geometry, keys that contradict each other, ranks that do
not fit. Each check yields (TOML path, message). No torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from stackgrow.growth import learned_shapes, own
from stackgrow.growth.operators import OPERATORS, growth_rules
from stackgrow.growth.rules import GrowthError, Moment
from stackgrow.plan.parts import Hop, Part, factor_of
from stackgrow.plan.stages import Plan, TrainStage
from stackgrow.recipe.keys import Growth, Model, Recipe
from stackgrow.recipe.load import Problem

MAX_LAYERS = 4096
LEAST_STEPS = 4  # of a stage whose loss decides its end: a slope is fitted over half of them


def geometry_problems(recipe: Recipe) -> Iterator[Problem]:
    yield from head_problems(recipe.model, "model")
    if recipe.growth and recipe.base is None:
        yield (
            "base",
            "is missing; [[growth]] needs a table [base] that names the base model, e.g. n_layers = 2",
        )
    if recipe.base is not None and not recipe.growth:
        yield "growth", "is missing; [base] needs a [[growth]] that leads from it to [model]"


def head_problems(m: Model, where: str) -> Iterator[Problem]:
    if m.dim % m.n_heads:
        yield f"{where}.n_heads", f"{m.n_heads} does not divide {where}.dim = {m.dim}; choose a divisor of {m.dim}"
    elif m.head_dim % 2:
        yield f"{where}.n_heads", f"gives heads of odd width {m.head_dim}; rotary embeddings need an even one"
    if m.n_heads % m.kv_heads:
        yield f"{where}.n_kv_heads", f"{m.kv_heads} does not divide {where}.n_heads = {m.n_heads}"


def data_problems(recipe: Recipe) -> Iterator[Problem]:
    data = recipe.data
    if not data.path and not data.mix:
        yield "data.path", "is missing; name a token store, or several with [[data.mix]]"
    if data.path and data.mix:
        yield "data.path", f'"{data.path}" stands beside [[data.mix]]; give one of the two'
    paths = [Path(mix.path) for mix in data.mix]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            yield f"data.mix[{i}].path", f'"{data.mix[i].path}" is in the mixture twice; add up its weights'


def base_problems(recipe: Recipe) -> Iterator[Problem]:
    base = recipe.base
    if base is None:
        return
    if base.position and not base.from_:
        yield "base.position", "has no meaning without base.from; remove it"
    for index, growth in enumerate(recipe.growth):
        if growth.timing == "start" and (index or not base.from_):
            yield f"growth[{index}].timing", '"start" is for the first growth of a base.from; give tokens or steps'
    if recipe.growth and recipe.growth[0].timing == "start":
        for name in (name for name in ("train", "parallel") if getattr(base, name)):
            yield f"base.{name}", 'has no meaning where the base grows at the "start", untrained; remove it'


def parallel_problems(part: Part, recipe: Recipe) -> Iterator[Problem]:
    p, m, seq_len = part.parallel, part.model, recipe.data.seq_len
    if p.pipeline > 1:
        yield (
            part.place("pipeline"),
            f"{p.pipeline} is not supported: torchtitan 0.2.2 does not divide pipeline gradients by the "
            "number of tokens, so clipping always fires; use parallel.shard and parallel.tensor",
        )
    if p.context > 1:
        yield part.place("context"), f"{p.context} is not supported; use parallel.shard and parallel.tensor"
    for name in ("n_heads", "n_kv_heads", "ffn_dim", "vocab_size"):
        size, final = getattr(m, name), getattr(recipe.model, name)
        owner = "model" if size == final else part.table.replace(".train", ".model")
        if size % p.tensor:
            yield part.place("tensor"), f"{p.tensor} does not divide {owner}.{name} = {size}"
    if p.tensor > 1 and seq_len % (2 * p.tensor):
        yield part.place("tensor"), f"data.seq_len = {seq_len} must be a multiple of 2 x tensor = {2 * p.tensor}"
    if p.async_tensor and p.tensor > 1 and not part.train.compile:
        yield part.place("async_tensor"), f"true needs {part.where('compile')} = true"


def operator_problems(hop: Hop, final: Model, last: bool) -> Iterator[Problem]:
    """Whether the operator is defined between these two models: its rules are made, and nothing is computed."""
    if last and hop.growth.model and dataclasses.replace(final, n_layers=hop.target.n_layers) != hop.target:
        yield f"{hop.where}.model", "differs from [model], to which the last growth leads; remove it"
        return
    if any(head_problems(final, "model")):
        return  # told already
    yield from operator_key_problems(hop)
    yield from carry_problems(hop)
    try:
        if hop.operator.learned:
            learned_shapes.check_learned(hop.source, hop.target)
        elif not own.is_own(hop.growth.operator):
            growth_rules(hop.growth.operator, hop.source, hop.target, hop.layer_map)
        elif own.trusted():
            growth_rules(hop.growth.operator, hop.source, hop.target, hop.layer_map)
            if hop.growth.optimizer != "reset":  # which not every function can carry over
                growth_rules(hop.growth.operator, hop.source, hop.target, hop.layer_map, moment=Moment(1))
    except GrowthError as error:
        yield hop.where, str(error)


def growth_problems(recipe: Recipe, growth: Growth, n_source: int, where: str) -> Iterator[Problem]:
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
    elif (factor := factor_of(growth)) is not None:
        if (n := factor * n_source) > MAX_LAYERS:
            yield (
                f"{where}.factor",
                f"{factor} makes {n} layers of {n_source}; the limit is {MAX_LAYERS}",
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


def batch_problems(part: Part, seq_len: int) -> Iterator[Problem]:
    phases, full = [p.batch for p in part.train.batch_warmup], part.train.global_batch_tokens
    batches = {**{f"batch_warmup[{i}]": batch for i, batch in enumerate(phases)}, "global_batch_tokens": full}
    for name, batch in batches.items():
        if batch % seq_len:
            below = batch // seq_len * seq_len
            choices = f"the nearest are {below} and {below + seq_len}" if below else f"the least is {seq_len}"
            rule = f"is not a whole number of sequences of data.seq_len = {seq_len} tokens"
            key, bracket, index = name.partition("[")
            yield part.where(key) + bracket + index, f"{batch} {rule}; {choices} (2Mi means 2 x 2^20)"
    if any(after <= before for before, after in pairwise([*phases, full])):
        yield part.where("batch_warmup"), f"batches {phases} do not rise to global_batch_tokens = {full}; order them"


def train_problems(part: Part, recipe: Recipe) -> Iterator[Problem]:
    peak, floor = part.train.learning_rate, part.train.min_learning_rate
    if floor > peak:
        yield part.where("min_learning_rate"), f"{floor:g} is above learning_rate = {peak:g}; lower it"
    yield from _limit_problems(part)
    if recipe.data.document_mask and part.train.attention != "flex":
        rule = f'"{part.train.attention}" cannot keep documents apart, as data.document_mask = true asks for'
        yield part.where("attention"), f'{rule}; use "flex", or set data.document_mask = false'
    yield from _kernel_problems(part)
    if part.train.precision == "float8":
        yield from _float8_problems(part, recipe.data.seq_len)


def _limit_problems(part: Part) -> Iterator[Problem]:
    """What the operator forbids whose maps this stage learns, or whose mask it raises."""
    hop = part.at_work
    if hop is None:
        return
    for limit in hop.operator.forbids:
        if limit.widthwise and not hop.widens:
            continue
        table, _, name = limit.key.rpartition(".")
        given = getattr(part.parallel if table else part.train, name)
        if given in limit.allowed:
            continue
        instead = json.dumps(limit.allowed[0])
        if table:
            yield part.place(name), f"{given} {limit.why} ({part.table}); use parallel.shard"
        else:
            yield part.where(name), f"{json.dumps(given)} {limit.why}; set {part.table}.{name} = {instead}"


def _float8_problems(part: Part, seq_len: int) -> Iterator[Problem]:
    """Every side of a float8 product is a multiple of 16. torchtitan leaves whole layers that are none in bf16, but
    does not look at their shards."""
    m, tensor = part.model, part.parallel.tensor
    if seq_len % 16:
        yield part.where("precision"), f'"float8" needs a data.seq_len that is a multiple of 16, not {seq_len}'
    for name, size in (("dim", m.dim), ("n_kv_heads x head", m.kv_heads * m.head_dim), ("ffn_dim", m.ffn_dim)):
        if size % 16 == 0 and size % (16 * tensor):
            rule = f'makes shards of {name} = {size} that are no multiples of 16, as "float8" needs'
            yield part.place("tensor"), f'{tensor} {rule}; use fewer, or "bf16"'


def _kernel_problems(part: Part) -> Iterator[Problem]:
    """What an attention kernel or the chunked loss cannot do."""
    train, tensor = part.train, part.parallel.tensor
    if train.attention == "flash_attn" and train.precision == "fp32":
        yield part.where("attention"), f'"flash_attn" computes in bf16 alone, not "{train.precision}"; use "sdpa"'
    if train.attention == "flash_attn" and part.model.head_dim > 256:
        rule = f"has heads of at most 256, not {part.model.head_dim}"
        yield part.where("attention"), f'"flash_attn" {rule}; use "sdpa" or more heads'
    if train.loss_chunk and tensor > 1:
        rule = f"is not supported with {part.place('tensor')} = {tensor}, whose loss_parallel shards the logits"
        yield part.where("loss_chunk"), f"{train.loss_chunk} {rule}; set it to 0"


def schedule_problems(stage: TrainStage, part: Part) -> Iterator[Problem]:
    """``stage``: what [train] has in it must fit, also where the loss decides how long it takes."""
    until = stage.until
    least, most = (until.min_steps, until.max_steps) if until else (stage.steps, stage.steps)
    rises = sum(steps for steps, _ in stage.batches.phases)
    inside = {part.where("warmup"): stage.warmup_steps, part.where("batch_warmup"): rises}
    if stage.mask:
        inside[part.table.replace(".train", ".ramp")] = stage.reached(stage.mask.ramp)
    if stage.freeze:
        inside[part.table.replace(".train", ".freeze")] = stage.frozen_steps
    if stage.schedule:
        del inside[part.where("warmup")]  # in a stage before
    for where, steps in inside.items():
        if steps > least:
            yield where, f"{steps} steps are more than the {least} steps of {stage.name}; shorten it"
    before = stage.schedule.steps if stage.schedule else 0
    if stage.horizon_steps < before + most and stage.train.horizon != "stage":
        rule = f"{stage.horizon_steps} steps are fewer than the {most} steps of {stage.name}"
        remedy = f" after the {before} before it; make it longer" if before else '; make it longer, or "stage"'
        yield part.where("horizon"), rule + remedy
    if until and part.hop and not LEAST_STEPS <= until.min_steps < until.max_steps:
        yield (
            f"{part.hop.where}.timing",
            f"gives {stage.name} {until.min_steps} to {until.max_steps} steps; max must be later than min, and min at "
            f"least {LEAST_STEPS} steps after the growth before, for a slope to be fitted over half of them",
        )


def world_problems(plan: Plan, world_size: int) -> list[Problem]:
    """What does not fit the number of ranks that is there now."""
    found = [problem for stage in plan.train_stages for problem in _rank_problems(plan, stage, world_size)]
    return list(dict.fromkeys(found))  # stages share the keys of [parallel]


def _rank_problems(plan: Plan, stage: TrainStage, world_size: int) -> Iterator[Problem]:
    p = stage.parallel
    who = "" if p == plan.recipe.parallel else f"{stage.name}: "
    fixed = p.replicate * p.tensor * max(p.shard, 1)
    if (p.shard > 0 and fixed != world_size) or world_size % fixed:
        remedy = f"start a multiple of {fixed} ranks"
        if p.shard > 0:
            remedy = f"start {fixed} ranks, or set parallel.shard = -1"
        layout = f"replicate {p.replicate} x shard {p.shard} x tensor {p.tensor}"
        yield "parallel", f"{who}{layout} does not make {world_size} ranks; {remedy}"
        return
    data_ranks = world_size // p.tensor
    if p.replicate > 1 and data_ranks == p.replicate:
        yield (
            "parallel.replicate",
            f"{who}{p.replicate} without sharding is DDP, in which torchtitan 0.2.2 divides gradients by the number of "
            "ranks once too often; use parallel.shard, alone or with replicate (HSDP)",
        )
    if stage.train.cpu_offload and data_ranks == p.replicate:
        yield "train.cpu_offload", f"{who}true needs parallel.shard of at least 2: torchtitan offloads what FSDP shards"
    if p.tensor > 1 and data_ranks == 1 and stage.train.precision != "fp32":
        yield (
            "train.precision",
            f'{who}torchtitan ignores "{stage.train.precision}" with tensor parallel alone; add data-parallel ranks '
            'or use "fp32"',
        )
    for sequences in sorted(batch // stage.seq_len for batch in stage.batches.sizes):
        if sequences % data_ranks:
            yield (
                "train.global_batch_tokens",
                f"{stage.name}: {sequences} sequences per step cannot be shared equally by "
                f"{data_ranks} data ranks; use a multiple of {data_ranks * stage.seq_len} tokens",
            )


# What of a stage makes its schedule, step for step.
SCHEDULE = ("warmup_steps", "horizon_steps")


TRAIN = ("learning_rate", "min_learning_rate", "schedule", "decay_fraction", "global_batch_tokens")


def operator_key_problems(hop: Hop) -> Iterator[Problem]:
    """Keys of [[growth]] that the operator needs, and those that have no meaning for it."""
    operator = hop.operator
    given = _given_keys(hop.growth)
    for name, example in operator.needs.items():
        if name not in given:
            yield f"{hop.where}.{name}", f'is missing; "{operator.name}" needs it, such as "{example}"'
    for name, reason in operator.refuses.items():
        if name in given:
            value, default = given[name]
            remedy = f"remove it, or use {json.dumps(default)}" if default else "remove it"
            rule = f'is not defined for "{operator.name}", which {reason}; {remedy}'
            yield f"{hop.where}.{name}", f"{json.dumps(value)} {rule}"
    for name in sorted(_keys_of_some_operators() - operator.keys):
        if name in given:
            yield f"{hop.where}.{name}", f'has no meaning for "{operator.name}"; remove it'


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
