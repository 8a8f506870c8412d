"""A stackgrow stage and plain torchtitan train the same model on the same batches, step by step in turns."""

import contextlib
import dataclasses
import io
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import stackgrow.titan  # noqa: F401  (the device comes before torchtitan)

# isort: split
import torch
import torch.distributed as dist
from random_store import device_name
from torch import nn
from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3 import Transformer
from torchtitan.models.qwen3 import Qwen3Model, Qwen3ModelArgs, parallelize_qwen3
from torchtitan.protocols import BaseModelArgs, train_spec
from torchtitan.train import Trainer

from stackgrow.data.loader import WindowDataset
from stackgrow.plan.stages import Plan, TrainStage
from stackgrow.recipe.keys import Model
from stackgrow.titan.config import checkpoint_config, job_config
from stackgrow.titan.job import StageJob, StageJobConfig
from stackgrow.titan.model import model_args, parallelize, sum_on_gloo
from stackgrow.titan.spec import build_loader, stage_spec
from stackgrow.titan.trainer import StageTrainer

WARM_UP = 3  # steps before the clock starts


def job_of(plan: Plan, stage: TrainStage, folder: Path) -> StageJob:
    """The stage by itself, from random weights and the first token on."""
    alone = dataclasses.replace(
        stage, index=0, start_tokens=0, start_sequences=0, start_flops=0.0, mask=None
    )
    data = WindowDataset.open(plan.recipe.data, plan.recipe.seed)
    return StageJob(
        recipe=plan.recipe, stage=alone, stage_hash="bench", folder=folder, data=data
    )


def compare(job: StageJob) -> dict[str, Any]:
    """Tokens per second over all ranks. The two trainers take turns after every step, so that whatever slows the
    machine for longer than a step meets both; the ratio is the median over pairs of neighbouring steps."""
    trainers = run(job, {"torchtitan": PlainTrainer, "stackgrow": TimedStage})
    theirs = trainers["torchtitan"].seconds[WARM_UP:]
    ours = trainers["stackgrow"].seconds[WARM_UP:]
    ratios = [plain / stage for plain, stage in zip(theirs, ours, strict=True)]
    lower, median, upper = statistics.quantiles(ratios, n=4)
    step_tokens = job.stage.train.global_batch_tokens
    return {
        "device": device_name(),
        "ranks": dist.get_world_size(),
        "steps": len(ratios),
        "torchtitan_tokens_per_second": round(
            step_tokens / statistics.median(theirs), 1
        ),
        "stackgrow_tokens_per_second": round(step_tokens / statistics.median(ours), 1),
        "ratio": round(median, 4),
        "ratio_quartiles": [round(lower, 4), round(upper, 4)],
    }


