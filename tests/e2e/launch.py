"""Real runs of a tiny recipe: real torchrun processes, gloo ranks, DCP checkpoints, on text of the standard library."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stackgrow import seal
from stackgrow.records import read_records

REPOSITORY = Path(__file__).parents[2]
RUN_RECIPE = str(REPOSITORY / "tools" / "run_recipe.py")
VOCABULARY = 512

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
micro_batch = 4
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

# Few processes for many runs: starting one takes longer than a run does.
RUN_ALL = """
import json, sys, traceback
from stackgrow.run import run
for file, sets in json.load(sys.stdin):
    try:
        run(file, sets)
    except Exception:
        traceback.print_exc()
"""


@dataclass
class Workplace:
    """A folder with a recipe and a token store, in which runs are started as a user would start them."""

    folder: Path

    def command(self, *sets: str, ranks: int = 0, recipe: str = "tiny.toml") -> list[str]:
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
        ]
        arguments = [a for s in sets for a in ("--set", s)]
        return [*(torchrun if ranks else [sys.executable]), RUN_RECIPE, recipe, *arguments]

    def run(self, *sets: str, ranks: int = 0, code: int = 0, recipe: str = "tiny.toml") -> str:
        """Runs to the end (``ranks`` 0: plain python) and returns all output; the exit code must be ``code``."""
        done = subprocess.run(
            self.command(*sets, ranks=ranks, recipe=recipe),
            cwd=self.folder, env=environment(), capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        output = done.stdout + done.stderr
        assert done.returncode == code, output
        return output

    def run_all(self, jobs: list[tuple[str, list[str]]]) -> str:
        """Runs (recipe, sets) one after another in a process of its own, and returns all output; a failed run leaves
        its folder without what the next assertion looks for."""
        done = subprocess.run(
            [sys.executable, "-c", RUN_ALL], input=json.dumps(jobs), cwd=self.folder, env=environment(),
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        return done.stdout + done.stderr

    def kill_when(self, condition: Callable[[], bool], *sets: str, ranks: int = 0) -> None:
        """Starts a run and kills its whole process group with SIGKILL as soon as ``condition`` holds."""
        process = subprocess.Popen(
            self.command(*sets, ranks=ranks), cwd=self.folder, env=environment(), start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while not condition():
            assert process.poll() is None, "the run ended before the condition held"
            assert time.monotonic() < deadline, "the condition never held"
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def environment() -> dict[str, str]:
    """A user's shell: without what a process group in the tests' own process has set."""
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def records(run: Path, name: str = "metrics.jsonl") -> dict[tuple[str, int], dict]:
    """(stage, step) -> record, over all stages of a run; every step stands there once."""
    rows = [r for file in sorted(run.glob(f"stage-*/{name}")) for r in read_records(file)]
    keyed = {(r["stage"], r["step"]): r for r in rows}
    assert len(keyed) == len(rows), "a step was logged twice"
    return keyed


def losses(run: Path, name: str = "metrics.jsonl") -> dict[tuple[str, int], float]:
    return {key: r["loss"] for key, r in records(run, name).items()}


def weights(checkpoint: Path) -> dict[str, str]:
    """Fingerprint of every tensor in a sealed checkpoint."""
    manifest = seal.read_seal(checkpoint)
    assert manifest is not None
    return manifest["tensors"]


def steps_logged(run: Path, stage: str) -> int:
    return len(read_records(run / stage / "metrics.jsonl"))
