"""What is wrong with a recipe beyond single keys: impossible geometry, keys that contradict each other, ranks that do
not fit. Each check yields (TOML path, message). No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from stackgrow.plan.parts import Part
from stackgrow.plan.stages import Plan, TrainStage
from stackgrow.recipe.keys import Model, Recipe
from stackgrow.recipe.load import Problem

LEAST_STEPS = (
    4  # of a stage whose loss decides its end: a slope is fitted over half of them
)


def geometry_problems(recipe: Recipe) -> Iterator[Problem]:
    yield from head_problems(recipe.model, "model")
    if recipe.growth and recipe.base is None:
        yield (
            "base",
            "is missing; [[growth]] needs a table [base] that names the base model, e.g. n_layers = 2",
        )
    if recipe.base is not None and not recipe.growth:
        yield (
            "growth",
            "is missing; [base] needs a [[growth]] that leads from it to [model]",
        )


def head_problems(m: Model, where: str) -> Iterator[Problem]:
    if m.qk_norm and m.attention_bias:
        yield (
            f"{where}.attention_bias",
            f"true is not supported with {where}.qk_norm: no family in transformers has both; set one to false",
        )
    if m.states_head_dim:
        if m.head_dim % 2:
            yield (
                f"{where}.head_dim",
                f"{m.head_dim} must be even for rotary embeddings",
            )
    elif m.dim % m.n_heads:
        yield (
            f"{where}.n_heads",
            f"{m.n_heads} does not divide {where}.dim = {m.dim}; choose a divisor of {m.dim}",
        )
    elif m.head_dim % 2:
        yield (
            f"{where}.n_heads",
            f"gives heads of odd width {m.head_dim}; rotary embeddings need an even one",
        )
    if m.n_heads % m.kv_heads:
        yield (
            f"{where}.n_kv_heads",
            f"{m.kv_heads} does not divide {where}.n_heads = {m.n_heads}",
        )


def data_problems(recipe: Recipe) -> Iterator[Problem]:
    data = recipe.data
    if not data.path and not data.mix:
        yield (
            "data.path",
            "is missing; name a token store, or several with [[data.mix]]",
        )
    if data.path and data.mix:
        yield (
            "data.path",
            f'"{data.path}" stands beside [[data.mix]]; give one of the two',
        )
    paths = [Path(mix.path) for mix in data.mix]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            yield (
                f"data.mix[{i}].path",
                f'"{data.mix[i].path}" is in the mixture twice; add up its weights',
            )


def base_problems(recipe: Recipe) -> Iterator[Problem]:
    base = recipe.base
    if base is None:
        return
    if base.position and not base.from_:
        yield "base.position", "has no meaning without base.from; remove it"
    for index, growth in enumerate(recipe.growth):
        if growth.timing == "start" and (index or not base.from_):
            yield (
                f"growth[{index}].timing",
                '"start" is for the first growth of a base.from; give tokens or steps',
            )
    if recipe.growth and recipe.growth[0].timing == "start":
        for name in ("train", "parallel"):
            if getattr(base, name):
                yield (
                    f"base.{name}",
                    'has no meaning where the base grows at the "start", untrained; remove it',
                )


def parallel_problems(part: Part, recipe: Recipe) -> Iterator[Problem]:
    p, seq_len = part.parallel, recipe.data.seq_len
    if p.pipeline > 1:
        yield (
            part.parallel_path("pipeline"),
            f"{p.pipeline} is not supported: torchtitan 0.2.2 does not divide pipeline gradients by the "
            "number of tokens, so clipping always fires; use parallel.shard and parallel.tensor",
        )
    if p.context > 1:
        yield (
            part.parallel_path("context"),
            f"{p.context} is not supported; use parallel.shard and parallel.tensor",
        )
    for name in ("n_heads", "n_kv_heads", "ffn_dim", "vocab_size"):
        size = getattr(part.model, name)
        if size % p.tensor:
            owner = (
                "model" if size == getattr(recipe.model, name) else part.beside("model")
            )
            yield (
                part.parallel_path("tensor"),
                f"{p.tensor} does not divide {owner}.{name} = {size}",
            )
    if p.tensor > 1 and seq_len % (2 * p.tensor):
        rule = f"must be a multiple of 2 x tensor = {2 * p.tensor}"
        yield part.parallel_path("tensor"), f"data.seq_len = {seq_len} {rule}"
    if p.async_tensor and p.tensor > 1 and not part.train.compile:
        yield (
            part.parallel_path("async_tensor"),
            f"true needs {part.path('compile')} = true",
        )


def batch_problems(part: Part, seq_len: int) -> Iterator[Problem]:
    """Every batch must be whole sequences, and larger than the one before."""
    smaller = [phase.batch for phase in part.train.batch_warmup]
    full = part.train.global_batch_tokens
    for index, batch in enumerate(smaller):
        if batch % seq_len:
            yield f"{part.path('batch_warmup')}[{index}]", _not_whole(batch, seq_len)
    if full % seq_len:
        yield part.path("global_batch_tokens"), _not_whole(full, seq_len)
    if any(after <= before for before, after in pairwise([*smaller, full])):
        yield (
            part.path("batch_warmup"),
            f"batches {smaller} do not rise to global_batch_tokens = {full}; order them",
        )


def _not_whole(batch: int, seq_len: int) -> str:
    below = batch // seq_len * seq_len
    choices = (
        f"the nearest are {below} and {below + seq_len}"
        if below
        else f"the least is {seq_len}"
    )
    rule = f"is not a whole number of sequences of data.seq_len = {seq_len} tokens"
    return f"{batch} {rule}; {choices} (2Mi means 2 x 2^20)"


def train_problems(part: Part, recipe: Recipe) -> Iterator[Problem]:
    peak, floor = part.train.learning_rate, part.train.min_learning_rate
    if floor > peak:
        yield (
            part.path("min_learning_rate"),
            f"{floor:g} is above learning_rate = {peak:g}; lower it",
        )
    yield from _limit_problems(part)
    if recipe.data.document_mask and part.train.attention != "flex":
        rule = f'"{part.train.attention}" cannot keep documents apart, as data.document_mask = true asks for'
        yield (
            part.path("attention"),
            f'{rule}; use "flex", or set data.document_mask = false',
        )
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
            yield (
                part.parallel_path(name),
                f"{given} {limit.why} ({part.table}); use parallel.shard",
            )
        else:
            yield (
                part.path(name),
                f"{json.dumps(given)} {limit.why}; set {part.table}.{name} = {instead}",
            )


def _float8_problems(part: Part, seq_len: int) -> Iterator[Problem]:
    """Every side of a float8 product is a multiple of 16. torchtitan leaves whole layers that are none in bf16, but
    does not look at their shards."""
    model, tensor = part.model, part.parallel.tensor
    sides = {
        "dim": model.dim,
        "n_heads x head": model.query_width,
        "n_kv_heads x head": model.kv_heads * model.head_dim,
        "ffn_dim": model.ffn_dim,
    }
    if seq_len % 16:
        yield (
            part.path("precision"),
            f'"float8" needs a data.seq_len that is a multiple of 16, not {seq_len}',
        )
    for name, size in sides.items():
        if size % 16 == 0 and size % (16 * tensor):
            rule = f'makes shards of {name} = {size} that are no multiples of 16, as "float8" needs'
            yield part.parallel_path("tensor"), f'{tensor} {rule}; use fewer, or "bf16"'


def _kernel_problems(part: Part) -> Iterator[Problem]:
    """What an attention kernel or the chunked loss cannot do."""
    train, tensor = part.train, part.parallel.tensor
    if train.attention == "flash_attn" and train.precision == "fp32":
        yield (
            part.path("attention"),
            f'"flash_attn" computes in bf16 alone, not "{train.precision}"; use "sdpa"',
        )
    if train.attention == "flash_attn" and part.model.head_dim > 256:
        rule = f"has heads of at most 256, not {part.model.head_dim}"
        yield part.path("attention"), f'"flash_attn" {rule}; use "sdpa" or more heads'
    if train.loss_chunk and tensor > 1:
        rule = f"is not supported with {part.parallel_path('tensor')} = {tensor}, whose loss_parallel shards the logits"
        yield part.path("loss_chunk"), f"{train.loss_chunk} {rule}; set it to 0"


def schedule_problems(stage: TrainStage, part: Part) -> Iterator[Problem]:
    """What [train] and the growth before have in ``stage`` must fit, also where the loss decides how long it takes."""
    if not stage.steps:  # nothing is scheduled
        return
    until = stage.until
    shortest = until.min_steps if until else stage.steps
    longest = until.max_steps if until else stage.steps

    lengths = {}
    if not stage.schedule:  # else it was in a stage before
        lengths[part.path("warmup")] = stage.warmup_steps
    lengths[part.path("batch_warmup")] = stage.batches.warmup_steps
    if stage.mask:
        lengths[part.beside("ramp")] = stage.reached(stage.mask.ramp)
    if stage.freeze:
        lengths[part.beside("freeze")] = stage.frozen_steps
    for where, steps in lengths.items():
        if steps > shortest:
            yield (
                where,
                f"{steps} steps are more than the {shortest} steps of {stage.name}; shorten it",
            )

    before = stage.schedule.steps if stage.schedule else 0
    if stage.horizon_steps < before + longest and stage.train.horizon != "stage":
        rule = f"{stage.horizon_steps} steps are fewer than the {longest} steps of {stage.name}"
        remedy = (
            f" after the {before} before it; make it longer"
            if before
            else '; make it longer, or "stage"'
        )
        yield part.path("horizon"), rule + remedy
    if until and part.hop and not LEAST_STEPS <= until.min_steps < until.max_steps:
        yield (
            f"{part.hop.where}.timing",
            f"gives {stage.name} {until.min_steps} to {until.max_steps} steps; max must be later than min, and min at "
            f"least {LEAST_STEPS} steps after the growth before, for a slope to be fitted over half of them",
        )


def world_problems(plan: Plan, world_size: int) -> list[Problem]:
    """What does not fit the number of ranks that is there now."""
    problems: list[Problem] = []
    for stage in plan.train_stages:
        problems.extend(_rank_problems(plan, stage, world_size))
    return list(dict.fromkeys(problems))  # stages share the keys of [parallel]


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
        yield (
            "train.cpu_offload",
            f"{who}true needs parallel.shard of at least 2: torchtitan offloads what FSDP shards",
        )
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
