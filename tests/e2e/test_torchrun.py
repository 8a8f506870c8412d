"""torchrun takes its workers with it. That it restarts them, and passes a request on, is in test_cluster.py."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
from launch import BASE, Workplace, environment, steps_logged


def test_workers_die_with_torchrun(workplace: Workplace, tmp_path: Path) -> None:
    place = tmp_path / "run"
    torchrun = subprocess.Popen(
        workplace.command(f"run.folder={place}", ranks=1),
        cwd=workplace.folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while steps_logged(place, BASE) < 2:
        assert torchrun.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (worker,) = psutil.Process(torchrun.pid).children()
    os.kill(torchrun.pid, signal.SIGKILL)
    torchrun.wait()
    worker.wait(60)
    workplace.run(f"run.folder={place}", "budget.tokens=23Ki")  # the lock is free
