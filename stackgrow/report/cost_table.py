"""The cost of a plan as text for people and as plain values for programs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from stackgrow.plan.cost import Cost, StageCost, model_flops, stage_disk
from stackgrow.plan.reliability import Machine, hang_gpu_hours, reliabilities
from stackgrow.plan.saving import Saving
from stackgrow.plan.search import NETWORK, Choice, settings
from stackgrow.plan.stages import TrainStage
from stackgrow.text import WIDTH, aligned, human, wrapped

TIME_HEAD = (
    "stage",
    "parameters",
    "tokens",
    "steps",
    "6ND FLOPs",
    "attention",
    "time",
    "GPU-hours",
    "disk",
)
MEMORY_HEAD = (
    "GB on rank 0",
    "layout",
    "batch",
    "parameters",
    "gradients",
    "optimizer",
    "activations",
    "loss",
    "total",
)
RELIABILITY_HEAD = (
    "seconds of",
    "step",
    "checkpoint",
    "restart",
    "interval",
    "best interval",
    "in steps",
    "failures",
    "added time",
)
CHOICE_HEAD = (
    "stage",
    "place",
    "layout",
    "micro_batch",
    "activation_checkpoint",
    "GB",
    "time",
)
Choices = dict[str, list[Choice]]  # by the stages' names


@dataclass(frozen=True)
class Assumed:
    """What a cost is shown with that no recipe says. ``price``: of a GPU-hour, in ``currency``; None: not known."""

    machine: Machine = field(default_factory=Machine)
    price: float | None = None
    currency: str = "USD"

    def money(self, gpu_hours: float) -> str:
        """ " = 1,234 USD", or "" without a price."""
        if self.price is None:
            return ""
        return f" = {gpu_hours * self.price:,.0f} {self.currency}"


def render_cost(
    cost: Cost, choices: Choices | None = None, assumed: Assumed | None = None
) -> str:
    """Time, disk, memory, failures, saving and what does not fit, in at most 120 columns; ``choices``: what a search
    proposes."""
    assumed = assumed or Assumed()
    blocks = [aligned(_time_table(cost))]
    if cost.stages:
        blocks.append(aligned(_memory_table(cost.stages)))
        blocks.append(aligned(_reliability_table(cost, assumed.machine)))
    if choices is not None:
        blocks.append(aligned(_choice_table(choices)))
        blocks.append(
            [
                f"- {name}: nothing fits"
                for name, fitting in choices.items()
                if not fitting
            ]
        )
        blocks.append(_best_as_settings(cost, choices))
    blocks.append(_bullets(_remarks(cost, assumed, searched=choices is not None)))
    if cost.problems:
        blocks.append(["what does not fit:", *_bullets(cost.problems)])
    else:
        blocks.append(["everything fits"])
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _bullets(texts: Sequence[str] | Iterator[str]) -> list[str]:
    lines: list[str] = []
    for text in texts:
        lines.extend(wrapped(f"- {text}"))
    return lines


def _time_table(cost: Cost) -> list[tuple[str, ...]]:
    plan = cost.plan
    gpus = cost.cluster.gpus
    rows: list[tuple[str, ...]] = [TIME_HEAD]
    for stage in plan.stages:
        disk, _ = stage_disk(plan, stage)
        if not isinstance(stage, TrainStage):
            rows.append(
                (stage.name, *[""] * (len(TIME_HEAD) - 2), f"{_gigabytes(disk)} GB")
            )
            continue
        hours = cost.cluster.hours(model_flops(stage))
        row = (
            stage.name,
            human(stage.model.parameters()),
            human(stage.tokens),
            f"{stage.steps:,}",
            f"{stage.flops:.3g}",
            f"{stage.attention_flops:.3g}",
            duration(hours),
            _gpu_hours(hours, gpus),
            f"{_gigabytes(disk)} GB",
        )
        rows.append(row)
    steps = sum(stage.steps for stage in plan.train_stages)
    attention = sum(stage.attention_flops for stage in plan.train_stages)
    total = (
        "total",
        "",
        human(plan.tokens),
        f"{steps:,}",
        f"{plan.flops:.3g}",
        f"{attention:.3g}",
        duration(cost.hours),
        _gpu_hours(cost.hours, gpus),
        f"{_gigabytes(cost.disk)} GB",
    )
    rows.append(total)
    return rows


def duration(hours: float) -> str:
    """In the unit that leaves something to read."""
    if hours >= 48:
        return f"{hours / 24:.2f} days"
    if hours >= 1:
        return f"{hours:.1f} hours"
    if hours >= 1 / 60:
        return f"{60 * hours:.1f} minutes"
    return f"{3600 * hours:.2g} seconds"


def _gpu_hours(hours: float, gpus: int) -> str:
    return f"{hours * gpus:,.0f}"


def _gigabytes(size: float) -> str:
    """Two digits after the point, but none from 100 GB on."""
    if size < 1e11:
        return f"{size / 1e9:,.2f}"
    return f"{size / 1e9:,.0f}"


def _memory_table(stages: Sequence[StageCost]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [MEMORY_HEAD]
    for stage_cost in stages:
        memory = stage_cost.memory
        row = (
            stage_cost.stage.name,
            str(stage_cost.layout),
            f"{stage_cost.micro_batch} x {stage_cost.accumulation}",
            _gigabytes(memory.parameters),
            _gigabytes(memory.gradients),
            _gigabytes(memory.optimizer),
            _gigabytes(memory.activations),
            _gigabytes(memory.loss),
            _gigabytes(memory.total),
        )
        rows.append(row)
    return rows


def _reliability_table(cost: Cost, machine: Machine) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [RELIABILITY_HEAD]
    for stage in reliabilities(cost, machine):
        row = (
            stage.name,
            f"{stage.step:.3g}",
            f"{stage.write:.3g}",
            f"{stage.restart:.3g}",
            f"{stage.interval:,.0f}",
            f"{stage.best_interval:,.0f}",
            f"{stage.best_steps:,}",
            f"{stage.failures:.2g}",
            f"{stage.added:.1%}",
        )
        rows.append(row)
    return rows


def _choice_table(choices: Choices) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [CHOICE_HEAD]
    for name, fitting in choices.items():
        for choice in fitting:
            own = ", own" if choice.own else ""
            row = (
                name,
                f"{choice.place}{own}",
                str(choice.layout),
                str(choice.micro_batch),
                choice.activation_checkpoint,
                _gigabytes(choice.memory.total),
                f"x {choice.slowdown:.2f}",
            )
            rows.append(row)
    return rows


def _best_as_settings(cost: Cost, choices: Choices) -> list[str]:
    """The first of every stage's choices as the run's command line has it, to be copied as it is."""
    lines: list[str] = []
    for assignment in settings(cost.plan, _best(choices)):
        option = f"--set '{assignment}'"
        if not lines or len(lines[-1]) + len(option) > WIDTH - 3:
            lines.append(" ")
        lines[-1] += f" {option}"
    if not lines:
        return []
    head = "the first of every stage, for the command that runs the recipe, or as keys in the recipe:"
    return [head, *(f"{line} \\" for line in lines[:-1]), lines[-1]]


def _best(choices: Choices) -> dict[str, Choice]:
    """Of every stage for which something fits."""
    return {name: fitting[0] for name, fitting in choices.items() if fitting}


def _remarks(cost: Cost, assumed: Assumed, searched: bool) -> Iterator[str]:
    """What the figures rest on: assumed, estimated, exact."""
    cluster = cost.cluster
    gpu = cluster.gpu
    recipe = cost.plan.recipe
    yield (
        f"time: assumed MFU {cluster.mfu:.0%} of {gpu.flops / 1e12:,.0f} TFLOP/s dense bf16 on {cluster.gpus} "
        f"{cluster.kind} ({gpu.source}), of 6 N D (N without the input embedding) and attention's FLOPs; validations, "
        "checkpoints, restarts and waiting are not in it"
    )
    yield (
        "memory: parameters, gradients and optimizer state are exact; activations and loss are estimates of one "
        "micro-batch; the total has the larger of the moments of the loss and of a layer's backward pass, with "
        "gathered weights"
    )
    yield (
        "batch: sequences per forward pass and rank x gradient accumulation; disk: "
        f"{recipe.checkpoint.keep} checkpoints per stage at its end, which add up to the total; at most "
        f"{_gigabytes(cost.peak_disk)} GB while one is written before another is dropped"
    )
    yield from _failures(cost, assumed)
    for path, _ in recipe.data.stores:
        epochs = cost.epochs.get(path)
        if epochs:
            yield f"data: {epochs:.2f} epochs of {path}"
        else:
            yield f"data: {path} is not here; --data-tokens gives its size"
    if cost.saving:
        yield _expectation(cost, cost.saving)
        if cost.saving.caveats:
            yield f"not measured like this: {'; '.join(cost.saving.caveats)}"
    if searched:
        yield (
            "search: own is the recipe's, placed among all that fits; time relative to the products alone, with "
            "recomputed products and communication added: over "
            f"NVLink {gpu.nvlink / 1e9:.0f} GB/s, between nodes {NETWORK / 1e9:.0f} GB/s per GPU (assumed); a model "
            "for ranking, not measured"
        )


def _failures(cost: Cost, assumed: Assumed) -> Iterator[str]:
    """What checkpoints, failures and hangs are reckoned with, and what they come to."""
    cluster, recipe, machine = cost.cluster, cost.plan.recipe, assumed.machine
    between = duration(machine.seconds_between_failures(cluster) / 3600)
    yield (
        f"failures: one in {machine.gpu_hours_per_failure:,.0f} GPU-hours, here one in {between} (assumed; the default "
        "is Llama 3's, 419 in 54 days on 16,384 H100); checkpoints are written and read at "
        f"{machine.bandwidth / 1e9:g} GB/s (assumed), a start takes {machine.startup:g} s beside (assumed); best "
        "interval: sqrt(2 x checkpoint x time between failures) (Young, Daly); added time: checkpoints at the recipe's "
        "interval, which async_mode hides, and half an interval and a restart for every failure"
    )
    hang = hang_gpu_hours(recipe, cluster)
    yield (
        f"a hang ends after run.train_timeout = {recipe.run.train_timeout} s: {hang:,.1f} GPU-hours"
        f"{assumed.money(hang)} each"
    )
    if assumed.price is None:
        return
    gpu_hours = cost.hours * cluster.gpus
    rate = f"{assumed.price:g} {assumed.currency}"
    yield f"money: {gpu_hours:,.0f} GPU-hours at {rate}{assumed.money(gpu_hours)}, without the added time"


def _expectation(cost: Cost, saving: Saving) -> str:
    gpu_hours = _gpu_hours(cost.cluster.hours(saving.flops), cost.cluster.gpus)
    return (
        f"expected: a scratch run to the same loss would take {saving.flops:.3g} FLOPs more (6 N D), "
        f"{gpu_hours} GPU-hours, by the speed-up {saving.speed_up:.1%} = "
        f"FLOPs(scratch) / FLOPs(grown) - 1 that the paper measured for {saving.target} at "
        f"{human(saving.tokens)} tokens ({saving.source})"
    )


def cost_dict(
    cost: Cost, choices: Choices | None = None, assumed: Assumed | None = None
) -> dict[str, Any]:
    """The cost as plain values; sizes in bytes, times in hours of the whole cluster, those of "reliability" in
    seconds."""
    assumed = assumed or Assumed()
    gpu_hours = cost.hours * cost.cluster.gpus
    plain = {
        "name": cost.plan.recipe.name,
        "cluster": dataclasses.asdict(cost.cluster),
        "stages": [_stage_dict(stage_cost) for stage_cost in cost.stages],
        "hours": cost.hours,
        "gpu_hours": gpu_hours,
        "price": None if assumed.price is None else gpu_hours * assumed.price,
        "currency": assumed.currency,
        "disk": cost.disk,
        "peak_disk": cost.peak_disk,
        "machine": dataclasses.asdict(assumed.machine),
        "reliability": [
            dataclasses.asdict(stage) for stage in reliabilities(cost, assumed.machine)
        ],
        "hang_gpu_hours": hang_gpu_hours(cost.plan.recipe, cost.cluster),
        "epochs": cost.epochs,
        "saving": dataclasses.asdict(cost.saving) if cost.saving else None,
    }
    if choices is not None:
        search: dict[str, list[dict[str, Any]]] = {}
        for name, fitting in choices.items():
            search[name] = [dataclasses.asdict(choice) for choice in fitting]
        plain["search"] = search
        plain["settings"] = settings(cost.plan, _best(choices))
    plain["problems"] = list(cost.problems)
    return plain


def _stage_dict(stage_cost: StageCost) -> dict[str, Any]:
    stage = stage_cost.stage
    return {
        "name": stage.name,
        "parameters": stage.model.parameters(),
        "tokens": stage.tokens,
        "steps": stage.steps,
        "flops": stage.flops,
        "attention_flops": stage.attention_flops,
        "layout": dataclasses.asdict(stage_cost.layout),
        "micro_batch": stage_cost.micro_batch,
        "accumulation": stage_cost.accumulation,
        "memory": dataclasses.asdict(stage_cost.memory),
        "hours": stage_cost.hours,
        "memory_total": stage_cost.memory.total,
    }


def render_cost_json(
    cost: Cost, choices: Choices | None = None, assumed: Assumed | None = None
) -> str:
    return json.dumps(cost_dict(cost, choices, assumed), indent=2)
