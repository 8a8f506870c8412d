"""Kills complete runs at random moments, again and again, until each has finished as if nothing had happened.

python tests/e2e/torture.py --kills 200 --seed 1

Runs of a tiny recipe, growth included, on one rank and on two. Half of the kills come at a random time, half at a
random moment shortly after a phase has begun, so that short phases are met too. Some kill one rank of two, some kill
torchrun itself; all are SIGKILL. Weights and losses of every finished run must equal the undisturbed run's, bit for bit.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from faulty import PHASES
from launch import (
    FAULTY,
    RECIPE,
    REPOSITORY,
    TARGET,
    VOCABULARY,
    environment,
    losses,
    stage_of,
    weights,
)
from warm import Warm

from stackgrow.run_folder.folder import METRICS, VALIDATION, RunFolder

LAST_STEP = 12
SHORTER = (
    "budget.tokens=24Ki",
    "growth[0].timing=12Ki",
    "checkpoint.interval=3 steps",
    "log.tensorboard=false",
)
TARGETS = ["start", "base train", "target train", *PHASES]
TORCHRUN = 0.05  # the share of attempts that start torchrun for real
LONGEST = 12  # kills of one run, then it is let go to its end


@dataclass
class Torture:
    place: Path
    rng: random.Random
    kills: Counter[str] = field(default_factory=Counter)  # by phase
    how: Counter[str] = field(default_factory=Counter)
    runs: int = 0

    def start(self, run: Path, ranks: int) -> Warm:
        (self.place / "phase").write_bytes(b"start".ljust(16))
        env = {**environment(), "PHASE_FILE": str(self.place / "phase")}
        return Warm(
            FAULTY, self.arguments(run), self.place, env, ranks if ranks > 1 else 0
        )

    def arguments(self, run: Path) -> list[str]:
        return [
            "tiny.toml",
            *(a for s in (*SHORTER, f"run.folder={run}") for a in ("--set", s)),
        ]

    def phase(self) -> str:
        return (self.place / "phase").read_bytes()[:16].decode().strip()

    def wait_for_moment(self, ended: Callable[[], bool], seconds: float) -> None:
        """Returns at a random moment of a run that takes ``seconds`` if nothing of it is done yet, or when it has ended."""
        target = self.rng.choice([*TARGETS, *[""] * len(TARGETS)])
        delay = (
            self.rng.uniform(0, 0.04) if target else self.rng.uniform(0, 0.6 * seconds)
        )
        while target and self.phase() != target and not ended():
            time.sleep(0.001)
        until = time.monotonic() + delay
        while time.monotonic() < until and not ended():
            time.sleep(0.001)

    def attempt(self, run: Path, ranks: int, seconds: float) -> bool:
        """Starts ``run`` and kills it; whether it came to its end before."""
        if self.rng.random() < TORCHRUN:
            return self.attempt_torchrun(run, ranks, seconds)
        process = self.start(run, ranks)
        self.wait_for_moment(lambda: process.poll() is not None, seconds)
        if (code := process.poll()) is not None:
            return self.ended(code, process.output())
        one = ranks > 1 and self.rng.random() < 0.3
        if one:
            self.rng.choice(process.processes).kill()
        else:
            process.kill()
        self.count("one rank of two" if one else "all ranks")
        deadline = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()  # as torchrun does; a rank that has not yet met the other waits for it for minutes
        return False

    def attempt_torchrun(self, run: Path, ranks: int, seconds: float) -> bool:
        """The same with torchrun started for real and killed itself: its workers must die with it."""
        (self.place / "phase").write_bytes(b"start".ljust(16))
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
        ]
        with (self.place / "torchrun.log").open("w+") as log:
            process = subprocess.Popen(
                [*torchrun, str(FAULTY), *self.arguments(run)], cwd=self.place, stdout=log, stderr=log,
                env={**environment(), "PHASE_FILE": str(self.place / "phase")},
            )  # fmt: skip
            time.sleep(self.rng.uniform(0, 8))
            self.wait_for_moment(lambda: process.poll() is not None, seconds)
            if (code := process.poll()) is not None:
                log.seek(0)
                return self.ended(code, log.read())
            process.send_signal(signal.SIGKILL)
            process.wait()
        self.count("torchrun")
        self.wait_for_lock(run)
        return False

    def wait_for_lock(self, run: Path) -> None:
        """The lock is free as soon as no worker is left."""
        deadline = time.monotonic() + 60
        while (RunFolder(run).lock_file).exists():
            with (RunFolder(run).lock_file).open() as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except BlockingIOError:
                    assert time.monotonic() < deadline, "a worker outlived torchrun"
            time.sleep(0.05)

    def ended(self, code: int, output: str) -> bool:
        assert code == 0, f"exit code {code}:\n{output}"
        return True

    def count(self, how: str) -> None:
        self.kills[self.phase()] += 1
        self.how[how] += 1

    def torture(self, kills: int) -> None:
        references, seconds = {}, {}
        for ranks in (1, 2):
            references[ranks], started = (
                self.place / f"reference-{ranks}",
                time.monotonic(),
            )
            process = self.start(references[ranks], ranks)
            self.ended(process.wait(300), process.output())
            seconds[ranks] = time.monotonic() - started
        while self.kills.total() < kills:
            ranks, run = 1 + self.runs % 2, self.place / f"run-{self.runs}"
            before = self.kills.total()
            finished = False
            while not finished and self.kills.total() < min(before + LONGEST, kills):
                finished = self.attempt(run, ranks, seconds[ranks])
            if not finished:
                process = self.start(run, ranks)
                self.ended(process.wait(300), process.output())
            check(run, references[ranks])
            shutil.rmtree(run)
            self.runs += 1
            print(
                f"{self.kills.total():4} kills, {self.runs} runs finished and equal; {table(self.kills)}",
                flush=True,
            )


def table(counter: Counter[str]) -> str:
    return "  ".join(f"{name}: {n}" for name, n in counter.most_common())


def check(run: Path, reference: Path) -> None:
    last, due = (
        stage_of(folder, TARGET).checkpoint(LAST_STEP) for folder in (run, reference)
    )
    assert weights(last) == weights(due), f"{run}: weights differ"
    for name in (METRICS, VALIDATION):
        assert losses(run, name) == losses(reference, name), f"{run}: {name} differs"


def prepare(place: Path) -> None:
    (place / "tiny.toml").write_text(RECIPE)
    stdlib = Path(os.__file__).parent
    command = [
        sys.executable,
        str(REPOSITORY / "tools" / "prepare_data.py"),
        "--pattern",
        "*.py",
    ]
    command += [a for p in ("json", "email") for a in ("--input", str(stdlib / p))]
    command += [
        "--train-tokenizer",
        str(VOCABULARY),
        "--out",
        "store",
        "--validation",
        "0.1",
    ]
    subprocess.run(
        command, cwd=place, env=environment(), check=True, capture_output=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument(
        "--seed",
        type=int,
        default=1,
        help="of the moments; what they meet is up to the machine",
    )
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        prepare(Path(folder))
        torture = Torture(Path(folder), random.Random(arguments.seed))
        torture.torture(arguments.kills)
    minutes = (time.monotonic() - started) / 60
    print(
        f"{torture.kills.total()} kills in {torture.runs} runs, seed {arguments.seed}, {minutes:.1f} minutes"
    )
    print(table(torture.kills), table(torture.how), sep="\n")
    print(
        "every run ended with the weights and losses of the undisturbed one, bit for bit"
    )


if __name__ == "__main__":
    main()
