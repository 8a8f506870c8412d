"""How long each rank keeps the others waiting.

Ranks leave a step together (guard.py) and wait for each other in the next one's first collective. What a rank takes in
between, and for data later in the step, is its own time: a slow disk, a loader that does not keep up, a busy host. What
a GPU that is slow takes longer within the step is not seen: it is spent inside of collectives by all.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Waits:
    """Seconds per optimizer step."""

    data: float  # of the rank that waits longest for its batches
    lag: float  # by how much the slowest rank's own time exceeds the fastest's
    slowest_rank: int


class Pace:
    """The stopwatch of this rank."""

    def __init__(self) -> None:
        self.own_seconds = 0.0  # since the last look
        self._began: float | None = None

    def begin(self) -> None:
        """The ranks are together, or this one has begun its pass and turns to the next batch."""
        self._began = time.perf_counter()

    def end(self) -> None:
        """A pass begins."""
        if self._began is not None:
            self.own_seconds += time.perf_counter() - self._began
            self._began = None

    def compare(self, data_seconds: float, steps: int, device: torch.device) -> Waits:
        """Collective: the ranks' own times since the last call, which was ``steps`` steps ago; ``data_seconds`` of
        this one's were spent on waiting for data."""
        # A row for each rank, of which this one fills its own: torch renames what gathers from release to release.
        rows = torch.zeros(dist.get_world_size(), 2, dtype=torch.float32, device=device)
        rows[dist.get_rank()] = torch.tensor(
            [self.own_seconds, data_seconds], device=device
        )
        dist.all_reduce(rows)
        self.own_seconds = 0.0
        own_of_all, data_of_all = rows.cpu().unbind(dim=1)
        return Waits(
            data=data_of_all.max().item() / steps,
            lag=(own_of_all.max() - own_of_all.min()).item() / steps,
            slowest_rank=int(own_of_all.argmax()),
        )
