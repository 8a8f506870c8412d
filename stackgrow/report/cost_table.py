"""The cost of a plan as text for people and as plain values for programs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from stackgrow.plan.cost import NETWORK, Choice, Cost, StageCost, model_flops, stage_disk
from stackgrow.plan.memory import Memory
from stackgrow.text import aligned, human, wrapped

HEAD = ("stage", "parameters", "tokens", "steps", "6ND FLOPs", "attention", "days", "GPU-hours", "disk")
MEMORY = ("GB on rank 0", "layout", "batch", "parameters", "gradients", "optimizer", "activations", "loss", "total")
CHOICE = ("stage", "layout", "micro_batch", "activation_checkpoint", "GB", "time")


def render_cost(cost: Cost, choices: dict[str, list[Choice]] | None = None) -> str:
    """Time, disk, memory, saving and what does not fit, in at most 120 columns; ``choices`` by stages' names."""
    blocks = [aligned([HEAD, *_time_rows(cost)])]
    if cost.stages:
        blocks.append(aligned([MEMORY, *((s.stage.name, *_memory_row(s)) for s in cost.stages)]))
    if choices is not None:
        rows = [(name, *_choice_row(c)) for name, found in choices.items() for c in found]
        blocks.append(aligned([CHOICE, *rows]))
        blocks.append([f"- {name}: nothing fits" for name, found in choices.items() if not found])
    blocks.append([line for remark in _remarks(cost, choices) for line in wrapped(f"- {remark}")])
    misfits = [line for problem in cost.problems for line in wrapped(f"- {problem}")]
    blocks.append(["what does not fit:", *misfits] if misfits else ["everything fits"])
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _time_rows(cost: Cost) -> Iterator[tuple[str, ...]]:
    plan, gpus = cost.plan, cost.cluster.gpus
    for stage in plan.train_stages:
        name, flops = (
            (stage.name, human(stage.model.parameters())),
            (f"{stage.flops:.3g}", f"{stage.attention_flops:.3g}"),
        )
        time, disk = _time(cost.cluster.hours(model_flops(stage)), gpus), f"{_gb(stage_disk(plan, stage)[0])} GB"
        yield (*name, human(stage.tokens), f"{stage.steps:,}", *flops, *time, disk)
    steps, attention = sum(s.steps for s in plan.train_stages), sum(s.attention_flops for s in plan.train_stages)
    total = ("total", "", human(plan.tokens), f"{steps:,}", f"{plan.flops:.3g}", f"{attention:.3g}")
    yield (*total, *_time(cost.hours, gpus), f"{_gb(cost.peak_disk)} GB")


def _time(hours: float, gpus: int) -> tuple[str, str]:
    return f"{hours / 24:.2f}", f"{hours * gpus:,.0f}"


def _memory_row(cost: StageCost) -> tuple[str, ...]:
    m: Memory = cost.memory
    batch = f"{cost.micro_batch} x {cost.accumulation}"
    parts = (m.parameters, m.gradients, m.optimizer, m.activations, m.loss, m.total)
    return (str(cost.layout), batch, *map(_gb, parts))


def _choice_row(choice: Choice) -> tuple[str, ...]:
    sizes = (str(choice.micro_batch), choice.activation_checkpoint, _gb(choice.memory.total))
    return (str(choice.layout), *sizes, f"x {choice.slowdown:.2f}")


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f}" if size < 1e11 else f"{size / 1e9:,.0f}"


def _remarks(cost: Cost, choices: dict[str, list[Choice]] | None) -> Iterator[str]:
    cluster, recipe, gpu = cost.cluster, cost.plan.recipe, cost.cluster.gpu
    yield (
        f"time: assumed MFU {cluster.mfu:.0%} of {gpu.flops / 1e12:,.0f} TFLOP/s dense bf16 on {cluster.gpus} "
        f"{cluster.kind} ({gpu.source}), of 6 N D and attention's FLOPs; validations, checkpoints, restarts and "
        "waiting are not in it"
    )
    yield (
        "memory: parameters, gradients and optimizer state are exact; activations and loss are estimates of one "
        "micro-batch; the total has the larger of the moments of the loss and of a layer's backward pass, with "
        "gathered weights"
    )
    yield (
        "batch: sequences per forward pass and rank x gradient accumulation; disk: "
        f"{recipe.checkpoint.keep} checkpoints per stage at its end; the total is the peak"
    )
    for path, _ in recipe.data.stores:
        epochs = cost.epochs.get(path)
        yield (
            f"data: {epochs:.2f} epochs of {path}"
            if epochs
            else f"data: {path} is not here; --data-tokens gives its size"
        )
    if saving := cost.saving:
        yield (
            f"expected: a scratch run to the same loss would take {saving.flops:.3g} FLOPs more (6 N D), "
            f"{cluster.hours(saving.flops) * cluster.gpus:,.0f} GPU-hours, by the speed-up {saving.speed_up:.1%} = "
            f"FLOPs(scratch) / FLOPs(grown) - 1 that the paper measured for {saving.target} at "
            f"{human(saving.tokens)} tokens ({saving.source})"
        )
        if saving.caveats:
            yield f"not measured like this: {'; '.join(saving.caveats)}"
    if choices is not None:
        yield (
            "search: time relative to the products alone, with recomputed products and communication added: over "
            f"NVLink {gpu.nvlink / 1e9:.0f} GB/s, between nodes {NETWORK / 1e9:.0f} GB/s per GPU (assumed); a model "
            "for ranking, not measured"
        )


def cost_dict(cost: Cost, choices: dict[str, list[Choice]] | None = None) -> dict[str, Any]:
    """The cost as plain values; sizes in bytes, times in hours of the whole cluster."""
    stages = [
        {
            "name": s.stage.name,
            "parameters": s.stage.model.parameters(),
            "tokens": s.stage.tokens,
            "steps": s.stage.steps,
            "flops": s.stage.flops,
            "attention_flops": s.stage.attention_flops,
            **{name: value for name, value in dataclasses.asdict(s).items() if name != "stage"},
            "memory_total": s.memory.total,
        }
        for s in cost.stages
    ]
    plain = {"name": cost.plan.recipe.name, "cluster": dataclasses.asdict(cost.cluster), "stages": stages}
    saving = dataclasses.asdict(cost.saving) if cost.saving else None
    rest = {"hours": cost.hours, "peak_disk": cost.peak_disk, "epochs": cost.epochs, "saving": saving}
    if choices is not None:
        rest["search"] = {name: [dataclasses.asdict(c) for c in found] for name, found in choices.items()}
    return {**plain, **rest, "problems": list(cost.problems)}


def render_cost_json(cost: Cost, choices: dict[str, list[Choice]] | None = None) -> str:
    return json.dumps(cost_dict(cost, choices), indent=2)
