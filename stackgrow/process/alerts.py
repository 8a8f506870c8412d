"""A command of the user's own that is started when somebody should look at a run: ``--set run.on_event=./notify.sh``.

It runs in a shell, beside the run, on rank 0 alone, and is told in its environment what has happened:

    STACKGROW_EVENT    "stall": rank 0 has been at one thing for longer than run.stall_seconds
                       "spike": a loss that jumped, or a loss or gradient that is not finite
                       "stop": the run has ended before its end, for whatever reason
                       "growth": the model has grown
                       "done": the run is at its end
    STACKGROW_MESSAGE  what the run itself says of it
    STACKGROW_RUN      the run folder
"""

from __future__ import annotations

import logging
import os
import subprocess
import threading
import time
from pathlib import Path

logger = logging.getLogger(__name__)

LAST_SECONDS = 20.0  # that a command has at the end of a run, before whatever ends the machine may end it, too

_alerts: Alerts | None = None


class Alerts:
    """Starts ``command`` at every event of the run in ``folder``; its output goes to ``log``."""

    def __init__(self, command: str, folder: Path, log: Path, stall_seconds: float):
        self.command = command
        self.folder = folder
        self.log = log
        self.stall_seconds = stall_seconds
        self.place = "the start"
        self._since = time.monotonic()
        self._stall_told = False
        self._last: subprocess.Popen[bytes] | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def at(self, place: str) -> None:
        self.place = place
        self._since = time.monotonic()
        self._stall_told = False

    def tell(self, event: str, message: str) -> None:
        variables = {
            "STACKGROW_EVENT": event,
            "STACKGROW_MESSAGE": message,
            "STACKGROW_RUN": str(self.folder),
        }
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("ab") as output:
                self._last = subprocess.Popen(
                    self.command,
                    shell=True,
                    env={**os.environ, **variables},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,  # what is sent to the run's processes is not for it
                )
        except OSError as error:
            logger.warning("run.on_event could not be started: %s", error)

    def end(self) -> None:
        """Waits a little for the command that was started last."""
        self._ended.set()
        if self._last:
            try:
                self._last.wait(LAST_SECONDS)
            except subprocess.TimeoutExpired:
                logger.warning("run.on_event is still running after %g s", LAST_SECONDS)

    def _watch(self) -> None:
        while not self._ended.wait(min(5.0, self.stall_seconds / 4)):
            seconds = time.monotonic() - self._since
            if seconds > self.stall_seconds and not self._stall_told:
                self._stall_told = True
                self.tell("stall", f"{self.place}: nothing new for {seconds:.0f} s")


def start(command: str, folder: Path, log: Path, stall_seconds: float) -> None:
    """From now on events are told; without this, the functions below do nothing."""
    global _alerts
    _alerts = Alerts(command, folder, log, stall_seconds)


def at(place: str) -> None:
    """What the run is at: a sign of life."""
    if _alerts:
        _alerts.at(place)


def tell(event: str, message: str) -> None:
    if _alerts:
        _alerts.tell(event, message)


def end() -> None:
    global _alerts
    if _alerts:
        _alerts.end()
        _alerts = None
