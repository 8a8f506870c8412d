"""What a person watching a run sees: one line that renews itself on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from stackgrow.text import clock, human

COLUMNS = 80  # of a terminal that does not say how wide it is
WORTH_SAYING = 0.05  # of a step's time
NOBODY_READS = (errno.EPIPE, errno.EIO)
RENEW_LINE = "\r\x1b[K"  # back to its beginning, and erased


class Progress:
    """Progress of one stage; silent unless ``enabled`` (rank 0)."""

    def __init__(
        self, stage: str, steps: int, *, enabled: bool, stream: TextIO | None = None
    ):
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
        parts = {
            "stage": self.stage,
            "step": f"step {step}/{self.steps} ({100 * step // self.steps}%)",
            "tokens": f"tokens {human(record['tokens'])}",
            "loss": f"loss {record['loss']:.4f}",
            "validation": self.validation,
            "rate": f"lr {record['lr']:.2e}",
            "speed": f"{human(record['tps'])} tok/s",
            "waits": self._waits(record, seconds_per_step),
            "left": f"ETA {clock(seconds_per_step * (self.steps - step))}",
        }
        self._show(self._fitted(parts))

    def _waits(self, record: Mapping[str, Any], seconds_per_step: float) -> str:
        """How much of the GPUs is used, and what keeps them from more, where it is worth saying."""
        seconds_per_step = max(seconds_per_step, 1e-9)
        parts = []
        if "mfu" in record:
            parts.append(f"MFU {record['mfu']:.0%}")
        data_share = record.get("data_wait", 0.0) / seconds_per_step
        if data_share > WORTH_SAYING:
            parts.append(f"waits for data {data_share:.0%}")
        lag_share = record.get("lag", 0.0) / seconds_per_step
        if lag_share > WORTH_SAYING:
            parts.append(f"rank {record['slowest_rank']} late by {lag_share:.0%}")
        return "  ".join(parts)

    def _fitted(self, parts: dict[str, str]) -> str:
        """The parts that are there, in one line: on a terminal no more than it has room for, since a line that breaks
        cannot be renewed."""
        room = self._columns() - 1 if self.terminal else None
        for least in ("", "rate", "waits", "tokens", "validation", "speed"):
            parts.pop(least, None)
            line = "  ".join(part for part in parts.values() if part)
            if room is None or len(line) <= room:
                return line
        return line[:room]

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self.stream.fileno()).columns or COLUMNS
        except OSError:
            return COLUMNS

    def validated(self, step: int, loss: float) -> None:
        """Keeps the newest validation loss in the line; where lines do not renew themselves, says it at once."""
        self.validation = f"val {loss:.4f}"
        if not self.terminal:
            self._show(
                f"{self.stage}  step {step}/{self.steps}  validation loss {loss:.4f}"
            )

    def close(self) -> None:
        """Leaves the last line standing."""
        if self.enabled and self.terminal:
            say("", stream=self.stream)

    def _show(self, line: str) -> None:
        if not self.enabled:
            return
        if self.terminal:
            say(f"{RENEW_LINE}{line}", end="", stream=self.stream)
        else:
            say(line, stream=self.stream)


def say(line: str, end: str = "\n", stream: TextIO | None = None) -> None:
    """Prints a line at once. Training goes on where nobody reads any more, as in ``| head`` or a closed terminal."""
    stream = stream or sys.stdout
    try:
        print(line, end=end, file=stream, flush=True)
    except OSError as error:
        if error.errno not in NOBODY_READS:
            raise
        hush(stream)


def hush(stream: TextIO) -> None:
    """What is written to ``stream`` from now on, and what waits to be, goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
