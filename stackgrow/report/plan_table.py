"""A plan as text for people and as plain values for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

from stackgrow.plan.stages import GrowStage, Plan, TrainStage
from stackgrow.recipe.write import recipe_hash, to_dict
from stackgrow.text import aligned, human, printable, wrapped

if TYPE_CHECKING:
    from stackgrow.data.order import Order
    from stackgrow.data.store import Manifest

LONG_GROUP = 4  # consecutive layers from here on are shown as first-last
MODEL_HEAD = (
    "stage",
    "layers",
    "dim",
    "parameters",
    "non-embedding",
    "tokens",
    "steps",
    "sequences/step",
    "from token",
)
COST_HEAD = (
    "stage",
    "FLOPs",
    "share",
    "attention",
    "LR first",
    "peak",
    "last",
    "checkpoint",
)


def render_plan(plan: Plan, order: Order | None = None) -> str:
    """The plan in at most 120 columns: what is trained, what it costs, how it grows; with the ``order`` of its data,
    how often it goes over them."""
    head = _header(plan)
    if order:
        head.extend(_data_lines(plan, order))
    growths: list[str] = []
    for stage in plan.grow_stages:
        growths.extend(_growth_lines(stage))
    blocks = [
        head,
        aligned(_model_table(plan)),
        aligned(_cost_table(plan)),
        growths,
        _remark_lines(plan),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _header(plan: Plan) -> list[str]:
    recipe = plan.recipe
    stores = ", ".join(path for path, _ in recipe.data.stores)
    budget = f"{recipe.budget.tokens:,} tokens asked for, {plan.tokens:,} planned"
    missing = recipe.budget.tokens - plan.tokens
    if missing:
        step = plan.train_stages[-1].train.global_batch_tokens
        budget += f"; the other {missing:,} are less than one step of {step:,}"
    return [
        *wrapped(
            f"{recipe.name}   recipe {recipe_hash(recipe)[:12]}, seed {recipe.seed}"
        ),
        *wrapped(f"budget   {budget}"),
        *wrapped(
            f"data     {stores}, {plan.sequences:,} sequences of {recipe.data.seq_len} tokens"
        ),
    ]


def _data_lines(plan: Plan, order: Order) -> Iterator[str]:
    """How often the plan goes over each token store, and what is in it."""
    for manifest, seen in zip(
        order.manifests, order.seen(plan.sequences).values(), strict=True
    ):
        line = f"         {manifest.folder}: {human(seen['tokens'])} tokens, {seen['epochs']:.4g} epochs"
        if seen["epochs"] > 1:
            line += f", beyond one epoch: its data are seen up to {math.ceil(seen['epochs'])} times"
        yield from wrapped(line)
        yield from wrapped(
            f"           {_contents(manifest, plan.recipe.model.vocab_size)}"
        )


def _contents(manifest: Manifest, vocab_size: int) -> str:
    train = manifest.splits["train"]
    vocabulary = f"vocabulary {manifest.vocab_size:,}"
    if not manifest.fits(vocab_size):
        vocabulary += f", which model.vocab_size = {vocab_size:,} does not fit"
    elif manifest.vocab_size < vocab_size:
        vocabulary += f", padded to {vocab_size:,}"
    return (
        f"{human(train.tokens)} tokens in {train.documents:,} documents to train on; {vocabulary}; tokenizer "
        f"{printable(manifest.tokenizer_sha256)[:12]}"
    )


def _model_table(plan: Plan) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [MODEL_HEAD]
    for stage in plan.train_stages:
        row = (
            stage.name,
            str(stage.model.n_layers),
            str(stage.model.dim),
            human(stage.model.parameters()),
            human(stage.model.non_embedding_parameters()),
            human(stage.tokens),
            f"{stage.steps:,}",
            f"{stage.batch_sequences:,}",
            human(stage.start_tokens),
        )
        rows.append(row)
    steps = sum(stage.steps for stage in plan.train_stages)
    rows.append(("total", "", "", "", "", human(plan.tokens), f"{steps:,}", "", ""))
    return rows


def _cost_table(plan: Plan) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [COST_HEAD]
    for stage in plan.train_stages:
        rates = _learning_rates(stage)
        row = (
            stage.name,
            f"{stage.flops:.3g}",
            f"{stage.flops / plan.flops:.1%}",
            f"{stage.attention_flops:.3g}",
            f"{rates['first']:.3g}",
            f"{rates['peak']:.3g}",
            f"{rates['last']:.3g}",
            _human_bytes(stage.checkpoint_bytes),
        )
        rows.append(row)
    attention = sum(stage.attention_flops for stage in plan.train_stages)
    rows.append(
        ("total", f"{plan.flops:.3g}", "100.0%", f"{attention:.3g}", "", "", "", "")
    )
    return rows


def _learning_rates(stage: TrainStage) -> dict[str, float]:
    if not stage.steps:
        return dict.fromkeys(("first", "peak", "last"), 0.0)
    return {
        "first": stage.learning_rate(1),
        "peak": stage.train.learning_rate,
        "last": stage.learning_rate(stage.steps),
    }


def _human_bytes(size: int) -> str:
    """``1.23MB``. A billion of parameters is B, of bytes G."""
    amount = human(size)
    if amount.endswith("B"):
        return f"{amount[:-1]}GB"
    return f"{amount}B"


def _growth_lines(stage: GrowStage) -> Iterator[str]:
    head = f"{stage.name}   {stage.operator}, {stage.change}"
    if stage.noise:
        head += f", noise {stage.noise:g}"
    if stage.optimizer:
        head += f", optimizer {stage.optimizer}"
    if stage.layer_map is None:
        yield from wrapped(head)
    else:
        yield from wrapped(f"{head}: {compact_map(stage.layer_map)}")
        yield from wrapped(f"  layer map {list(stage.layer_map)}")


def compact_map(layer_map: Sequence[int]) -> str:
    """A layer map in groups: ``0 1 | 0 1`` stacked, ``0 0 | 1 1`` interleaved, ``0-23 | 8-31`` when long."""
    ascending = list(layer_map) == sorted(layer_map)
    repeated = len(set(layer_map)) < len(layer_map)
    groups = (
        _equal_neighbours(layer_map)
        if ascending and repeated
        else _consecutive(layer_map)
    )
    return " | ".join(_group_text(group) for group in groups)


def _equal_neighbours(layer_map: Sequence[int]) -> list[list[int]]:
    return [list(group) for _, group in groupby(layer_map)]


def _consecutive(layer_map: Sequence[int]) -> list[list[int]]:
    """Groups in which every layer is the one after its neighbour."""
    groups = [[layer_map[0]]]
    for before, layer in pairwise(layer_map):
        if layer == before + 1:
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return groups


def _group_text(group: Sequence[int]) -> str:
    if len(group) >= LONG_GROUP and group[-1] > group[0]:
        return f"{group[0]}-{group[-1]}"
    return " ".join(str(layer) for layer in group)


def _remark_lines(plan: Plan) -> list[str]:
    lines: list[str] = []
    for remark in _remarks(plan):
        lines.extend(wrapped(f"- {remark}"))
    return lines


def _remarks(plan: Plan) -> Iterator[str]:
    """What the tables leave open."""
    if len(plan.train_stages) > 1:
        yield f"{plan.base_share:.1%} of the FLOPs are spent before the last growth"
    yield (
        "FLOPs are 6 N D with N the parameters without the input embedding, as torchtitan counts; attention's own are "
        "beside them, not in share or total; as the paper counts, with N all parameters, the total is "
        f"{plan.paper_flops:.3g}"
    )
    if any(stage.learns_maps for stage in plan.stages):
        yield "a learn stage's FLOPs hold those of making the target's weights, once per step"
    yield from plan.notes
    for stage in plan.train_stages:
        if stage.schedule:
            yield f"{stage.name}: {_continued_schedule(stage)}"
        if stage.freeze:
            frozen = (
                f"the embedding and layers 0 to {stage.frozen_layers - 1} are frozen"
            )
            yield f"{stage.name}: for {stage.frozen_steps:,} steps {frozen}, and no backward pass counted for them"


def _continued_schedule(stage: TrainStage) -> str:
    assert stage.schedule is not None
    text = f"learning rate as from step {stage.schedule.steps + 1:,} on"
    rewarm = stage.schedule.rewarm
    if rewarm:
        text += f", rising from {rewarm.ratio:g} of its rate in {rewarm.rewarm_steps:,} steps"
    if stage.new_rate:
        rewarm = stage.new_rate.rewarm
        text += f"; of new parameters rising to {rewarm.ratio:g} times that in {rewarm.rewarm_steps:,} steps"
    return text


def plan_dict(plan: Plan, order: Order | None = None) -> dict[str, Any]:
    """The plan as plain values, exact where the text rounds; learning rates are first, peak and last."""
    data = to_dict(plan.recipe.data)
    if order:
        data["seen"] = order.seen(plan.sequences)
    stages = []
    for stage in plan.stages:
        as_plain = (
            _grow_stage_dict(stage)
            if isinstance(stage, GrowStage)
            else _train_stage_dict(stage)
        )
        stages.append(as_plain)
    return {
        "name": plan.recipe.name,
        "recipe_hash": recipe_hash(plan.recipe),
        "seed": plan.recipe.seed,
        "data": data,
        "budget_tokens": plan.recipe.budget.tokens,
        "tokens": plan.tokens,
        "sequences": plan.sequences,
        "flops": plan.flops,
        "paper_flops": plan.paper_flops,
        "base_share": plan.base_share,
        "stages": stages,
        "notes": list(plan.notes),
    }


def _grow_stage_dict(stage: GrowStage) -> dict[str, Any]:
    return {
        "name": stage.name,
        "kind": stage.kind,
        "source_layers": stage.source.n_layers,
        "target_layers": stage.target.n_layers,
        "source_dim": stage.source.dim,
        "target_dim": stage.target.dim,
        "operator": stage.operator,
        "layer_map": list(stage.layer_map) if stage.layer_map else None,
        "noise": stage.noise,
        "optimizer": stage.optimizer,
    }


def _train_stage_dict(stage: TrainStage) -> dict[str, Any]:
    return {
        "name": stage.name,
        "kind": stage.kind,
        "n_layers": stage.model.n_layers,
        "dim": stage.model.dim,
        "parameters": stage.model.parameters(),
        "non_embedding_parameters": stage.model.non_embedding_parameters(),
        "start_tokens": stage.start_tokens,
        "start_sequences": stage.start_sequences,
        "tokens": stage.tokens,
        "steps": stage.steps,
        "sequences_per_step": stage.batch_sequences,
        "frozen_steps": stage.frozen_steps,
        "flops": stage.flops,
        "attention_flops": stage.attention_flops,
        "learning_rate": _learning_rates(stage),
        "checkpoint_bytes": stage.checkpoint_bytes,
    }


def render_plan_json(plan: Plan, order: Order | None = None) -> str:
    """``plan_dict`` as JSON text."""
    return json.dumps(plan_dict(plan, order), indent=2)
