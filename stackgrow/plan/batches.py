"""How many tokens each optimizer step of a stage takes, where the global batch grows at its start. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from stackgrow.recipe.keys import Train


@dataclass(frozen=True)
class Batches:
    """Phases of (steps, tokens per step), then ``full`` tokens per step for ever. Steps count from 1."""

    phases: tuple[tuple[int, int], ...]
    full: int

    @staticmethod
    def of(train: Train) -> Batches:
        return Batches(tuple((p.length.steps(p.batch), p.batch) for p in train.batch_warmup), train.global_batch_tokens)

    @property
    def sizes(self) -> set[int]:
        return {self.full, *(batch for _, batch in self.phases)}

    def at(self, step: int) -> int:
        """Tokens of one optimizer step."""
        return self.tokens(step) - self.tokens(step - 1)

    def tokens(self, steps: int) -> int:
        """Tokens of the first ``steps`` steps."""
        total = 0
        for length, batch in self.phases:
            total, steps = total + min(steps, length) * batch, max(steps - length, 0)
        return total + steps * self.full

    def within(self, tokens: int) -> int:
        """The most steps that ``tokens`` are enough for; below 0 where there are less than none."""
        steps = 0
        for length, batch in self.phases:
            done = min(length, tokens // batch)
            steps, tokens = steps + done, tokens - done * batch
            if done < length:
                return steps
        return steps + tokens // self.full

    def nearest(self, tokens: int) -> int:
        """The number of steps whose tokens are nearest, halves up."""
        steps = self.within(tokens)
        return steps + (2 * (tokens - self.tokens(steps)) >= self.at(steps + 1)) if steps >= 0 else steps
