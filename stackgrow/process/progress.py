"""What a person watching a run sees: one line that renews itself on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from stackgrow.text import clock, human

RENEW_LINE = "\r\x1b[K"  # back to its beginning, and erased


class Progress:
    """Progress of one stage; silent unless ``enabled`` (rank 0)."""

    def __init__(self, stage: str, steps: int, *, enabled: bool, stream: TextIO | None = None):
        self.stage, self.steps, self.enabled = stage, steps, enabled
        self.stream = stream or sys.stdout
        self.terminal = self.stream.isatty()
        self.validation = ""
        self._started: tuple[int, float] | None = None

    def start(self, step: int) -> None:
        """Steps done before this session do not count towards the rate."""
        self._started = (step, time.monotonic())

    def update(self, record: Mapping[str, Any]) -> None:
        """Shows a record of metrics.jsonl."""
        step = record["step"]
        first_step, began = self._started or (0, time.monotonic())
        seconds_per_step = (time.monotonic() - began) / max(step - first_step, 1)
        parts = [
            self.stage,
            f"step {step}/{self.steps} ({100 * step // self.steps}%)",
            f"tokens {human(record['tokens'])}",
            f"loss {record['loss']:.4f}{self.validation}",
            f"lr {record['lr']:.2e}",
            f"{human(record['tps'])} tok/s",
            f"ETA {clock(seconds_per_step * (self.steps - step))}",
        ]
        self._show("  ".join(parts))

    def validated(self, step: int, loss: float) -> None:
        """Keeps the newest validation loss in the line; where lines do not renew themselves, says it at once."""
        self.validation = f"  val {loss:.4f}"
        if not self.terminal:
            self._show(f"{self.stage}  step {step}/{self.steps}  validation loss {loss:.4f}")

    def close(self) -> None:
        """Leaves the last line standing."""
        if self.enabled and self.terminal:
            print(file=self.stream, flush=True)

    def _show(self, line: str) -> None:
        if not self.enabled:
            return
        if self.terminal:
            print(f"{RENEW_LINE}{line}", end="", file=self.stream, flush=True)
        else:
            print(line, file=self.stream, flush=True)
