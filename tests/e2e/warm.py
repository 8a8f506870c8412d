"""Tools of the repository in processes that have torch and torchtitan loaded already: forked from a server that
imported them once. Starting Python with torchtitan takes 6 CPU-seconds, and a run of the tests 1 or 2.

They are real processes, with their own standard output, environment and working directory, and can be killed.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
PRELOAD = [
    "stackgrow.run.engine",
    "stackgrow.titan.session",
    "stackgrow.titan.trainer",
    "stackgrow.checkpoint.standalone",
]
PRELOAD += [
    "matplotlib.figure",
    "matplotlib.backends.backend_svg",
    "torch.utils.tensorboard",
]  # a run draws its report


# In a process's environment: it has no matplotlib, as many installations have none, and a run draws no report.
WITHOUT_MATPLOTLIB = "STACKGROW_TESTS_WITHOUT_MATPLOTLIB"

TURN = (
    threading.Lock()
)  # multiprocessing lets no two threads start or look at processes at a time


class Warm:
    """``script`` running with ``arguments`` in ``ranks`` processes; 0: one that has never heard of ranks."""

    def __init__(
        self,
        script: Path,
        arguments: Sequence[str],
        cwd: Path,
        env: Mapping[str, str],
        ranks: int = 0,
    ):
        file, name = tempfile.mkstemp(prefix="warm-")
        os.close(file)
        self._output = Path(name)
        world = world_of(ranks) if ranks else [{}]
        self.processes = [
            _server().Process(
                target=_work,
                args=(str(script), list(arguments), str(cwd), {**env, **rank}, name),
            )
            for rank in world
        ]
        weakref.finalize(self, self._output.unlink, missing_ok=True)
        with TURN:
            for process in self.processes:
                process.start()

    def poll(self) -> int | None:
        """None while it runs, then its exit code: the first one that is not 0."""
        with TURN:
            codes = [process.exitcode for process in self.processes]
        return None if None in codes else next((code for code in codes if code), 0)

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if code is None:
            self.kill()
            pytest.fail(f"still running after {timeout} s:\n{self.output()}")
        return code

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def output(self) -> str:
        return self._output.read_text()


def in_ranks(function: Callable[..., None], ranks: int, *arguments: object) -> None:
    """``function(rank, *arguments)`` in so many processes, all of which must return."""
    with TURN:
        processes = [
            _server().Process(target=function, args=(rank, *arguments))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
    for process in processes:
        process.join(240)
        assert process.exitcode == 0


@functools.cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


def _work(
    script: str, arguments: list[str], cwd: str, env: dict[str, str], output: str
) -> None:
    stream = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    gc.freeze()  # what the server has imported is never garbage: each collection would look through all of it
    if WITHOUT_MATPLOTLIB in env:
        sys.modules["matplotlib"] = None  # type: ignore[assignment]  # "import matplotlib" raises ImportError
    sys.argv = [script, *arguments]
    sys.path[0:0] = [str(Path(script).parent)]
    runpy.run_path(script, run_name="__main__")


def world_of(ranks: int) -> list[dict[str, str]]:
    """What torchrun puts into the environment of each rank of one machine."""
    shared = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
    }
    world = []
    for rank in range(ranks):
        world.append({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
    return world


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])
