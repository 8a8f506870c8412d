"""A real Slurm of one node on this machine, with its own configuration and ports, for as long as a test takes."""

from __future__ import annotations

import getpass
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from warm import free_port

DAEMONS = ("slurmctld", "slurmd")
CONFIGURATION = """
ClusterName=stackgrow
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=sched_interval=2,bf_interval=2
RequeueExit=
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=4000 Gres=gpu:1 State=UNKNOWN
PartitionName=low Nodes={host} Default=YES PriorityTier=1 GraceTime=120 PreemptMode=REQUEUE State=UP
PartitionName=high Nodes={host} PriorityTier=10 PreemptMode=OFF State=UP
"""


def program(name: str) -> str | None:
    """Daemons are in /usr/sbin, which is not on every user's path."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def is_installed() -> bool:
    return all(program(name) for name in DAEMONS) and os.geteuid() == 0


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Starts the daemons; yields the environment in which sbatch and the others find them."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    (folder / "gres.conf").write_text(
        "Name=gpu Count=1 File=/dev/null\n", encoding="utf-8"
    )
    text = CONFIGURATION.format(
        host=platform.node(),
        user=getpass.getuser(),
        folder=folder,
        controller=free_port(),
        node=free_port(),
    )
    configuration = folder / "slurm.conf"
    configuration.write_text(text.replace("RequeueExit=\n", ""), encoding="utf-8")
    environment = {**os.environ, "SLURM_CONF": str(configuration)}
    daemons = []
    try:
        for name in DAEMONS:
            path = program(name)
            assert path is not None
            with (folder / f"{name}.log").open("wb") as log:
                daemons.append(
                    subprocess.Popen(
                        [path, "-D"], env=environment, stdout=log, stderr=log
                    )
                )
        deadline = time.monotonic() + 60
        while "idle" not in ask(environment, "sinfo", "--noheader", "--format=%T"):
            assert time.monotonic() < deadline, logs(folder)
            time.sleep(0.5)
        yield environment
    finally:
        ask(
            environment,
            "scancel",
            "--state=RUNNING",
            "--full",
            f"--user={getpass.getuser()}",
        )
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()


def ask(environment: dict[str, str], *words: str) -> str:
    done = subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=60
    )
    return done.stdout + done.stderr


def logs(folder: Path) -> str:
    return "\n".join(
        (folder / f"{name}.log").read_text(errors="replace")[-3000:] for name in DAEMONS
    )


def wait_for_state(
    environment: dict[str, str], job: str, wanted: set[str], seconds: float
) -> str:
    """The state that a job comes to, of those wanted."""
    deadline = time.monotonic() + seconds
    while True:
        text = ask(environment, "scontrol", "show", "job", job)
        fields = dict(word.partition("=")[::2] for word in text.split())
        state = fields.get("JobState", "")
        if state in wanted:
            return state
        assert time.monotonic() < deadline, text
        time.sleep(0.5)
