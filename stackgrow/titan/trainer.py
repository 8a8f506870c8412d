"""torchtitan's Trainer running one stage of a plan."""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.distributed import utils as dist_utils
from torchtitan.train import Trainer

from stackgrow.data.loader import Batch, open_validation, validation_batches
from stackgrow.process import signals
from stackgrow.titan import session
from stackgrow.titan.checkpoint import StageCheckpoints
from stackgrow.titan.freeze import begin_frozen, freeze
from stackgrow.titan.guard import StepGuard, Verdict
from stackgrow.titan.job import StageJob, job_config


class StageTrainer(Trainer):
    """Trains one stage from its verified input to its last sealed checkpoint.

    Differs from torchtitan's Trainer in the checkpoint manager, in the loop's order (validate, then save, so that a
    resumed run has every record), in validating before the first step, i.e. right after growth, and in the guard
    between a step's gradient and its update.
    """

    @record
    def __init__(self, job: StageJob):
        self.stage_job = job
        torch.use_deterministic_algorithms(job.stage.train.deterministic)  # torchtitan only switches it on
        super().__init__(job_config(job))
        self.guard = StepGuard(job.stage.name, job.stage.train, job.stage.parallel.tensor)
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
        comm = self.job_config.comm
        self._set_timeout(
            comm.init_timeout_seconds
        )  # groups begin with torch's; the first step can compile for minutes
        session.at(f"{self.stage_job.stage.name}, loading")
        self.checkpointer.load()
        session.stop_if_asked()
        first = self.step + 1
        self.metrics_processor.resume(self.step, self.checkpointer.sealed_records)
        self.set_mask()
        if self.stage_job.stage.freeze:
            begin_frozen(self.model_parts[0])
        if self.step == 0:
            self.validate()
        self.after_step()  # what a session before this one may not have come to
        assert self.dataloader is not None
        batches = self.batch_generator(self.dataloader)
        while self.should_continue_training():
            self.step += 1
            session.at(f"{self.stage_job.stage.name}, step {self.step}")
            self.set_mask()
            if self.stage_job.stage.freeze:
                freeze(self.model_parts[0], self.stage_job.stage, self.step)
            self.gradient_accumulation_steps = self.stage_job.micro_batches(self.step)
            self.gc_handler.run(self.step)
            stopping = self.train_step(batches).asked_to_stop
            last = self._is_last()
            if last or self.step % self.stage_job.stage.every(self.stage_job.recipe.validation.interval) == 0:
                self.validate()
            self.checkpointer.save(self.step, last_step=last or stopping)
            if stopping and not last:
                raise signals.stopped(session.place)
            self.after_step()
            if last:
                break
            if self.step == first:
                self._set_timeout(comm.train_timeout_seconds)
        self.checkpointer.finish()
        self._set_timeout(comm.init_timeout_seconds)  # growing takes its time too

    def post_dataloading_process(
        self, input_dict: dict[str, torch.Tensor], labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], dict[str, Any]]:
        """What the model is called with: a head that computes the loss needs the labels; masks are the model's own."""
        extra = {"labels": labels} if self.stage_job.stage.train.loss_chunk else {}
        return input_dict["input"], labels, extra, {}

    def train_step(self, batches: Iterator[Batch]) -> Verdict:
        """torchtitan's, for micro batches of equally many tokens, none of them padding, on every rank."""
        self.optimizers.zero_grad()
        lr = self.lr_schedulers.schedulers[0].get_last_lr()[0]
        loss = self._backward(batches)
        parameters = [p for m in self.model_parts for p in m.parameters()]
        norm = dist_utils.clip_grad_norm_(parameters, self.job_config.training.max_norm, foreach=True)
        norm = norm.to(self.device)  # on the CPU, where FSDP offloads
        verdict = self.guard.check(self.step, loss, norm)
        if verdict.update:
            self.checkpointer.maybe_wait_for_staging()
            self.optimizers.step()
        self.lr_schedulers.step()
        if verdict.event or self.metrics_processor.should_log(self.step):
            dims = self.parallel_dims
            worst = dist_utils.dist_max(loss * dims.dp_replicate * dims.dp_shard, dims.get_optional_mesh("loss"))
            extra = {"lr": lr, **verdict.event}
            self.metrics_processor.log(self.step, verdict.loss, worst, norm.item(), extra)
        if verdict.error:
            raise verdict.error
        return verdict

    def _backward(self, batches: Iterator[Batch]) -> torch.Tensor:
        """Accumulates the gradient of the mean loss per token of a step; returns this rank's share of that loss."""
        tokens = torch.tensor(float(self.stage_job.stage.batches.at(self.step)), device=self.device)
        losses = []
        for _ in range(self.gradient_accumulation_steps):
            inputs, labels = next(batches)
            loss = self.forward_backward_step(
                input_dict={name: tensor.to(self.device) for name, tensor in inputs.items()},
                labels=labels.to(self.device),
                global_valid_tokens=tokens,
            ).detach()
            losses.append(loss.full_tensor() if isinstance(loss, DTensor) else loss)
        return torch.stack(losses).sum()

    @torch.no_grad()
    def validate(self) -> None:
        """Mean loss per token over the held-out sequences, the same ones every time and on any number of ranks."""
        job, dims = self.stage_job, self.parallel_dims
        if job.recipe.validation.sequences == 0:
            return
        rows = open_validation(job.recipe.data, job.recipe.validation.sequences, job.recipe.validation.take)
        ranks, rank = 1, 0
        if dims.dp_enabled:
            mesh = dims.get_mesh("batch")
            ranks, rank = mesh.size(), mesh.get_local_rank()
        batches = validation_batches(rows, job.stage.seq_len, job.micro_batch, rank, ranks)
        total = self._summed_loss(batches)
        loss = dist_utils.dist_sum(total, dims.get_optional_mesh("loss")) / (len(rows) * job.stage.seq_len)
        self.metrics_processor.log_validation(loss=loss, step=self.step)

    def _summed_loss(self, batches: Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]) -> torch.Tensor:
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        amp: AbstractContextManager[Any] = self.maybe_enable_amp
        with self.evaluating() as model:
            for input_dict, labels in batches:
                input_dict = {name: tensor.to(self.device) for name, tensor in input_dict.items()}
                inputs, labels, extra, masks = self.post_dataloading_process(input_dict, labels.to(self.device))
                with self.train_context(), amp:
                    loss = self.loss_fn(model(inputs, **extra, **masks), labels)
                total += loss.full_tensor() if hasattr(loss, "full_tensor") else loss
                self.metrics_processor.ntokens_since_last_log += int((labels != IGNORE_INDEX).sum())
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
        """Whether the stage ends here. Where the loss decides it, rank 0 does so for all, and writes it down before
        anything follows from it."""
        job, step, until = self.stage_job, self.step, self.stage_job.stage.until
        if until and job.finds_end and (step == until.max_steps or (step >= until.min_steps and until.looks_at(step))):
            fall = until.fall(self.metrics_processor.losses, job.stage.batches, step)
            ends = torch.tensor(int(step == until.max_steps or fall < until.slope), device=self.device)
            dist.broadcast(ends, 0)
            if ends.item():
                if dist.get_rank() == 0 and job.on_end_found:
                    job.on_end_found(step, fall)
                job.stage, job.finds_end = dataclasses.replace(job.stage, steps=step), False
        return step == job.stage.steps

    def set_mask(self) -> None:
        if self.stage_job.stage.mask:
            self.model_parts[0].set_mask(self.stage_job.stage.mask_value(self.step))

    def _set_timeout(self, seconds: int) -> None:
        dist_utils.set_pg_timeouts(timedelta(seconds=seconds), self.parallel_dims)

    def state_dict(self) -> dict[str, Any]:
        # The step alone: the position in the data is the loader's, and tokens follow from the plan. torchtitan's
        # ntokens_seen is one rank's count and wrong as soon as the number of ranks changes.
        stage = self.stage_job.stage
        state = {
            "step": self.step,
            "recent_losses": self.guard.recent,
            **({"mask": stage.mask_value(self.step)} if stage.mask else {}),
        }
        if stage.until:
            first = self.step - stage.until.window
            losses = self.metrics_processor.losses
            state["losses"] = json.dumps({step: loss for step, loss in losses.items() if step > first})
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step, self.guard.recent = state_dict["step"], state_dict["recent_losses"]
        losses = json.loads(state_dict.get("losses", "{}"))
        self.metrics_processor.losses = {int(step): loss for step, loss in losses.items()}


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