def run(
    job: StageJob, kinds: dict[str, "type[PlainTrainer] | type[TimedStage]"]
) -> dict[str, "Timed"]:
    """Trains the job to the step before its last, which would write the final checkpoint, once by each kind."""
    turns = Turns()
    failures: list[BaseException] = []

    def train(trainer: Timed) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_device(trainer.device)  # a new thread's is the first
        try:
            trainer.train()
        except (
            BaseException
        ) as failure:  # of a thread: raised below, when the other has had its turn
            failures.append(failure)
            turns.leave(trainer)

    with contextlib.redirect_stdout(io.StringIO()):
        trainers = {name: kind(job, turns) for name, kind in kinds.items()}
        threads = [
            threading.Thread(target=train, args=[trainer])
            for trainer in trainers.values()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    return trainers


class Turns:
    """Lets one of two threads run at a time; each hands over after a step."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.members: list[object] = []
        self.running: object = None

    def join(self, member: object) -> None:
        self.members.append(member)
        self.running = self.members[0]

    def wait(self, member: object) -> None:
        with self.condition:
            self._wait(member)

    def hand_over(self, member: object) -> None:
        """Wakes the other and waits for the turn to come back."""
        with self.condition:
            self._wake_other(member)
            self._wait(member)

    def leave(self, member: object) -> None:
        """Wakes the other, which has all turns from now on."""
        with self.condition:
            self._wake_other(member)
            self.members.remove(member)

    def _wait(self, member: object) -> None:
        self.condition.wait_for(lambda: self.running is member)

    def _wake_other(self, member: object) -> None:
        others = [other for other in self.members if other is not member]
        self.running = others[0] if others else member
        self.condition.notify_all()


class Timed(Trainer):
    """Measures every step, with all that the loop does around it, and hands over after it."""

    def take_turns(self, turns: Turns) -> None:
        self.turns = turns
        self.seconds: list[float] = []  # of each step
        self.started = 0.0  # of the step that runs
        self.peak_gib = 0.0
        turns.join(self)

    def train(self) -> None:
        self.turns.wait(self)  # loading and validating are collective, too
        super().train()

    def should_continue_training(self) -> bool:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if self.step:
            self.seconds.append(time.perf_counter() - self.started)
            peak = self.metrics_processor.device_memory_monitor.get_peak_stats().max_active_gib
            self.peak_gib = max(self.peak_gib, peak)
        goes_on = self.step < self.job_config.training.steps - 1
        if goes_on:
            self.turns.hand_over(self)
        else:
            self.turns.leave(self)
        self.started = time.perf_counter()
        return goes_on


class TimedStage(Timed, StageTrainer):
    """A stackgrow stage."""

    def __init__(self, job: StageJob, turns: Turns):
        super().__init__(job)
        self.take_turns(turns)


class PlainTrainer(Timed):
    """torchtitan's own Trainer, model, loss, metrics and checkpoint manager, on batches that are in memory already."""

    def __init__(self, job: StageJob, turns: Turns):
        config = job_config(job)
        plain = JobConfig(
            **{
                field.name: getattr(config, field.name)
                for field in dataclasses.fields(JobConfig)
            }
        )
        plain.model = dataclasses.replace(plain.model, name="plain")
        plain.checkpoint = dataclasses.replace(checkpoint_config(job), folder="plain")
        model_class, args, parallelize_function = plain_model(
            job.stage.model, job.recipe.seed
        )
        train_spec._extra_train_specs["plain"] = dataclasses.replace(
            stage_spec(),
            model_cls=model_class,
            model_args={job.stage.name: args},
            parallelize_fn=parallelize_function,
            build_loss_fn=build_cross_entropy_loss,
            build_dataloader_fn=InMemory(job, config).build,
            build_metrics_processor_fn=None,
        )
        super().__init__(plain)
        self.take_turns(turns)


def plain_model(model: Model, seed: int) -> tuple[type[nn.Module], BaseModelArgs, Any]:
    """torchtitan's own model of the same tensors: its class, its arguments and what parallelizes it. A Qwen 3 where
    heads have a width or norms of their own or the head is tied, else a Llama 3. Scaled frequencies are a Llama's
    alone; they are computed before the first step, and cost nothing in it.

    Raises:
        ValueError: torchtitan has no such model.
    """
    args = model_args(model, seed)
    if model.attention_bias:
        raise ValueError("model.attention_bias: no model of torchtitan's has biases")
    if not (args.has_own_attention or model.tie_embeddings):
        return Transformer, args, parallelize
    qwen3_args = Qwen3ModelArgs(
        dim=model.dim,
        n_layers=model.n_layers,
        n_heads=model.n_heads,
        n_kv_heads=model.kv_heads,
        vocab_size=model.vocab_size,
        head_dim=model.head_dim,
        hidden_dim=model.ffn_dim,
        norm_eps=model.norm_eps,
        rope_theta=model.rope_theta,
        qk_norm=model.qk_norm,
        enable_weight_tying=model.tie_embeddings,
    )
    return Qwen3Model, qwen3_args, parallelize_plain_qwen3


def parallelize_plain_qwen3(
    model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig
) -> nn.Module:
    """torchtitan's own, on gloo too."""
    model = parallelize_qwen3(model, parallel_dims, job_config)
    sum_on_gloo(model)
    return model


class InMemory:
    """The stage's own batches, read before the clock starts."""

    def __init__(self, job: StageJob, config: StageJobConfig):
        self.job = job
        self.config = config

    def build(self, *, dp_world_size: int, dp_rank: int, **_: Any) -> "InMemory":
        batches = iter(
            build_loader(
                dp_world_size=dp_world_size, dp_rank=dp_rank, job_config=self.config
            )
        )
        per_step = self.job.stage.batch_sequences // (
            self.job.micro_batch * dp_world_size
        )
        self.batches = [next(batches) for _ in range(self.job.stage.steps * per_step)]
        return self

    def __iter__(self) -> Any:
        return iter(self.batches)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Never resumed."""
