"""tools/cluster/slurm.sbatch on a real Slurm: submitted, preempted, requeued, finished; and what is not requeued."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm
from launch import REPOSITORY, Workplace, assert_audited, environment, losses

from stackgrow.run_folder.folder import RunFolder
from stackgrow.run_folder.state import FINISHED, STOPPED, state_of

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        not slurm.is_installed(), reason="apt-get install slurm-wlm; run as root"
    ),
]
SMALL = [
    "--nodes=1",
    "--gpus-per-node=1",
    "--cpus-per-task=2",
    "--mem=1000",
    "--oversubscribe",
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as found:
        ours = environment()
        ours["SLURM_CONF"] = found["SLURM_CONF"]
        yield ours


@pytest.fixture(scope="module")
def checkout(workplace: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user submits from: tools/, an environment in .venv, a recipe and its data."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("tools", "stackgrow"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "store").symlink_to(workplace.folder / "store")
    (folder / "tiny.toml").write_bytes((workplace.folder / "tiny.toml").read_bytes())
    activate = folder / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(
        f'export PATH="{Path(sys.executable).parent}:$PATH"\n', encoding="utf-8"
    )
    return folder


def submit(
    cluster: dict[str, str], checkout: Path, options: list[str], arguments: list[str]
) -> str:
    words = [
        "sbatch",
        f"--chdir={checkout}",
        *options,
        str(REPOSITORY / "tools/cluster/slurm.sbatch"),
        *arguments,
    ]
    before = os.getcwd()  # noqa: PTH109
    os.chdir(checkout)
    try:
        answer = slurm.ask(cluster, *words)
    finally:
        os.chdir(before)
    match = re.search(r"Submitted batch job (\d+)", answer)
    assert match, answer
    return match[1]


def steps_of(run: Path) -> int:
    return state_of(run).step


def test_a_preempted_run_saves_is_requeued_and_finishes(
    cluster: dict[str, str], checkout: Path, reference: Path
) -> None:
    run = checkout / "run"
    job = submit(
        cluster,
        checkout,
        [*SMALL, "--time=20", "--exclusive"],
        ["tiny.toml", "--set", "run.folder=run"],
    )
    deadline = time.monotonic() + 300
    while not RunFolder(run).stage("stage-0-train-2L").sealed_steps():
        log = checkout / f"stackgrow-{job}.log"
        assert time.monotonic() < deadline, (
            log.read_text() if log.exists() else "no log"
        )
        time.sleep(0.2)

    urgent = slurm.ask(
        cluster,
        "sbatch",
        "--partition=high",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=sleep 5",
    )
    assert "Submitted" in urgent
    slurm.wait_for_state(cluster, job, {"COMPLETED"}, 600)
    log = (checkout / f"stackgrow-{job}.log").read_text(encoding="utf-8")
    assert "stopped" in log  # what --state says before the job goes back
    shown = slurm.ask(cluster, "scontrol", "show", "job", job)
    assert int(re.findall(r"Restarts=(\d+)", shown)[0]) >= 1
    assert state_of(run).state == FINISHED
    assert len(RunFolder(run).provenance()["sessions"]) >= 2
    assert losses(run) == losses(reference)
    assert_audited(run)


def test_a_run_that_fails_after_the_time_limits_signal_is_not_requeued(
    cluster: dict[str, str], checkout: Path
) -> None:
    arguments = ["tiny.toml", "--set", "run.folder=failing", "--set", "data.path=gone"]
    job = submit(cluster, checkout, [*SMALL, "--time=20"], arguments)
    slurm.wait_for_state(cluster, job, {"RUNNING"}, 60)
    slurm.ask(cluster, "scancel", "--batch", "--signal=USR1", job)
    slurm.wait_for_state(cluster, job, {"FAILED"}, 300)
    assert "Restarts=0" in slurm.ask(cluster, "scontrol", "show", "job", job)


def test_a_run_that_is_cancelled_saves_and_stays_away(
    cluster: dict[str, str], checkout: Path
) -> None:
    run = checkout / "cancelled"
    job = submit(
        cluster,
        checkout,
        [*SMALL, "--time=20"],
        ["tiny.toml", "--set", "run.folder=cancelled"],
    )
    deadline = time.monotonic() + 300
    while steps_of(run) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    slurm.ask(cluster, "scancel", "--signal=TERM", f"{job}.0")
    slurm.wait_for_state(cluster, job, {"FAILED"}, 300)
    assert state_of(run).state == STOPPED
    assert "StoppedError" in state_of(run).why
    assert "Restarts=0" in slurm.ask(cluster, "scontrol", "show", "job", job)
