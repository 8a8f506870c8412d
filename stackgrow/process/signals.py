"""SIGTERM, SIGUSR1 (Slurm's --signal), SIGINT and SIGHUP (a terminal that was closed) ask a run to stop at the next
good place; a second one ends it.

A thread listens, since Python's own handlers wait as long as the main thread is inside a collective.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from stackgrow.errors import StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# torchrun and Slurm each pass one request on to every process: what comes so soon is not a second one.
SAME_REQUEST_SECONDS = 2.0
START_SECONDS = 5.0  # after which a rank that waits for the others to start, one of which may have failed, just ends


@dataclass
class _Watching:
    """What ``watch`` has changed."""

    writing: int  # the end of the pipe that signals are written to
    wakeup_before: int
    handlers: dict[int, Any] = field(default_factory=dict)  # before
    timers: list[threading.Timer] = field(default_factory=list)


_received: list[str] = []
_started = threading.Event()
_watching: _Watching | None = None
_forks_registered = False


def watch() -> None:
    """From now on signals are requests, until ``unwatch``. Call in the main thread."""
    global _watching, _forks_registered
    if _watching is not None:
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    _watching = _Watching(writing, signal.set_wakeup_fd(writing))
    for number in SIGNALS:
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            continue  # nohup: it is to go on without its terminal
        _watching.handlers[number] = signal.signal(number, _noted)
    threading.Thread(target=_listen, args=(reading, _watching), daemon=True).start()
    if not _forks_registered:  # which cannot be taken back
        os.register_at_fork(after_in_child=_in_child)
        _forks_registered = True


def unwatch() -> None:
    """Signals do what they did before ``watch``, and requests are forgotten: for a caller that lives on."""
    global _watching
    if _watching is None:
        return
    for number, handler in _watching.handlers.items():
        # None: it was not set from Python, and cannot be set again.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
    signal.set_wakeup_fd(_watching.wakeup_before)
    os.close(_watching.writing)  # which ends the listener
    for timer in _watching.timers:
        timer.cancel()
    _watching = None
    _received.clear()
    _started.clear()


def _noted(number: int, *_: object) -> None:
    """Where the main thread runs Python, it knows at once; without a handler the listener would get nothing."""
    if not _received:
        _received.append(signal.Signals(number).name)


def _listen(reading: int, watching: _Watching) -> None:
    """The listener's thread: every signal that the process gets comes here as one byte, its number."""
    first_request: float | None = None
    while True:
        received = os.read(reading, 1)
        if not received:
            os.close(reading)
            return
        number = received[0]
        if number not in SIGNALS:
            continue
        if first_request is None:
            first_request = time.monotonic()
            _noted(number)
            timer = threading.Timer(START_SECONDS, _end_start)
            timer.daemon = True
            watching.timers.append(timer)
            timer.start()
        elif time.monotonic() - first_request > SAME_REQUEST_SECONDS:
            os._exit(128 + number)


def started() -> None:
    """From now on all ranks are there, and come to the next good place together."""
    _started.set()


def _end_start() -> None:
    if not _started.is_set():
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(stopped("the start"), file=sys.stderr, flush=True)
        os._exit(StoppedError.exit_code)


def _in_child() -> None:
    """A fork, e.g. a loader process, must not report to its parent's listener; the trainer ends it with SIGTERM."""
    global _watching
    if _watching is None:
        return
    _watching = None
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(
            number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN
        )


def leave_group(*_: object) -> None:
    """For loader processes: torchrun signals a whole process group, and the trainer needs them until it has saved."""
    os.setsid()


def asked() -> str | None:
    """The name of the signal that asked this process to stop."""
    return _received[0] if _received else None


def stop_if_asked(place: str) -> None:
    """Raises StoppedError where nothing needs to be saved."""
    if asked():
        raise stopped(place)


def stopped(place: str) -> StoppedError:
    by = asked() or "a signal to another rank"
    return StoppedError(
        f"{place}: stopped by {by}; what was done is saved, and the same command goes on from here"
    )
