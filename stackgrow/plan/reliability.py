"""What checkpoints, failures and hangs cost a run, by bandwidths and rates that are stated. No torch.

Young's first-order interval between checkpoints (Young 1974; Daly 2006, eq. 9): sqrt(2 d M), with d the seconds that a
checkpoint takes and M the mean time between failures of the whole cluster.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from stackgrow.plan.cost import Cluster, Cost, StageCost
from stackgrow.recipe.keys import Recipe

BANDWIDTH = 10e9  # bytes per second of all ranks to and from shared storage, assumed
STARTUP = 300.0  # seconds from a failure to the first step, without reading the checkpoint: assumed
# The Llama 3 Herd of Models, section 3.3.4: 419 unexpected interruptions in 54 days on 16,384 H100.
GPU_HOURS_PER_FAILURE = 16384 * 54 * 24 / 419


@dataclass(frozen=True)
class Machine:
    """What fails, how often, and how fast what was saved is read again."""

    bandwidth: float = BANDWIDTH
    startup: float = STARTUP
    gpu_hours_per_failure: float = GPU_HOURS_PER_FAILURE

    def seconds_between_failures(self, cluster: Cluster) -> float:
        return 3600 * self.gpu_hours_per_failure / cluster.gpus


@dataclass(frozen=True)
class StageReliability:
    """Seconds of a stage: of a step, of writing a checkpoint, from a failure to the next step, between checkpoints as
    the recipe has them and at best; the failures to expect, and what part of its time they and the checkpoints add."""

    name: str
    step: float
    write: float
    restart: float
    interval: float
    best_interval: float
    best_steps: int
    failures: float
    added: float


def reliabilities(cost: Cost, machine: Machine) -> list[StageReliability]:
    """Of every stage that has steps."""
    found = []
    for stage_cost in cost.stages:
        if stage_cost.stage.steps:
            found.append(
                reliability(stage_cost, cost.plan.recipe, cost.cluster, machine)
            )
    return found


def reliability(
    cost: StageCost, recipe: Recipe, cluster: Cluster, machine: Machine
) -> StageReliability:
    """Of a stage whose checkpoints make it wait: an upper bound where they are written asynchronously."""
    stage = cost.stage
    step = 3600 * cost.hours / stage.steps
    write = stage.checkpoint_bytes / machine.bandwidth
    restart = machine.startup + write  # as many bytes are read
    interval = step * min(stage.every(recipe.checkpoint.interval), stage.steps)
    between_failures = machine.seconds_between_failures(cluster)
    best = math.sqrt(2 * write * between_failures)
    lost_at_a_failure = interval / 2 + restart
    return StageReliability(
        name=stage.name,
        step=step,
        write=write,
        restart=restart,
        interval=interval,
        best_interval=best,
        best_steps=max(1, min(round(best / step), stage.steps)),
        failures=3600 * cost.hours / between_failures,
        added=write / interval + lost_at_a_failure / between_failures,
    )


def hang_gpu_hours(recipe: Recipe, cluster: Cluster) -> float:
    """GPU-hours until a hang is noticed: nothing ends it before run.train_timeout."""
    return recipe.run.train_timeout * cluster.gpus / 3600
