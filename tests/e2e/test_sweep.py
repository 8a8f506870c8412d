"""Many runs of one recipe, and what a folder of runs says of itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch import REPOSITORY, Workplace, assert_audited, environment, run_tool, weights

from stackgrow.run_folder.folder import RunFolder
from stackgrow.run_folder.state import FINISHED, RUNNING, STOPPED, state_of

SWEEP = [
    sys.executable,
    str(REPOSITORY / "tools" / "sweep.py"),
    "tiny.toml",
    "--out",
    "swept",
]
TARGET = "stage-2-train-4L"


def test_a_sweep_is_stopped_goes_on_and_is_pruned(workplace: Workplace) -> None:
    folder = workplace.folder / "swept"
    command = [*SWEEP, "--over", "seed=1,2", "--side-by-side", "2"]
    command += ["--set", "growth[0].timing=10Ki", "--set", "budget.tokens=20Ki"]
    runs = [folder / "tiny-seed-1", folder / "tiny-seed-2"]

    # Stopped as soon as both runs train: both save.
    process = subprocess.Popen(
        command,
        cwd=workplace.folder,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not all(state_of(run).step for run in runs):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert {state_of(run).state for run in runs} <= {RUNNING, STOPPED, FINISHED}
    os.kill(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 75
    assert "tiny-seed-1  started" in output
    unfinished = [run for run in runs if state_of(run).state != FINISHED]
    assert unfinished
    for run in unfinished:
        assert state_of(run).state == STOPPED
        assert "SIGTERM" in state_of(run).why

    # The same command goes on, and a third time finds nothing to do.
    code, output = run_tool("sweep", *command[2:], cwd=workplace.folder)
    assert code == 0, output
    assert "2 of 2 runs are finished" in output
    code, output = run_tool("sweep", *command[2:], cwd=workplace.folder)
    assert output.count("finished before") == 2
    for run in runs:
        assert_audited(run)
    last = [weights(RunFolder(run).stage(TARGET).final_checkpoint()) for run in runs]
    assert last[0] != last[1]

    # What the folder says, and what it can do without.
    code, text = run_tool("runs", "swept", "--json", cwd=workplace.folder)
    assert code == 0
    rows = json.loads(text)
    assert [(row["state"], row["stage"], row["step"]) for row in rows] == [
        (FINISHED, TARGET, 10)
    ] * 2
    assert rows[0]["tokens"] == rows[0]["budget_tokens"] == 20 * 1024
    before = rows[0]["disk_bytes"]
    code, text = run_tool("runs", "swept", "--prune", cwd=workplace.folder)
    assert "could be freed" in text
    assert state_of(runs[0]).disk_bytes == before
    run_tool("runs", "swept", "--prune", "--delete", cwd=workplace.folder)
    assert state_of(runs[0]).disk_bytes < before
    assert RunFolder(runs[0]).stage(TARGET).sealed_steps() == [10]
    assert_audited(runs[0])


@pytest.mark.parametrize(
    ("over", "told"),
    [
        (["seed=1,1"], "two runs of the sweep would share this folder"),
        (["growth[0].timing=5K,lots"], "growth[0].timing"),
        (["seed"], "must be KEY=VALUE,VALUE"),
    ],
)
def test_a_sweep_that_cannot_run_starts_nothing(
    workplace: Workplace, over: list[str], told: str
) -> None:
    arguments = ["tiny.toml", "--out", "refused"]
    for one in over:
        arguments += ["--over", one]
    code, output = run_tool("sweep", *arguments, cwd=workplace.folder)
    assert code == 2
    assert told in output
    assert not (workplace.folder / "refused").exists()


def test_a_folder_without_runs_is_told(tmp_path: Path) -> None:
    code, output = run_tool("runs", str(tmp_path), cwd=tmp_path)
    assert code == 2
    assert "is no run and holds none" in output
