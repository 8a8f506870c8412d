"""torchtitan's Trainer running one stage of a plan."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import FSDPModule
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.distributed import utils as dist_utils
from torchtitan.train import Trainer

from stackgrow.data.loader import open_validation, validation_batches
from stackgrow.found import write_found
from stackgrow.titan.checkpoint import StageCheckpoints
from stackgrow.titan.job import StageJob, job_config


class StageTrainer(Trainer):
    """Trains one stage from its verified input to its last sealed checkpoint.

    Differs from torchtitan's Trainer in the checkpoint manager, in the loop's order (validate, then save, so that a
    resumed run has every record) and in validating before the first step, i.e. right after growth.
    """

    @record
    def __init__(self, job: StageJob):
        self.stage_job = job
        super().__init__(job_config(job))
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
        # A stage before this one may have left the shorter timeout behind; the first step can compile for minutes.
        self._set_timeout(comm.init_timeout_seconds)
        self.checkpointer.load()
        first = self.step + 1
        self.metrics_processor.resume(self.step)
        self._set_mask()
        if self.step == 0:
            self.validate()
        assert self.dataloader is not None
        batches = self.batch_generator(self.dataloader)
        while self.should_continue_training():
            self.step += 1
            self._set_mask()
            self.gradient_accumulation_steps = self.stage_job.micro_batches(self.step)
            self.gc_handler.run(self.step)
            self.train_step(batches)
            last = self._is_last()
            if last or self.step % self.stage_job.stage.every(self.stage_job.recipe.validation.interval) == 0:
                self.validate()
            self.checkpointer.save(self.step, last_step=last)
            if last:
                break
            if self.step == first:
                self._set_timeout(comm.train_timeout_seconds)
        self.checkpointer.finish()

    def post_dataloading_process(
        self, input_dict: dict[str, torch.Tensor], labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], dict[str, Any]]:
        """What the model is called with: a head that computes the loss needs the labels; masks are the model's own."""
        extra = {"labels": labels} if self.stage_job.stage.train.loss_chunk else {}
        return input_dict["input"], labels, extra, {}

    @torch.no_grad()
    def validate(self) -> None:
        """Mean loss per token over the held-out sequences, the same ones every time and on any number of ranks."""
        job, dims = self.stage_job, self.parallel_dims
        if job.recipe.validation.sequences == 0:
            return
        rows = open_validation(job.recipe.data, job.recipe.validation.sequences)
        ranks, rank = 1, 0
        if dims.dp_enabled:
            mesh = dims.get_mesh("batch")
            ranks, rank = mesh.size(), mesh.get_local_rank()
        batches = validation_batches(rows, job.stage.seq_len, job.micro_batch, rank, ranks)
        total = self._summed_loss(batches)
        loss = dist_utils.dist_sum(total, dims.get_optional_mesh("loss")) / (len(rows) * job.stage.seq_len)
        self.metrics_processor.log_validation(loss=loss, step=self.step)

    def _summed_loss(self, batches: Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]) -> torch.Tensor:
        model: nn.Module = self.model_parts[0]
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        amp: AbstractContextManager[Any] = self.maybe_enable_amp
        model.eval()
        for input_dict, labels in batches:
            input_dict = {name: tensor.to(self.device) for name, tensor in input_dict.items()}
            inputs, labels, extra, masks = self.post_dataloading_process(input_dict, labels.to(self.device))
            with self.train_context(), amp:
                loss = self.loss_fn(model(inputs, **extra, **masks), labels)
            total += loss.full_tensor() if hasattr(loss, "full_tensor") else loss
            self.metrics_processor.ntokens_since_last_log += int((labels != IGNORE_INDEX).sum())
        model.train()
        # FSDP keeps the head gathered until a backward pass, which a validation has none of; a checkpoint saved
        # then would not find the head's optimizer state.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return total

    def _is_last(self) -> bool:
        """Whether the stage ends here. Where the loss decides it, rank 0 does so for all, and writes it down before
        anything follows from it."""
        job, step, until = self.stage_job, self.step, self.stage_job.stage.until
        if until and job.finds_end and (step == until.max_steps or (step >= until.min_steps and until.looks_at(step))):
            fall = job.stage.fall(self.metrics_processor.losses, step)
            ends = torch.tensor(int(step == until.max_steps or fall < until.slope), device=self.device)
            dist.broadcast(ends, 0)
            if ends.item():
                if dist.get_rank() == 0:
                    write_found(job.folder, job.stage_hash, step, loss_fell_per_billion_tokens=fall)
                job.stage, job.finds_end = dataclasses.replace(job.stage, steps=step), False
        return step == job.stage.steps

    def _set_mask(self) -> None:
        if self.stage_job.stage.mask:
            self.model_parts[0].set_mask(self.stage_job.stage.mask_value(self.step))

    def _set_timeout(self, seconds: int) -> None:
        dist_utils.set_pg_timeouts(timedelta(seconds=seconds), self.parallel_dims)

    def state_dict(self) -> dict[str, Any]:
        # The step alone: the position in the data is the loader's, and tokens follow from the plan. torchtitan's
        # ntokens_seen is one rank's count and wrong as soon as the number of ranks changes.
        stage = self.stage_job.stage
        state = {"step": self.step, **({"mask": stage.mask_value(self.step)} if stage.mask else {})}
        if stage.until:
            first = self.step - stage.until.window
            losses = self.metrics_processor.losses
            state["losses"] = json.dumps({step: loss for step, loss in losses.items() if step > first})
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = state_dict["step"]
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
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
