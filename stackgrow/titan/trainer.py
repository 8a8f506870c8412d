"""torchtitan's Trainer running one stage of a plan."""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.utils import device_module
from torchtitan.train import Trainer

from stackgrow.data.loader import Batch, open_validation, validation_batches
from stackgrow.process import alerts, signals
from stackgrow.titan import session
from stackgrow.titan.checkpoint import StageCheckpoints
from stackgrow.titan.config import job_config
from stackgrow.titan.freeze import begin_frozen, freeze
from stackgrow.titan.guard import StepGuard, Verdict
from stackgrow.titan.job import StageJob
from stackgrow.titan.new_rate import NewParameters


class StageTrainer(Trainer):
    """Trains one stage from its verified input to its last sealed checkpoint.

    Differs from torchtitan's Trainer in the checkpoint manager, in the loop's order (validate, then save, so that a
    resumed run has every record), in validating before the first step, i.e. right after growth, and in the guard
    between a step's gradient and its update.
    """

    @record
    def __init__(self, job: StageJob):
        self.stage_job = job
        torch.use_deterministic_algorithms(
            job.stage.train.deterministic
        )  # torchtitan only switches it on
        super().__init__(job_config(job))
        self.guard = StepGuard(
            job.stage.name, job.stage.train, copies=job.stage.parallel.tensor
        )
        self.new_parameters: NewParameters | None = None
        if job.stage.new_rate:
            self.new_parameters = NewParameters(
                self.model_parts[0], job.stage.new_rate.growth
            )
        self.checkpointer = StageCheckpoints(
            job,
            self.metrics_processor.sealed,
            dataloader=self.dataloader,
            model_parts=self.model_parts,
            optimizers=self.optimizers,
            lr_schedulers=self.lr_schedulers,
            states={"train_state": self},
        )

    @record
    def train(self) -> None:
        """Runs the steps that are left of the stage."""
        timeouts = self.job_config.comm
        # Process groups begin with torch's own timeout; the first step can compile for minutes.
        self._set_timeout(timeouts.init_timeout_seconds)
        self._begin()

        assert self.dataloader is not None
        batches = self.batch_generator(self.dataloader)
        first_step = self.step + 1
        while self.should_continue_training():
            self.step += 1
            session.at(f"{self.stage_job.stage.name}, step {self.step}")
            self._prepare_step()
            asked_to_stop = self.train_step(batches).asked_to_stop

            # A record of a step is written before the checkpoint that includes it.
            is_last = self._is_last()
            if is_last or self._validates_at(self.step):
                self.validate()
            self.checkpointer.save(self.step, last_step=is_last or asked_to_stop)
            if asked_to_stop and not is_last:
                raise signals.stopped(session.place)
            self.after_step()
            if is_last:
                break
            if self.step == first_step:
                self._set_timeout(timeouts.train_timeout_seconds)

        self.checkpointer.finish()
        self._set_timeout(timeouts.init_timeout_seconds)  # growing takes its time too

    def _begin(self) -> None:
        """From a built trainer to the moment before its first step."""
        session.at(f"{self.stage_job.stage.name}, loading")
        self.checkpointer.load()
        session.stop_if_asked()
        self.metrics_processor.resume(self.step, self.checkpointer.sealed_records)
        self.set_mask()
        if self.stage_job.stage.freeze:
            begin_frozen(self.model_parts[0])
        has_own_checkpoint = self.checkpointer.sealed_records is not None
        if self.step == 0 and not has_own_checkpoint:
            self.validate()
            if self.stage_job.stage.steps == 0:  # a base that grows untrained
                self.checkpointer.save(0, last_step=True)
        self.after_step()  # what a session before this one may not have come to

    def _prepare_step(self) -> None:
        """What a step's number decides: the mask, the layers that are trained, the size of the batch."""
        stage = self.stage_job.stage
        self.set_mask()
        if stage.freeze:
            freeze(self.model_parts[0], stage, self.step)
        self.gradient_accumulation_steps = self.stage_job.micro_batches(self.step)
        self.gc_handler.run(self.step)

    def post_dataloading_process(
        self, input_dict: dict[str, Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Any]]:
        """What the model is called with: a head that computes the loss needs the labels; masks are the model's own."""
        extra_inputs = (
            {"labels": labels} if self.stage_job.stage.train.loss_chunk else {}
        )
        return input_dict["input"], labels, extra_inputs, {}

    def train_step(self, batches: Iterator[Batch]) -> Verdict:
        """torchtitan's, for micro batches of equally many tokens, none of them padding, on every rank."""
        self.optimizers.zero_grad()
        lr = self.lr_schedulers.schedulers[0].get_last_lr()[0]
        loss = self._backward(batches)
        grad_norm = self._clip_gradient()

        verdict = self.guard.check(self.step, loss, grad_norm)
        self.metrics_processor.pace.begin()
        if verdict.update:
            self.checkpointer.maybe_wait_for_staging()
            with self._rate_of_new(lr):
                self.optimizers.step()
        self.lr_schedulers.step()

        if verdict.event or self.metrics_processor.should_log(self.step):
            max_loss = self._max_over_ranks(loss)
            facts = {"lr": lr, **verdict.event}
            self.metrics_processor.log(
                self.step, verdict.loss, max_loss, grad_norm.item(), facts
            )
        if verdict.message:
            alerts.tell("spike", verdict.message)
        if verdict.error:
            raise verdict.error
        return verdict

    def _rate_of_new(self, lr: float) -> AbstractContextManager[None]:
        """Around an update with rate ``lr``: new parameters may have another."""
        if not self.new_parameters:
            return nullcontext()
        own = self.stage_job.stage.new_learning_rate(self.step)
        return self.new_parameters.rate_times(own / lr)

    def _backward(self, batches: Iterator[Batch]) -> Tensor:
        """Accumulates the gradient of the mean loss per token of a step; returns this rank's share of that loss."""
        tokens = torch.tensor(
            float(self.stage_job.stage.batches.at(self.step)), device=self.device
        )
        pace = self.metrics_processor.pace
        losses = []
        for _ in range(self.gradient_accumulation_steps):
            inputs, labels = next(batches)
            pace.end()
            loss = self.forward_backward_step(
                input_dict=self._on_device(inputs),
                labels=labels.to(self.device),
                global_valid_tokens=tokens,
            )
            losses.append(_whole(loss.detach()))
            pace.begin()
        return torch.stack(losses).sum()

    def _clip_gradient(self) -> Tensor:
        """Clips the gradient; returns its norm before that."""
        parameters = [
            parameter for model in self.model_parts for parameter in model.parameters()
        ]
        norm = dist_utils.clip_grad_norm_(
            parameters, self.job_config.training.max_norm, foreach=True
        )
        return norm.to(self.device)  # on the CPU, where FSDP offloads

    def _max_over_ranks(self, loss: Tensor) -> float:
        """``loss`` is a rank's share of the mean over all; the largest mean of a single rank."""
        dims = self.parallel_dims
        own_mean = loss * dims.dp_replicate * dims.dp_shard
        return dist_utils.dist_max(own_mean, dims.get_optional_mesh("loss"))

    def _on_device(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def _validates_at(self, step: int) -> bool:
        return (
            step % self.stage_job.stage.every(self.stage_job.recipe.validation.interval)
            == 0
        )

    @torch.no_grad()
    def validate(self) -> None:
        """Mean loss per token over the held-out sequences, the same ones every time and on any number of ranks."""
        job = self.stage_job
        dims = self.parallel_dims
        if job.recipe.validation.sequences == 0:
            return
        validation = job.recipe.validation
        rows = open_validation(job.recipe.data, validation.sequences, validation.take)
        ranks = 1
        rank = 0
        if dims.dp_enabled:
            mesh = dims.get_mesh("batch")
            ranks = mesh.size()
            rank = mesh.get_local_rank()
        batches = validation_batches(
            rows, job.stage.seq_len, job.micro_batch, rank, ranks
        )
        total = dist_utils.dist_sum(
            self._summed_loss(batches), dims.get_optional_mesh("loss")
        )
        self.metrics_processor.log_validation(
            loss=total / (len(rows) * job.stage.seq_len), step=self.step
        )

    def _summed_loss(self, batches: Iterator[Batch]) -> Tensor:
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        amp: AbstractContextManager[Any] = self.maybe_enable_amp
        with self.evaluating() as model:
            for input_dict, labels in batches:
                inputs, labels, extra_inputs, _ = self.post_dataloading_process(
                    self._on_device(input_dict), labels.to(self.device)
                )
                with self.train_context(), amp:
                    loss = self.loss_fn(model(inputs, **extra_inputs), labels)
                total += _whole(loss)
                self.metrics_processor.ntokens_since_last_log += int(
                    (labels != IGNORE_INDEX).sum()
                )
        return total

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The model in forward passes that no backward pass follows."""
        model: nn.Module = self.model_parts[0]
        model.eval()
        yield model
        model.train()
        # FSDP keeps the head gathered until a backward pass, which there is none of; a checkpoint saved then would
        # not find the head's optimizer state.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def after_step(self) -> None:
        """What the job's owner does between two steps, such as benchmarks; its time is not training's."""
        if self.stage_job.after_step:
            started = time.perf_counter()
            self.stage_job.after_step(self)
            self.metrics_processor.time_last_log += time.perf_counter() - started

    def _is_last(self) -> bool:
        """Whether the stage ends with this step. Collective where the loss decides it."""
        job = self.stage_job
        if job.finds_end and self._loss_ends_stage():
            job.stage = dataclasses.replace(job.stage, steps=self.step)
            job.finds_end = False
        return self.step == job.stage.steps

    def _loss_ends_stage(self) -> bool:
        """Rank 0 decides for all, and writes it down before anything follows from it."""
        job = self.stage_job
        until = job.stage.until
        assert until is not None
        at_the_latest = self.step == until.max_steps
        may_end = self.step >= until.min_steps and until.looks_at(self.step)
        if not (may_end or at_the_latest):
            return False
        fall = until.fall(self.metrics_processor.losses, job.stage.batches, self.step)
        ends = torch.tensor(
            int(at_the_latest or fall < until.slope), device=self.device
        )
        dist.broadcast(ends, 0)
        if not ends.item():
            return False
        if dist.get_rank() == 0 and job.on_end_found:
            job.on_end_found(self.step, fall)
        return True

    def set_mask(self) -> None:
        stage = self.stage_job.stage
        if stage.mask:
            self.model_parts[0].set_mask(stage.mask_value(self.step))

    def _set_timeout(self, seconds: int) -> None:
        """Of all process groups. torchtitan's own function calls what torch 2.15 warns of, once for each group."""
        dist.barrier(
            device_ids=[device_module.current_device()]
        )  # no rank is still in what the old timeout is for
        device_module.synchronize()
        meshes = self.parallel_dims.get_all_one_dimensional_meshes().values()
        for group in [*(mesh.get_group() for mesh in meshes), None]:
            set_timeout(timedelta(seconds=seconds), group)

    def state_dict(self) -> dict[str, Any]:
        # The step alone: the position in the data is the loader's, and tokens follow from the plan. torchtitan's
        # ntokens_seen is one rank's count and wrong as soon as the number of ranks changes.
        stage = self.stage_job.stage
        state = {"step": self.step, "recent_losses": self.guard.recent}
        if stage.mask:
            state["mask"] = stage.mask_value(self.step)
        if stage.until:
            first_kept = self.step - stage.until.window + 1
            losses = self.metrics_processor.losses
            state["losses"] = json.dumps(
                {step: loss for step, loss in losses.items() if step >= first_kept}
            )
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = state_dict["step"]
        self.guard.recent = state_dict["recent_losses"]
        losses = json.loads(state_dict.get("losses", "{}"))
        self.metrics_processor.losses = {
            int(step): loss for step, loss in losses.items()
        }


def set_timeout(timeout: timedelta, group: dist.ProcessGroup | None) -> None:
    """torch's public function, from 2.14 on."""
    public = getattr(dist, "set_timeout", None)
    if public:
        public(timeout, group)
    else:
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def _whole(loss: Tensor) -> Tensor:
    return loss.full_tensor() if isinstance(loss, DTensor) else loss


def run_stage(job: StageJob) -> None:
    """Trains ``job`` to its end, then frees what it held."""
    trainer = StageTrainer(job)
    try:
        trainer.train()
    finally:
        trainer.close()
    del trainer
    free()


def free() -> None:
    """Frees trainers that are no longer used: torchtitan has switched the garbage collector off, and a trainer's
    checkpointer refers back to it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
