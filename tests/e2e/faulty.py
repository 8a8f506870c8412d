"""tools/run_recipe.py with a fault at a chosen point of its work, and a word on what it is doing.

``FAULT="kill seal.hashed 2"``: at the second passing of that point in rank ``FAULT_RANK`` (0), the process gets
SIGKILL; "term" is SIGTERM, "stop" SIGSTOP, "reader" SIGKILL for the processes that read its data, "full" an OSError "no space left", "nan" a loss that is NaN. Several are
parted by semicolons; in ``FAULT_RANK`` "all", every rank has them. "poison" makes a weight NaN, "sleep" takes 15
seconds. ``FILE_LIMIT``: bytes beyond which no file can grow. ``RNG``: tells whether training drew from any global random
number generator. ``STALE``: what other ranks than 0 see below this folder is STALE_SECONDS old (stale.py).
``DISK_LOG``: what is done to files and names is written there (disk.py). ``PHASE_FILE``: rank 0 keeps the phase it is in there, at most 16 bytes.
"""

from __future__ import annotations

import errno
import functools
import mmap
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import psutil
import torch
from disk import watch
from stale import StaleNames
from torch.distributed.checkpoint import filesystem

from stackgrow import seal
from stackgrow.checkpoint import convert, grow
from stackgrow.run import engine, extend
from stackgrow.titan.checkpoint import StageCheckpoints
from stackgrow.titan.metrics import RecordWriter
from stackgrow.titan.trainer import StageTrainer

REPOSITORY = Path(__file__).parents[2]
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}

# point -> what it comes before ("<") or after (">")
POINTS: dict[str, tuple[Any, str, str]] = {
    "train.step": (StageTrainer, "train_step", "<"),
    "train.backward": (StageTrainer, "_backward", ">"),
    "validate": (StageTrainer, "validate", "<"),
    "log": (RecordWriter, "write", "<"),
    "load": (StageCheckpoints, "dcp_load", "<"),
    "save": (StageCheckpoints, "save", "<"),
    "save.data": (filesystem.FileSystemWriter, "write_data", "<"),
    "save.metadata": (filesystem.FileSystemWriter, "finish", "<"),
    "save.rename": (filesystem.FileSystem, "rename", "<"),
    "save.committed": (filesystem.FileSystemWriter, "finish", ">"),
    "seal.hashed": (seal, "seal", "<"),
    "seal.sealed": (seal, "seal", ">"),
    "purge.unsealed": (shutil, "rmtree", "<"),
    "grow.begin": (convert, "begin", ">"),
    "grow.computed": (convert, "_compute", ">"),
    "grow.written": (convert, "write_part", ">"),
    "grow.committed": (convert, "commit", ">"),
    "grow.sealed": (grow, "seal_grown", ">"),
    "extend.kept": (extend, "keep_ended", ">"),
    "extend.announced": (extend, "announce", ">"),
    "extend.begun": (extend, "delete", "<"),
    "found": (engine, "write_found", ">"),
    "done": (engine, "_done_record", ">"),
}
PHASES = {
    "load": (StageCheckpoints, "load"),
    "validate": (StageTrainer, "validate"),
    "save": (StageCheckpoints, "save"),
    "seal": (StageCheckpoints, "_seal"),
    "purge": (seal, "purge"),
    "grow": (grow, "grow"),
    "done": (engine, "_done_record"),
    "final": (engine, "ledger"),
}


def wrap(
    owner: Any, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(around(original)))


def install_fault(action: str, point: str, count: int) -> None:
    owner, name, place = POINTS[point]
    passed = 0

    def reached(result: Any, *args: Any) -> Any:
        nonlocal passed
        passed += 1
        if passed != count:
            return result
        if action == "nan":
            return result * float("nan")
        if action == "sleep":
            time.sleep(15)
            return result
        if action == "poison":
            next(iter(args[0].weights().values())).view(-1)[0] = float("nan")
            return None
        if action == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), point)
        if action == "reader":
            for child in psutil.Process().children():
                child.kill()
            return result
        os.kill(os.getpid(), SIGNALS[action])
        return result

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any, **kwargs: Any) -> Any:
            if place == "<":
                reached(None, *args)
                return original(*args, **kwargs)
            return reached(original(*args, **kwargs))

        return inner

    wrap(owner, name, around)


def watch_generators(train: Callable[..., Any]) -> Callable[..., Any]:
    def states() -> tuple[str, str, str]:
        return (
            repr(random.getstate()),
            repr(numpy.random.get_state()),
            torch.get_rng_state().numpy().tobytes().hex(),
        )

    def inner(trainer: StageTrainer) -> Any:
        before = states()
        result = train(trainer)
        print(
            f"{trainer.stage_job.stage.name}: generators {'untouched' if states() == before else 'drawn from'}"
        )
        return result

    return inner


def install_phases(file: str) -> None:
    with open(file, "r+b") as stream:  # noqa: PTH123
        board = mmap.mmap(stream.fileno(), 16)

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        before, board[:] = board[:], name.encode().ljust(16)
        try:
            yield
        finally:
            board[:] = before

    def around(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrapper(original: Callable[..., Any]) -> Callable[..., Any]:
            def inner(*args: Any, **kwargs: Any) -> Any:
                with phase(name):
                    return original(*args, **kwargs)

            return inner

        return wrapper

    def train(original: Callable[..., Any]) -> Callable[..., Any]:
        def inner(trainer: StageTrainer) -> Any:
            with phase(
                "base train" if trainer.stage_job.stage.index == 0 else "target train"
            ):
                return original(trainer)

        return inner

    board[:] = b"start".ljust(16)
    for name, (owner, attribute) in PHASES.items():
        wrap(owner, attribute, around(name))
    wrap(StageTrainer, "train", train)


if __name__ == "__main__":
    rank = os.environ.get("RANK", "0")
    if "FAULT" in os.environ and os.environ.get("FAULT_RANK", "0") in (rank, "all"):
        for fault in os.environ["FAULT"].split(";"):
            action, point, count = fault.split()
            install_fault(action, point, int(count))
    if "FILE_LIMIT" in os.environ:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["FILE_LIMIT"]),) * 2)
    if "STALE" in os.environ and rank != "0":
        StaleNames(Path(os.environ["STALE"]), float(os.environ["STALE_SECONDS"]))
    if "DISK_LOG" in os.environ:
        watch(Path(os.environ["DISK_LOG"]))
    if "RNG" in os.environ:
        wrap(StageTrainer, "train", watch_generators)
    if "PHASE_FILE" in os.environ and rank == "0":
        install_phases(os.environ["PHASE_FILE"])
    sys.argv[0] = str(REPOSITORY / "tools" / "run_recipe.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
