"""Real runs of a tiny recipe: real torchrun processes, gloo ranks, DCP checkpoints, on text of the standard library."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from warm import REPOSITORY, WITHOUT_MATPLOTLIB, Warm

from stackgrow import seal
from stackgrow.audit.chain import audit_run
from stackgrow.run_folder.folder import METRICS, RunFolder, StageFolder
from stackgrow.run_folder.lines import read_records

FAULTY = Path(__file__).with_name("faulty.py")
RUN_RECIPE = str(REPOSITORY / "tools" / "run_recipe.py")
VOCABULARY = 512
SHELL = dict(os.environ)  # before any test has run
PROCESS_GROUP = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
BASE, GROW, TARGET = "stage-0-train-2L", "stage-1-grow", "stage-2-train-4L"

# 20 base steps, growth, 20 target steps; a checkpoint every 4 steps, so that kills fall between checkpoints.
RECIPE = """
name = "tiny"
seed = 3407
[budget]
tokens = "40Ki"
[data]
path = "store"
seq_len = 64
[model]
family = "llama2"
dim = 64
n_layers = 4
n_heads = 4
n_kv_heads = 2
ffn_dim = 176
vocab_size = 512
[base]
n_layers = 2
[[growth]]
operator = "stack"
timing = "20Ki"
[train]
global_batch_tokens = "1Ki"
micro_batch = 8
learning_rate = 3e-3
warmup = "3 steps"
horizon = "20 steps"
precision = "fp32"
[validation]
interval = "5 steps"
sequences = 11
[checkpoint]
interval = "4 steps"
[log]
interval = "1 steps"
"""


@dataclass
class Workplace:
    """A folder with a recipe and a token store, in which runs are started as a user would start them."""

    folder: Path

    def command(self, *sets: str, ranks: int, recipe: str = "tiny.toml") -> list[str]:
        """The command under torchrun."""
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
        ]
        return [*torchrun, RUN_RECIPE, *self.arguments(*sets, recipe=recipe)]

    @staticmethod
    def arguments(*sets: str, recipe: str = "tiny.toml") -> list[str]:
        return [recipe, *(a for s in sets for a in ("--set", s))]

    def run(
        self,
        *sets: str,
        ranks: int = 0,
        warm_ranks: int = 0,
        code: int = 0,
        recipe: str = "tiny.toml",
        report: bool = False,
    ) -> str:
        """Runs to the end and returns all output; the exit code must be ``code``. In one process, under torchrun in
        ``ranks``, or in ``warm_ranks`` started side by side (see warm.py), which draw a ``report`` where one is wanted:
        its figures take a fifth of the time of a short run."""
        if ranks:
            done = subprocess.run(
                self.command(*sets, ranks=ranks, recipe=recipe),
                cwd=self.folder, env=environment(), capture_output=True, text=True, timeout=300,
            )  # fmt: skip
            returned, output = done.returncode, done.stdout + done.stderr
        else:
            returned, output = self.run_warm(
                *sets, ranks=warm_ranks, recipe=recipe, report=report
            )
        assert returned == code, output
        return output

    def run_all(self, jobs: list[tuple[str, list[str]]]) -> str:
        """Runs (recipe, sets) one after another and returns all output; a failed run leaves its folder without what
        the next assertion looks for."""
        return "".join(self.run_warm(*sets, recipe=file)[1] for file, sets in jobs)

    def run_warm(
        self,
        *sets: str,
        ranks: int = 0,
        recipe: str = "tiny.toml",
        report: bool = False,
    ) -> tuple[int, str]:
        """Exit code and output of a run in one process or several (see warm.py)."""
        process = Warm(
            Path(RUN_RECIPE),
            self.arguments(*sets, recipe=recipe),
            self.folder,
            environment() if report else {**environment(), WITHOUT_MATPLOTLIB: "1"},
            ranks,
        )
        return process.wait(300), process.output()

    def tool(self, name: str, *arguments: object, ranks: int = 0) -> tuple[int, str]:
        """Exit code and output of a script of tools/, in one process or several (see warm.py)."""
        return run_tool(name, *arguments, cwd=self.folder, ranks=ranks)

    def kill_at(self, point: str, *sets: str, warm_ranks: int = 0) -> None:
        """A run whose every rank kills itself, with SIGKILL, at a point of faulty.py, such as "train.step 7": before
        the seventh step of this session."""
        env = {**environment(), "FAULT": f"kill {point}", "FAULT_RANK": "all"}
        process = Warm(FAULTY, self.arguments(*sets), self.folder, env, warm_ranks)
        process.wait(300)
        assert -signal.SIGKILL in [p.exitcode for p in process.processes], (
            process.output()
        )

    def kill_when(self, condition: Callable[[], bool], *sets: str, ranks: int) -> None:
        """Starts a run under torchrun and kills torchrun, and so its workers, as soon as ``condition`` holds."""
        process = subprocess.Popen(
            self.command(*sets, ranks=ranks), cwd=self.folder, env=environment(), start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline, ended = time.monotonic() + 300, False
        try:
            while not condition() and not ended:
                assert time.monotonic() < deadline, "the condition never held"
                time.sleep(0.005)
                ended = process.poll() is not None
            assert process.poll() is None, "it was too late to kill it"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_tool(
    name: str, *arguments: object, cwd: Path, ranks: int = 0, timeout: float = 300
) -> tuple[int, str]:
    """Exit code and output of a script of tools/, in one process or in ``ranks`` (see warm.py)."""
    process = Warm(
        REPOSITORY / "tools" / f"{name}.py",
        list(map(str, arguments)),
        cwd,
        environment(),
        ranks,
    )
    return process.wait(timeout), process.output()


def environment() -> dict[str, str]:
    """A user's shell: without what process groups in the tests' own process have set, RANK as well as what torchtitan
    sets, which a run would state and an audit compare."""
    return {**SHELL, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def stage_of(run: Path, name: str) -> StageFolder:
    return RunFolder(run).stage(name)


def records(run: Path, name: str = METRICS) -> dict[tuple[str, int], dict]:
    """(stage, step) -> record, over all stages of a run; every step stands there once."""
    keyed: dict[tuple[str, int], dict] = {}
    for stage in RunFolder(run).stages():
        for record in read_records(stage.record_file(name)):
            key = record["stage"], record["step"]
            assert key not in keyed, "a step was logged twice"
            keyed[key] = record
    return keyed


def losses(run: Path, name: str = METRICS) -> dict[tuple[str, int], float]:
    return {key: r["loss"] for key, r in records(run, name).items()}


def weights(checkpoint: Path) -> dict[str, str]:
    """Fingerprint of every tensor in a sealed checkpoint."""
    manifest = seal.read_seal(checkpoint)
    assert manifest is not None
    return manifest["tensors"]


def assert_audited(run: Path) -> None:
    """An audit finds nothing."""
    found = audit_run(run)
    assert not found.findings, found.render()


def steps_logged(run: Path, stage: str) -> int:
    return len(read_records(RunFolder(run).stage(stage).metrics_file))
