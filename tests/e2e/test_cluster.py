"""Two nodes on one machine, started as a user starts them; torchrun restarts them where a worker dies, and passes a
request to stop on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launch import (
    BASE,
    FAULTY,
    REPOSITORY,
    RUN_RECIPE,
    TARGET,
    Workplace,
    assert_audited,
    environment,
    losses,
    stage_of,
    steps_logged,
    weights,
)
from warm import Warm, free_port, world_of

from stackgrow.run.claim import run_lock
from stackgrow.run_folder.folder import RunFolder

CLUSTER = REPOSITORY / "tools" / "cluster"


def node(workplace: Workplace, port: int, log: Path, *sets: str) -> subprocess.Popen:
    """One node of two, with one rank."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    here = {
        "PATH": path,
        "NODES": "2",
        "GPUS": "1",
        "HEAD": "localhost",
        "PORT": str(port),
    }
    here |= {"ADDRESS": "127.0.0.1", "RESTARTS": "2"}
    arguments = [
        a for s in (f"data.path={workplace.folder}/store", *sets) for a in ("--set", s)
    ]
    command = [
        str(CLUSTER / "node.sh"),
        str(workplace.folder / "tiny.toml"),
        *arguments,
    ]
    with log.open("w") as stream:
        return subprocess.Popen(
            command, env={**environment(), **here}, stdout=stream, stderr=stream
        )


def worker_of(torchrun: subprocess.Popen) -> psutil.Process:
    return next(
        p
        for p in psutil.Process(torchrun.pid).children()
        if "run_recipe.py" in " ".join(p.cmdline())
    )


def test_a_killed_worker_is_restarted_on_both_nodes_and_a_request_is_passed_on(
    workplace: Workplace, reference_fsdp: Path, tmp_path: Path
) -> None:
    run, port = tmp_path / "run", free_port()
    logs = [tmp_path / f"node-{i}.log" for i in range(2)]

    def told() -> str:
        return "\n".join(log.read_text(encoding="utf-8") for log in logs)

    def until_a_step_of(stage: str) -> None:
        deadline = time.monotonic() + 300
        while steps_logged(run, stage) < 1:
            assert all(n.poll() is None for n in nodes), told()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    nodes = [node(workplace, port, log, f"run.folder={run}") for log in logs]
    try:
        until_a_step_of(BASE)
        worker_of(nodes[1]).kill()
        until_a_step_of(TARGET)  # after the restart
        for torchrun in nodes:
            torchrun.send_signal(signal.SIGTERM)
        assert 0 not in [torchrun.wait(300) for torchrun in nodes], told()
    finally:
        for torchrun in nodes:
            torchrun.kill()
    assert "waited in vain for another rank; silent: 1" in told()
    assert f"{TARGET}, step " in told()
    assert "stopped by SIGTERM" in told()
    assert "deprecated" not in told(), "torch 2.15 of what torchtitan calls"
    saved = stage_of(run, TARGET).sealed_steps()[-1]
    assert saved == steps_logged(run, TARGET), "every step that was done is saved"

    # Gone on with, on other ranks: the base was done in the second life of these.
    output = workplace.run(f"run.folder={run}", warm_ranks=2)
    assert "done before" in output
    assert losses(run) == losses(reference_fsdp)
    assert weights(stage_of(run, TARGET).checkpoint(20)) == weights(
        stage_of(reference_fsdp, TARGET).checkpoint(20)
    )


def ranks_of_their_own(workplace: Workplace, run: Path, *sets: str) -> list[Warm]:
    """Two ranks as two nodes start them: each with a command of its own, the second with ``sets`` too."""
    nodes = []
    for own_sets, world in zip(((), sets), world_of(2), strict=True):
        arguments = workplace.arguments(f"run.folder={run}", *own_sets)
        env = {**environment(), **world, "LOCAL_RANK": "0"}
        nodes.append(Warm(Path(RUN_RECIPE), arguments, workplace.folder, env))
    return nodes


def test_nodes_that_would_train_different_models_are_refused(
    workplace: Workplace, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    nodes = ranks_of_their_own(workplace, run, "seed=1")
    assert 0 not in [node.wait(300) for node in nodes]
    assert "are not those of rank 0; give every node the same" in nodes[1].output()
    assert not (run / "stage-0-train-2L").exists()


def test_nodes_end_together_where_one_is_refused(
    workplace: Workplace, tmp_path: Path
) -> None:
    """Rank 0 alone sees that the run folder is in use; the other node would wait for it until a timeout."""
    run = tmp_path / "run"
    with run_lock(RunFolder(run)):
        nodes = ranks_of_their_own(workplace, run)
        assert [node.wait(120) for node in nodes] == [73, 73]
    told = "".join(node.output() for node in nodes)
    assert told.count("is in use by process") == 1, told


def test_a_rank_that_sees_new_names_late(
    workplace: Workplace, reference_fsdp: Path, tmp_path: Path
) -> None:
    """As on NFS, where for a minute another machine may not know what was made after it had looked for it."""
    run, stale = tmp_path / "run", {"STALE": str(tmp_path), "STALE_SECONDS": "10"}
    arguments = workplace.arguments(f"run.folder={run}")
    process = Warm(
        FAULTY, arguments, workplace.folder, {**environment(), **stale}, ranks=2
    )
    assert process.wait(300) == 0, process.output()
    assert losses(run) == losses(reference_fsdp)
    assert weights(stage_of(run, TARGET).checkpoint(20)) == weights(
        stage_of(reference_fsdp, TARGET).checkpoint(20)
    )
    assert_audited(run)


@pytest.mark.parametrize("script", ["node.sh", "slurm.sbatch"])
def test_scripts_are_valid(script: str) -> None:
    done = subprocess.run(
        ["bash", "-n", str(CLUSTER / script)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_what_a_node_needs_is_asked_for() -> None:
    done = subprocess.run(
        [str(CLUSTER / "node.sh")],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "how many nodes" in done.stderr
