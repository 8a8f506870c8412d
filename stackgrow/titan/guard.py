"""A look at every step before its update: is it finite, is it a spike, was the run asked to stop?

One small all-reduce gives every rank the same numbers, so that all decide alike. It takes the place of the one in
which torchtitan counts tokens.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stackgrow.errors import DivergedError
from stackgrow.process import signals
from stackgrow.recipe.keys import Train

logger = logging.getLogger(__name__)

WINDOW = (
    128  # losses that a spike is measured against, as in OLMo-core's SkipStepOptimizer
)
LEAST = 32  # of them, before a spike can be told from noise
# Of what can be changed in a run that has begun: on_spike = "skip" cannot, it would have left out others before.
REMEDIES = {
    "nonfinite": "to go on without its update, --set train.on_nonfinite=skip",
    "spike": "to go on with its update, --set train.on_spike=record",
}
MAX_SKIPS = 10  # in a row: then it is not the data
EVENTS = {"nonfinite": "loss or gradient is not finite", "spike": "the loss jumped"}
ACTIONS = {"skip": "its update is left out", "record": "recorded"}


@dataclass
class Verdict:
    """What all ranks know of a step. ``event`` is for metrics.jsonl, ``message`` says the same to people; ``error``
    ends the run once that is written."""

    loss: float
    update: bool = True
    asked_to_stop: bool = False
    event: dict[str, Any] = field(default_factory=dict)
    message: str = ""
    error: DivergedError | None = None


class StepGuard:
    """Applies ``train.on_nonfinite`` and ``train.on_spike``.

    ``recent`` [WINDOW] float64 holds the newest losses, newest last, NaN for a step without an update. It is saved
    with the checkpoint: a resumed run decides as an undisturbed one.
    """

    def __init__(self, stage: str, train: Train, copies: int):
        """``copies``: how many ranks hold the same loss (tensor parallel)."""
        self.stage = stage
        self.train = train
        self.copies = copies
        self.recent = torch.full((WINDOW,), math.nan, dtype=torch.float64)

    def check(self, step: int, loss: Tensor, grad_norm: Tensor) -> Verdict:
        """Collective. ``loss`` is this rank's share of the mean loss, ``grad_norm`` the whole gradient's norm."""
        bad_gradient = grad_norm.isfinite().logical_not()
        asked_to_stop = torch.tensor(
            float(signals.asked() is not None), device=loss.device
        )
        numbers = torch.stack(
            [loss.double(), bad_gradient.double(), asked_to_stop.double()]
        )
        dist.all_reduce(numbers)
        loss_sum, bad_gradients, stop_requests = numbers.tolist()

        verdict = Verdict(loss=loss_sum / self.copies, asked_to_stop=stop_requests > 0)
        sigmas = self._sigmas(verdict.loss)
        if bad_gradients or not math.isfinite(verdict.loss):
            self._judge(verdict, step, "nonfinite", self.train.on_nonfinite)
        elif sigmas > self.train.spike_sigmas:
            self._judge(
                verdict, step, "spike", self.train.on_spike, sigmas=round(sigmas, 2)
            )
        self.recent = self.recent.roll(-1)
        self.recent[-1] = verdict.loss if verdict.update else math.nan
        return verdict

    def _sigmas(self, loss: float) -> float:
        """How many standard deviations ``loss`` lies above the mean; 0 while there are too few."""
        past = self.recent[~self.recent.isnan()]
        if len(past) < LEAST:
            return 0.0
        return (loss - past.mean().item()) / max(past.std().item(), 1e-12)

    def _judge(
        self,
        verdict: Verdict,
        step: int,
        event: str,
        action: str,
        sigmas: float | None = None,
    ) -> None:
        """Enters into ``verdict`` what follows from an event: the recipe's ``action``, or the end after many skips."""
        message = f"{self.stage}: {EVENTS[event]} at step {step} (loss {verdict.loss:g}"
        if sigmas is not None:
            message += f", {sigmas} sigmas"
        message += ")"
        skipped = self._skipped_before(step)
        if action == "skip" and skipped >= MAX_SKIPS:
            action = "stop"
            message += f", after {skipped} skipped steps in a row"

        verdict.event = {"event": event, "action": action}
        if sigmas is not None:
            verdict.event["sigmas"] = sigmas
        verdict.message = message
        verdict.update = action == "record"
        if action == "stop":
            verdict.error = DivergedError(
                f"{message}; it was not applied, and the newest checkpoint is from before it. metrics.jsonl names the "
                f"batch; {REMEDIES[event]}; or start anew with a lower rate"
            )
        elif dist.get_rank() == 0:
            logger.warning("%s: %s", message, ACTIONS[action])

    def _skipped_before(self, step: int) -> int:
        """How many steps just before ``step`` made no update."""
        count = 0
        for loss in self.recent.flip(0).tolist():
            if not math.isnan(loss):
                break
            count += 1
        return min(count, step - 1)  # what lies before the first step is NaN, too
