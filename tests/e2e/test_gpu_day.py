"""`make gpu` where no GPU is, and its order, limits and results, on jobs that need none."""

import json
import subprocess
import sys
from pathlib import Path

import gpu_day
import pytest
import torch
from launch import REPOSITORY, environment

MACHINE = {
    "device": "none",
    "torch": torch.__version__,
    "torchtitan": "0.2.2",
    "python": "3.11",
    "commit": "",
    "cuda": False,
}
TOOL = REPOSITORY / "tools" / "bench" / "gpu_day.py"


def job(name: str, script: str, minutes: float = 1) -> gpu_day.Job:
    return gpu_day.Job(name, minutes, ["-c", script])


def test_a_machine_without_a_gpu_is_told_what_is_needed(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, str(TOOL), "--out", str(tmp_path / "out")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2
    assert (
        f"needs a CUDA device, and torch {torch.__version__} sees none" in done.stderr
    )
    assert not (tmp_path / "out").exists()


def test_every_job_names_a_script_and_a_recipe_that_are_there() -> None:
    names = [job.name for job in gpu_day.jobs(Path("out"))]
    assert names[:6] == [
        "tests",
        "1.1B",
        "1.1B_loss_chunk",
        "1.1B_selective",
        "1.1B_float8",
        "1.1B_flash_attn",
    ]
    assert len(set(names)) == len(names)
    for one in gpu_day.jobs(Path("out")):
        for word in one.command:
            if word.endswith((".py", ".toml")) and "*" not in word:
                assert (REPOSITORY / word).is_file(), word


def test_a_result_names_command_device_versions_and_output() -> None:
    result = gpu_day.run(job("one", "print('| 410M | 1,234 |')"), MACHINE, 60)
    assert (result["exit_code"], result["timed_out"], result["last_line"]) == (
        0,
        False,
        "| 410M | 1,234 |",
    )
    assert result["torch"] == torch.__version__
    assert gpu_day.state(result) == "done"


def test_a_job_that_lasts_too_long_is_stopped_and_comes_again_before_what_failed(
    tmp_path: Path,
) -> None:
    jobs = [
        job("fails", "raise SystemExit('no memory')"),
        job("long", "import time; time.sleep(60)"),
        job("good", ""),
    ]
    for one in jobs:
        gpu_day.write_json(tmp_path / f"{one.name}.json", gpu_day.run(one, MACHINE, 2))
    waits = job("waits", "")
    states = [gpu_day.state(gpu_day.result_of(one, tmp_path)) for one in [*jobs, waits]]
    assert states == ["failed: no memory", "unfinished", "done", "waits"]
    assert [one.name for one in gpu_day.in_order([*jobs, waits], tmp_path)] == [
        "waits",
        "long",
        "fails",
    ]
    assert (
        json.loads((tmp_path / "long.json").read_text(encoding="utf-8"))["seconds"] < 30
    )
    assert "## fails: failed: no memory" in gpu_day.table(jobs, tmp_path)


def test_what_a_job_needs_is_named_where_it_is_not_there(tmp_path: Path) -> None:
    one = gpu_day.Job(
        "deep",
        1,
        ["-c", ""],
        needs=str(tmp_path / "kernel"),
        remedy="python prepare_kernel.py",
    )
    result = gpu_day.run(one, MACHINE, 60)
    assert (
        gpu_day.state(result)
        == f"failed: {tmp_path}/kernel is not there: python prepare_kernel.py"
    )
