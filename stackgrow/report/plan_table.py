"""A plan as text for people and as plain values for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

from stackgrow.plan.stages import GrowStage, LearnStage, Plan, TrainStage
from stackgrow.recipe.write import recipe_hash, to_dict
from stackgrow.text import aligned, human, wrapped

if TYPE_CHECKING:
    from stackgrow.data.order import Order

LONG_RUN = 4  # consecutive layers from here on are shown as first-last


def render_plan(plan: Plan, order: Order | None = None) -> str:
    """The plan in at most 120 columns: what is trained, what it costs, how it grows; with the ``order`` of its data,
    how often it goes over them."""
    blocks = [
        [*_header(plan), *(_data(plan, order) if order else ())],
        aligned([MODEL_HEAD, *(_model_row(s) for s in plan.train_stages), _model_total(plan)]),
        aligned([COST_HEAD, *(_cost_row(s, plan) for s in plan.train_stages), _cost_total(plan)]),
        [line for stage in plan.stages if isinstance(stage, GrowStage) for line in _growth(stage)],
        list(_remarks(plan)),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _header(plan: Plan) -> list[str]:
    recipe = plan.recipe
    missing = recipe.budget.tokens - plan.tokens
    last = plan.train_stages[-1].train.global_batch_tokens
    stores = ", ".join(path for path, _ in recipe.data.stores)
    rest = f"; the other {missing:,} are less than one step of {last:,}" if missing else ""
    lines = [
        f"{recipe.name}   recipe {recipe_hash(recipe)[:12]}, seed {recipe.seed}",
        f"budget   {recipe.budget.tokens:,} tokens asked for, {plan.tokens:,} planned{rest}",
        f"data     {stores}, {plan.sequences:,} sequences of {recipe.data.seq_len} tokens",
    ]
    return [part for line in lines for part in wrapped(line)]


def _data(plan: Plan, order: Order) -> Iterator[str]:
    for path, seen in order.seen(plan.sequences).items():
        more = f", beyond one epoch: its data are seen up to {math.ceil(seen['epochs'])} times"
        part = f"{human(seen['tokens'])} tokens, {seen['epochs']:.4g} epochs{more if seen['epochs'] > 1 else ''}"
        yield from wrapped(f"         {path}: {part}")


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
COST_HEAD = ("stage", "FLOPs", "share", "attention", "LR first", "peak", "last", "checkpoint")


def _model_row(stage: TrainStage) -> tuple[str, ...]:
    model = stage.model
    sizes = (human(model.parameters()), human(model.non_embedding_parameters()))
    counts = (
        human(stage.tokens),
        f"{stage.steps:,}",
        f"{stage.batch_sequences:,}",
        human(stage.start_tokens),
    )
    return (stage.name, str(model.n_layers), str(model.dim), *sizes, *counts)


def _model_total(plan: Plan) -> tuple[str, ...]:
    steps = sum(stage.steps for stage in plan.train_stages)
    return ("total", "", "", "", "", human(plan.tokens), f"{steps:,}", "", "")


def _cost_row(stage: TrainStage, plan: Plan) -> tuple[str, ...]:
    rates = (stage.learning_rate(1), stage.train.learning_rate, stage.learning_rate(stage.steps))
    return (
        stage.name,
        f"{stage.flops:.3g}",
        f"{stage.flops / plan.flops:.1%}",
        f"{stage.attention_flops:.3g}",
        *(f"{rate:.3g}" for rate in rates),
        f"{human(stage.checkpoint_bytes)}B".replace("BB", "GB"),
    )


def _cost_total(plan: Plan) -> tuple[str, ...]:
    attention = sum(stage.attention_flops for stage in plan.train_stages)
    return ("total", f"{plan.flops:.3g}", "100.0%", f"{attention:.3g}", "", "", "", "")


def _growth(stage: GrowStage) -> Iterator[str]:
    noise = f", noise {stage.noise:g}" if stage.noise else ""
    moments = f", optimizer {stage.optimizer}" if stage.optimizer else ""
    head = f"{stage.name}   {stage.operator}, {stage.change}{noise}{moments}"
    if stage.layer_map is None:
        yield from wrapped(head)
        return
    yield from wrapped(f"{head}: {compact_map(stage.layer_map)}")
    yield from wrapped(f"  layer map {list(stage.layer_map)}")


def compact_map(layer_map: Sequence[int]) -> str:
    """A layer map in groups: ``0 1 | 0 1`` stacked, ``0 0 | 1 1`` interleaved, ``0-23 | 8-31`` when long."""
    if list(layer_map) == sorted(layer_map) and len(set(layer_map)) < len(layer_map):
        groups = [list(same) for _, same in groupby(layer_map)]
    else:
        groups = [[layer_map[0]]]
        for before, layer in pairwise(layer_map):
            if layer == before + 1:
                groups[-1].append(layer)
            else:
                groups.append([layer])
    return " | ".join(_run(group) for group in groups)


def _run(group: Sequence[int]) -> str:
    long = len(group) >= LONG_RUN and group[-1] > group[0]
    return f"{group[0]}-{group[-1]}" if long else " ".join(map(str, group))


def _remarks(plan: Plan) -> Iterator[str]:
    remarks = [
        "FLOPs are 6 N D with N the parameters without the input embedding; attention's own are beside them, "
        "not in share or total",
        *plan.notes,
    ]
    for stage in plan.train_stages:
        if stage.schedule:
            warm = stage.schedule.rewarm
            rise = f", rising from {warm.ratio:g} of its rate in {warm.rewarm_steps:,} steps" if warm else ""
            remarks.append(f"{stage.name}: learning rate as from step {stage.schedule.steps + 1:,} on{rise}")
        if stage.freeze:
            frozen = f"the embedding and layers 0 to {stage.frozen_layers - 1} are frozen, and no backward pass counted"
            remarks.append(f"{stage.name}: for {stage.frozen_steps:,} steps {frozen} for them")
    if any(isinstance(stage, LearnStage) for stage in plan.stages):
        remarks.insert(1, "a learn stage's FLOPs hold those of making the target's weights, once per step")
    if len(plan.train_stages) > 1:
        remarks.insert(0, f"{plan.base_share:.1%} of the FLOPs are spent before the last growth")
    for remark in remarks:
        yield from wrapped(f"- {remark}")


def plan_dict(plan: Plan, order: Order | None = None) -> dict[str, Any]:
    """The plan as plain values, exact where the text rounds; learning rates are first, peak and last."""
    return {
        "name": plan.recipe.name,
        "recipe_hash": recipe_hash(plan.recipe),
        "seed": plan.recipe.seed,
        "data": {**to_dict(plan.recipe.data), **({"seen": order.seen(plan.sequences)} if order else {})},
        "budget_tokens": plan.recipe.budget.tokens,
        "tokens": plan.tokens,
        "sequences": plan.sequences,
        "flops": plan.flops,
        "base_share": plan.base_share,
        "stages": [_stage_dict(stage) for stage in plan.stages],
        "notes": list(plan.notes),
    }


def _stage_dict(stage: TrainStage | GrowStage) -> dict[str, Any]:
    if isinstance(stage, GrowStage):
        layers = {"source_layers": stage.source.n_layers, "target_layers": stage.target.n_layers}
        widths = {"source_dim": stage.source.dim, "target_dim": stage.target.dim}
        layer_map = list(stage.layer_map) if stage.layer_map else None
        map_ = {"operator": stage.operator, "layer_map": layer_map, "noise": stage.noise, "optimizer": stage.optimizer}
        return {"name": stage.name, "kind": stage.kind, **layers, **widths, **map_}
    rates = (stage.learning_rate(1), stage.train.learning_rate, stage.learning_rate(stage.steps))
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
        "learning_rate": dict(zip(("first", "peak", "last"), rates, strict=True)),
        "checkpoint_bytes": stage.checkpoint_bytes,
    }


def render_plan_json(plan: Plan, order: Order | None = None) -> str:
    """``plan_dict`` as JSON text."""
    return json.dumps(plan_dict(plan, order), indent=2)
