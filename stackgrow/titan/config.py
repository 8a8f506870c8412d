"""A train stage -> torchtitan's JobConfig, built whole; the only module that writes torchtitan's configuration."""

from __future__ import annotations

from dataclasses import dataclass

from torchtitan.config import job_config as titan

from stackgrow.plan.stages import Continued, TrainStage
from stackgrow.recipe.keys import Parallel, Recipe
from stackgrow.run_folder.folder import CHECKPOINT
from stackgrow.titan.job import StageJob, StageJobConfig
from stackgrow.titan.names import HEAD, titan_name
from stackgrow.titan.spec import register

PRECISION = {
    "bf16": "bfloat16",
    "fp32": "float32",
    "float8": "bfloat16",
}  # float8: of the products alone
FLOAT8_CONVERTER = "quantize.linear.float8"


@dataclass
class StageSchedule(titan.LRScheduler):
    """torchtitan's schedule, and where in it the stage begins."""

    continued: Continued | None = None


def job_config(job: StageJob) -> StageJobConfig:
    """Everything torchtitan needs to run the stage."""
    recipe = job.recipe
    stage = job.stage
    train = stage.train
    return StageJobConfig(
        stage_job=job,
        job=titan.Job(
            dump_folder=str(job.folder), description=f"{recipe.name} {stage.name}"
        ),
        metrics=titan.Metrics(
            log_freq=stage.every(recipe.log.interval),
            enable_tensorboard=False,  # see charts.py
            disable_color_printing=True,
        ),
        model=titan.Model(
            name=register(job),
            flavor=stage.name,
            converters=[FLOAT8_CONVERTER] if train.precision == "float8" else [],
        ),
        quantize=titan.Quantize(
            titan.QuantizedLinear(
                titan.Float8Linear(
                    recipe_name="rowwise", filter_fqns=[titan_name(HEAD)]
                )
            )
        ),
        optimizer=titan.Optimizer(
            lr=train.learning_rate,
            beta1=train.beta1,
            beta2=train.beta2,
            eps=train.eps,
            weight_decay=train.weight_decay,
            implementation=train.optimizer,
        ),
        lr_scheduler=schedule_config(stage),
        training=titan.Training(
            local_batch_size=job.micro_batch,
            global_batch_size=stage.batch_sequences,
            seq_len=stage.seq_len,
            max_norm=train.max_grad_norm,
            steps=stage.steps,
            mixed_precision_param=PRECISION[train.precision],
            enable_cpu_offload=train.cpu_offload,
        ),
        parallelism=parallelism_config(stage.parallel),
        # The stage's own manager is switched on after the Trainer is built: see trainer.py.
        checkpoint=titan.Checkpoint(enable=False),
        activation_checkpoint=titan.ActivationCheckpoint(
            mode=train.activation_checkpoint,
            selective_ac_option="op",
        ),
        compile=titan.Compile(enable=train.compile),
        comm=comm_config(recipe),
        debug=titan.Debug(seed=recipe.seed, deterministic=train.deterministic),
    )


def schedule_config(stage: TrainStage) -> StageSchedule:
    train = stage.train
    return StageSchedule(
        continued=stage.schedule,
        warmup_steps=stage.warmup_steps,
        total_steps=stage.horizon_steps,
        decay_ratio=train.decay_fraction if train.schedule == "wsd" else None,
        decay_type="cosine" if train.schedule == "cosine" else "linear",
        min_lr_factor=train.min_learning_rate / train.learning_rate,
    )


def parallelism_config(parallel: Parallel) -> titan.Parallelism:
    return titan.Parallelism(
        data_parallel_replicate_degree=parallel.replicate,
        data_parallel_shard_degree=parallel.shard,
        fsdp_reshard_after_forward=parallel.reshard_after_forward,
        tensor_parallel_degree=parallel.tensor,
        disable_loss_parallel=not parallel.loss_parallel,
        enable_async_tensor_parallel=parallel.async_tensor,
    )


def comm_config(recipe: Recipe, trace_buffer: int = 0) -> titan.Comm:
    """Timeouts of collectives; ``trace_buffer`` switches NCCL's flight recorder on."""
    return titan.Comm(
        init_timeout_seconds=recipe.run.init_timeout,
        train_timeout_seconds=recipe.run.train_timeout,
        trace_buf_size=trace_buffer,
    )


def checkpoint_config(job: StageJob) -> titan.Checkpoint:
    """Full checkpoints throughout, the last included (a finished stage can be extended and audited); nothing is
    purged by torchtitan, which counts torn and foreign folders as checkpoints: see checkpoint.py."""
    checkpoint = job.recipe.checkpoint
    return titan.Checkpoint(
        enable=True,
        folder=CHECKPOINT,
        interval=job.stage.every(checkpoint.interval),
        last_save_model_only=False,
        keep_latest_k=0,
        async_mode=checkpoint.async_mode,
    )
