"""torchrun itself: it restarts a run whose rank died, passes a request to stop on, and takes its workers with it."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from launch import Workplace, environment, losses, stage_of, steps_logged, weights

BASE, TARGET = "stage-0-train-2L", "stage-2-train-4L"


def start(
    workplace: Workplace, place: Path, *options: str, ranks: int
) -> subprocess.Popen:
    command = workplace.command(f"run.folder={place}", ranks=ranks)
    at = command.index("--standalone")
    command[at:at] = options
    output = (place.parent / "output.txt").open("a")
    # As tools/cluster/node.sh does: else ranks that start again may find the addresses of those that died.
    env = {**environment(), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(
        command, cwd=workplace.folder, env=env, stdout=output, stderr=output
    )


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.01)


def workers(torchrun: subprocess.Popen) -> list[psutil.Process]:
    return [
        p
        for p in psutil.Process(torchrun.pid).children()
        if "run_recipe.py" in " ".join(p.cmdline())
    ]


def test_a_dead_rank_is_restarted_and_a_request_is_passed_on(
    workplace: Workplace, reference_fsdp: Path, tmp_path: Path
) -> None:
    place = tmp_path / "run"
    torchrun = start(workplace, place, "--max-restarts", "1", ranks=2)
    try:
        until(lambda: steps_logged(place, BASE) >= 1)
        next(p for p in workers(torchrun) if p.environ()["RANK"] == "1").kill()
        until(lambda: steps_logged(place, TARGET) >= 1)  # after the restart
        torchrun.send_signal(signal.SIGTERM)
        assert torchrun.wait(300) != 0
    finally:
        torchrun.kill()
    output = (tmp_path / "output.txt").read_text(encoding="utf-8")
    assert "waited in vain for another rank; silent: 1" in output
    assert f"{TARGET}, step " in output
    assert "stopped by SIGTERM" in output
    assert "deprecated" not in output, "torch 2.15 of what torchtitan calls"
    saved = stage_of(place, TARGET).sealed_steps()[-1]
    assert saved == steps_logged(place, TARGET), "every step that was done is saved"
    workplace.run(f"run.folder={place}", warm_ranks=2)
    assert losses(place) == losses(reference_fsdp)
    assert weights(stage_of(place, TARGET).checkpoint(20)) == weights(
        stage_of(reference_fsdp, TARGET).checkpoint(20)
    )


def test_workers_die_with_torchrun(workplace: Workplace, tmp_path: Path) -> None:
    place = tmp_path / "run"
    torchrun = start(workplace, place, ranks=1)
    until(lambda: steps_logged(place, BASE) >= 2)
    (worker,) = workers(torchrun)
    os.kill(torchrun.pid, signal.SIGKILL)
    torchrun.wait()
    worker.wait(60)
    workplace.run(f"run.folder={place}", "budget.tokens=23Ki")  # the lock is free
