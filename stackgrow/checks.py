"""What is wrong with a recipe beyond single keys: impossible geometry, keys that contradict each other, ranks that do
not fit. Each check yields (TOML path, message). No torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

from stackgrow.growth import learned_shapes
from stackgrow.growth.operators import growth_rules
from stackgrow.growth.rules import GrowthError
from stackgrow.load import Problem
from stackgrow.parts import Hop, Part
from stackgrow.plan import Plan, TrainStage
from stackgrow.recipe import Growth, Model, Recipe

MAX_LAYERS = 4096


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
    paths = [mix.path for mix in data.mix]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            yield f"data.mix[{i}].path", f'"{path}" is in the mixture twice; add up its weights'


def parallel_problems(recipe: Recipe) -> Iterator[Problem]:
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


def operator_problems(hop: Hop, final: Model, last: bool) -> Iterator[Problem]:
    """Whether the operator is defined between these two models: its rules are made, and nothing is computed."""
    if last and hop.growth.model and dataclasses.replace(final, n_layers=hop.target.n_layers) != hop.target:
        yield f"{hop.where}.model", "differs from [model], to which the last growth leads; remove it"
        return
    if any(head_problems(final, "model")):
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


def _learn_keys_problems(hop: Hop) -> Iterator[Problem]:
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


def batch_problems(part: Part, seq_len: int) -> Iterator[Problem]:
    batch = part.train.global_batch_tokens
    if batch % seq_len:
        below = batch // seq_len * seq_len
        choices = f"the nearest are {below} and {below + seq_len}" if below else f"the least is {seq_len}"
        rule = f"is not a whole number of sequences of data.seq_len = {seq_len} tokens"
        yield part.where("global_batch_tokens"), f"{batch} {rule}; {choices} (2Mi means 2 x 2^20)"


def train_problems(part: Part, recipe: Recipe) -> Iterator[Problem]:
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
    yield from _kernel_problems(part, recipe)


def _kernel_problems(part: Part, recipe: Recipe) -> Iterator[Problem]:
    """What an attention kernel or the chunked loss cannot do."""
    train, tensor = part.train, recipe.parallel.tensor
    if train.attention == "flash_attn" and train.precision != "bf16":
        yield part.where("attention"), f'"flash_attn" computes in bf16 alone, not "{train.precision}"; use "sdpa"'
    if train.attention == "flash_attn" and part.model.head_dim > 256:
        rule = f"has heads of at most 256, not {part.model.head_dim}"
        yield part.where("attention"), f'"flash_attn" {rule}; use "sdpa" or more heads'
    if train.loss_chunk and tensor > 1:
        rule = f"is not supported with parallel.tensor = {tensor}, whose loss_parallel shards the logits"
        yield part.where("loss_chunk"), f"{train.loss_chunk} {rule}; set it to 0"


def schedule_problems(stage: TrainStage, part: Part) -> Iterator[Problem]:
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
