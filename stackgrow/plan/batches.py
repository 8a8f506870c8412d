"""How many tokens each optimizer step of a stage takes, where the global batch grows at its start. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from stackgrow.recipe.keys import Train


class BatchPhase(NamedTuple):
    steps: int
    tokens_per_step: int


@dataclass(frozen=True)
class Batches:
    """Smaller batches for the ``phases``, one after the other, then ``full`` tokens per step for ever. Steps count
    from 1."""

    phases: tuple[BatchPhase, ...]
    full: int

    @staticmethod
    def of(train: Train) -> Batches:
        phases = []
        for warmup in train.batch_warmup:
            phases.append(BatchPhase(warmup.length.steps(warmup.batch), warmup.batch))
        return Batches(tuple(phases), train.global_batch_tokens)

    @property
    def sizes(self) -> set[int]:
        """Every number of tokens per step that comes up."""
        return {self.full} | {phase.tokens_per_step for phase in self.phases}

    @property
    def warmup_steps(self) -> int:
        """Steps until the batch is full."""
        return sum(phase.steps for phase in self.phases)

    def at(self, step: int) -> int:
        """Tokens of one optimizer step."""
        return self.tokens(step) - self.tokens(step - 1)

    def tokens(self, steps: int) -> int:
        """Tokens of the first ``steps`` steps."""
        tokens = 0
        steps_left = steps
        for phase in self.phases:
            tokens += min(steps_left, phase.steps) * phase.tokens_per_step
            steps_left = max(steps_left - phase.steps, 0)
        return tokens + steps_left * self.full

    def within(self, tokens: int) -> int:
        """The most steps that ``tokens`` are enough for; below 0 where there are less than none."""
        steps = 0
        tokens_left = tokens
        for phase in self.phases:
            in_phase = min(phase.steps, tokens_left // phase.tokens_per_step)
            steps += in_phase
            tokens_left -= in_phase * phase.tokens_per_step
            if in_phase < phase.steps:
                return steps
        return steps + tokens_left // self.full

    def nearest(self, tokens: int) -> int:
        """The number of steps whose tokens are nearest, halves up; below 0 where ``tokens`` are less than none."""
        steps = self.within(tokens)
        if steps < 0:
            return steps
        missing = tokens - self.tokens(steps)
        if 2 * missing >= self.at(steps + 1):
            return steps + 1
        return steps
