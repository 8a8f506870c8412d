"""What torchtitan calls a TrainSpec: the model of a stage and the functions that build all that trains it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torchtitan.components.lr_scheduler import (
    LRSchedulersContainer,
    build_lr_schedulers,
)
from torchtitan.components.optimizer import OptimizersContainer, build_optimizers
from torchtitan.protocols import BaseModelArgs, train_spec
from torchtitan.protocols.train_spec import TrainSpec

from stackgrow.data.loader import TokenLoader
from stackgrow.plan.stages import LearnStage
from stackgrow.titan import ligo, metrics, model
from stackgrow.titan.job import StageJob, StageJobConfig
from stackgrow.titan.loss import build_loss

if TYPE_CHECKING:
    from stackgrow.titan.config import StageSchedule

SPEC_NAME = "stackgrow-llama2"
LEARN_SPEC_NAME = "stackgrow-ligo"
FLAVORS: dict[
    str, BaseModelArgs
] = {}  # torchtitan's word for a model's arguments: by the names of stages


def register(job: StageJob) -> str:
    """Makes the stage's model known to torchtitan and returns the name of its TrainSpec."""
    if not FLAVORS:
        spec = stage_spec()
        train_spec.register_train_spec(SPEC_NAME, spec)
        learned = replace(
            spec, model_cls=ligo.LigoLlama, parallelize_fn=ligo.parallelize_ligo
        )
        train_spec.register_train_spec(LEARN_SPEC_NAME, learned)

    stage = job.stage
    train = stage.train
    bos_id = job.data.bos_id if stage.document_mask else None
    if isinstance(stage, LearnStage):
        assert job.source is not None
        learned_args = ligo.ligo_args(stage, job.source)
        learned_args.llama.bos_id = bos_id
        FLAVORS[stage.name] = learned_args
        return LEARN_SPEC_NAME
    args = model.model_args(
        stage.model,
        job.recipe.seed,
        mask=stage.mask,
        attention=train.attention,
        loss_chunk=train.loss_chunk,
    )
    args.bos_id = bos_id
    FLAVORS[stage.name] = args
    return SPEC_NAME


def stage_spec() -> TrainSpec:
    return TrainSpec(
        model_cls=model.Llama,
        model_args=FLAVORS,
        parallelize_fn=model.parallelize,
        pipelining_fn=None,
        build_optimizers_fn=build_optimizers,
        build_lr_schedulers_fn=build_schedulers,
        build_dataloader_fn=build_loader,
        build_tokenizer_fn=None,
        build_loss_fn=build_loss,
        build_metrics_processor_fn=metrics.StageMetrics,
    )


def build_schedulers(
    optimizers: OptimizersContainer, config: StageSchedule, training_steps: int
) -> LRSchedulersContainer:
    """torchtitan's schedule, from where the stage before left it if the stage goes on with it."""
    schedulers = build_lr_schedulers(optimizers, config, training_steps)
    continued = config.continued
    if continued is None:
        return schedulers
    factor: Callable[[int], float] = schedulers.schedulers[0].lr_lambdas[0]

    def continued_factor(steps_done: int) -> float:
        return factor(steps_done + continued.steps) * continued.factor(steps_done + 1)

    # The first set of schedulers has set the rates; each group still knows the one that it began with.
    return LRSchedulersContainer(optimizers, continued_factor)


def build_loader(
    *, dp_world_size: int, dp_rank: int, job_config: StageJobConfig, **_: Any
) -> TokenLoader:
    job = job_config.stage_job
    assert job is not None
    return TokenLoader(
        job.data,
        global_batch=job.stage.batch_sequences,
        micro_batch=job.micro_batch,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        start_position=job.stage.start_sequences,
        num_workers=job.recipe.data.workers,
        pin_memory=torch.cuda.is_available(),
    )
