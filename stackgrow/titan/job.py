"""A train stage -> torchtitan's JobConfig and TrainSpec, built whole; the only importer of torchtitan's config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torchtitan.components.lr_scheduler import LRSchedulersContainer, build_lr_schedulers
from torchtitan.components.optimizer import OptimizersContainer, build_optimizers
from torchtitan.config import job_config as titan
from torchtitan.protocols import BaseModelArgs, train_spec
from torchtitan.protocols.train_spec import TrainSpec

from stackgrow.data.loader import TokenLoader, WindowDataset
from stackgrow.plan.stages import Continued, LearnStage, TrainStage
from stackgrow.recipe.keys import Parallel, Recipe
from stackgrow.titan import ligo, metrics, model
from stackgrow.titan.loss import build_loss
from stackgrow.titan.session import comm

if TYPE_CHECKING:
    from stackgrow.titan.trainer import StageTrainer

PRECISION = {"bf16": "bfloat16", "fp32": "float32", "float8": "bfloat16"}  # float8: of the products alone
FLOAT8 = "quantize.linear.float8"  # torchtitan's converter


@dataclass
class StageJob:
    """One train stage, ready to run: where it reads, where it writes, and what it must start from."""

    recipe: Recipe
    stage: TrainStage
    stage_hash: str
    folder: Path
    data: WindowDataset
    parent: Path | None = None  # the grown checkpoint that the stage starts from; None: random weights
    source: Path | None = None  # of a LearnStage, whose own weights start at random: what its maps are learned on
    finds_end: bool = False  # the loss has yet to decide at which step the stage ends
    resume: Path | None = None  # a checkpoint of this stage in another run folder, to go on from where this has none
    session: str = ""  # the identity of this session in the run's provenance, on rank 0
    # What the job's owner is told, or does between two steps; titan knows neither provenance nor benchmarks.
    on_resume: Callable[[int], None] | None = None  # rank 0: the step that training goes on from
    on_end_found: Callable[[int, float], None] | None = None  # rank 0: the last step, and by what the loss fell
    after_step: Callable[[StageTrainer], None] | None = None  # every rank, after each step and before the first

    @property
    def micro_batch(self) -> int:
        """Sequences per forward pass on one rank, given the ranks that there are now."""
        return self.stage.micro_batch(dist.get_world_size() // self.stage.parallel.tensor)

    def micro_batches(self, step: int) -> int:
        """Forward passes of each rank in one optimizer step, whose gradients accumulate."""
        ranks = dist.get_world_size() // self.stage.parallel.tensor
        return self.stage.batches.at(step) // (self.stage.seq_len * ranks * self.micro_batch)


@dataclass
class StageJobConfig(titan.JobConfig):
    """torchtitan's JobConfig, carrying the stage to the builders below."""

    stage_job: StageJob | None = field(default=None)

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "stage_job"}


@dataclass
class StageSchedule(titan.LRScheduler):
    """torchtitan's schedule, and where in it the stage begins."""

    continued: Continued | None = None


def job_config(job: StageJob) -> StageJobConfig:
    """Everything torchtitan needs to run the stage."""
    recipe, stage, train = job.recipe, job.stage, job.stage.train
    return StageJobConfig(
        stage_job=job,
        job=titan.Job(dump_folder=str(job.folder), description=f"{recipe.name} {stage.name}"),
        metrics=titan.Metrics(
            log_freq=stage.every(recipe.log.interval),
            enable_tensorboard=recipe.log.tensorboard,
            disable_color_printing=True,
        ),
        model=titan.Model(
            name=register(job), flavor=stage.name, converters=[FLOAT8] if train.precision == "float8" else []
        ),
        quantize=titan.Quantize(
            titan.QuantizedLinear(titan.Float8Linear(recipe_name="rowwise", filter_fqns=["output"]))
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
        parallelism=_parallelism(stage.parallel),
        # The stage's own manager is switched on after the Trainer is built: see trainer.py.
        checkpoint=titan.Checkpoint(enable=False),
        activation_checkpoint=titan.ActivationCheckpoint(
            mode=train.activation_checkpoint,
            selective_ac_option="op",
        ),
        compile=titan.Compile(enable=train.compile),
        comm=comm(recipe),
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


def _parallelism(parallel: Parallel) -> titan.Parallelism:
    return titan.Parallelism(
        data_parallel_replicate_degree=parallel.replicate,
        data_parallel_shard_degree=parallel.shard,
        fsdp_reshard_after_forward=parallel.reshard_after_forward,
        tensor_parallel_degree=parallel.tensor,
        disable_loss_parallel=not parallel.loss_parallel,
        enable_async_tensor_parallel=parallel.async_tensor,
    )


def register(job: StageJob) -> str:
    """Makes the stage's model known to torchtitan and returns the name it goes by."""
    stage, spec = job.stage, _train_spec()
    if not FLAVORS:
        train_spec.register_train_spec(SPEC_NAME, spec)
        learned = replace(spec, model_cls=ligo.LigoLlama, parallelize_fn=ligo.parallelize_ligo)
        train_spec.register_train_spec(LEARN_SPEC_NAME, learned)
    bos_id = job.data.bos_id if stage.document_mask else None
    if isinstance(stage, LearnStage):
        assert job.source is not None
        FLAVORS[stage.name] = ligo.ligo_args(stage, job.source)
        FLAVORS[stage.name].llama.bos_id = bos_id
        return LEARN_SPEC_NAME
    kernels = stage.train.attention, stage.train.loss_chunk
    args = FLAVORS[stage.name] = model.model_args(stage.model, job.recipe.seed, stage.mask, *kernels)
    args.bos_id = bos_id
    return SPEC_NAME


SPEC_NAME, LEARN_SPEC_NAME = "stackgrow-llama2", "stackgrow-ligo"
FLAVORS: dict[str, BaseModelArgs] = {}


def _train_spec() -> TrainSpec:
    return TrainSpec(
        model_cls=model.Llama,
        model_args=FLAVORS,
        parallelize_fn=model.parallelize,
        pipelining_fn=None,
        build_optimizers_fn=build_optimizers,
        build_lr_schedulers_fn=build_schedulers,
        build_dataloader_fn=_build_loader,
        build_tokenizer_fn=None,
        build_loss_fn=build_loss,
        build_metrics_processor_fn=metrics.StageMetrics,
    )


def build_schedulers(
    optimizers: OptimizersContainer, config: StageSchedule, training_steps: int
) -> LRSchedulersContainer:
    """torchtitan's schedule, from where the stage before left it if the stage goes on with it."""
    schedulers, continued = build_lr_schedulers(optimizers, config, training_steps), config.continued
    if continued is None:
        return schedulers
    factor = schedulers.schedulers[0].lr_lambdas[0]
    # The first set of schedulers has set the rates; each group still knows the one that it began with.
    return LRSchedulersContainer(optimizers, lambda done: factor(done + continued.steps) * continued.factor(done + 1))


def _build_loader(*, dp_world_size: int, dp_rank: int, job_config: StageJobConfig, **_: Any) -> TokenLoader:
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
