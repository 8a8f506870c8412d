"""Many runs of one recipe: every combination of some values, each a run folder of its own, some side by side.

Nothing is scheduled here: a run that is finished is left alone, one that was stopped goes on, and on a cluster each
run is a task of a Slurm array.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stackgrow.errors import StoppedError
from stackgrow.plan.resolve import make_plan
from stackgrow.recipe.load import Problem, RecipeError, load_recipe
from stackgrow.run_folder.folder import RunFolder

LOOK_SECONDS = 0.5


@dataclass(frozen=True, eq=False)
class Member:
    """One run of a sweep: ``values`` {recipe key: value as typed}."""

    folder: Path
    values: Mapping[str, str]

    @property
    def sets(self) -> list[str]:
        return [f"{key}={value}" for key, value in self.values.items()] + [
            f"run.folder={self.folder}"
        ]

    @property
    def log(self) -> Path:
        """What the run prints; beside its folder, which the run makes itself."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def finished(self) -> bool:
        return RunFolder(self.folder).ledger_file.is_file()


def members(name: str, out: Path, over: Mapping[str, Sequence[str]]) -> list[Member]:
    """Every combination of the values ``over`` {key: values}, in the order given, the last key changing fastest."""
    found = []
    for combination in itertools.product(*over.values()):
        values = dict(zip(over, combination, strict=True))
        parts = [f"{key.rpartition('.')[2]}-{value}" for key, value in values.items()]
        label = re.sub(r"[^A-Za-z0-9._+-]+", "-", "-".join([name, *parts]))
        found.append(Member(out / label, values))
    return found


def check_members(file: str, sets: Sequence[str], wanted: Sequence[Member]) -> None:
    """Plans every run before the first starts.

    Raises:
        RecipeError: what is wrong with any of them, or two that would share a run folder.
    """
    problems: list[Problem] = []
    seen: dict[Path, Member] = {}
    for member in wanted:
        if member.folder in seen:
            problems.append(
                (
                    str(member.folder),
                    "two runs of the sweep would share this folder; name a value once",
                )
            )
        seen[member.folder] = member
        try:
            make_plan(load_recipe(file, [*sets, *member.sets]), file)
        except RecipeError as error:
            for where, what in error.problems:
                problems.append((where, f"{what} (in {member.folder.name})"))
    if problems:
        raise RecipeError(file, problems)


def command(file: str, sets: Sequence[str], member: Member, ranks: int) -> list[str]:
    """One member under torchrun, or for one rank without it."""
    start = [sys.executable]
    if ranks > 1:
        start += [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
        ]
    words = [*start, "-m", "stackgrow.cli.main", "run", file]
    for assignment in [*sets, *member.sets]:
        words += ["--set", assignment]
    return words


def run_members(
    file: str,
    sets: Sequence[str],
    wanted: Sequence[Member],
    *,
    side_by_side: int,
    ranks: int,
    threads: int,
) -> Iterator[tuple[Member, str]]:
    """Runs the members that are not finished, ``side_by_side`` at a time, and tells each member's changes of state:
    "finished before", "started", "finished", or "failed with code N, see LOG".

    SIGTERM and SIGINT are passed on to the runs, which save and end; what is left goes on with the same command.

    Raises:
        StoppedError: a signal asked to stop, after all runs have ended.
    """
    waiting = []
    for member in wanted:
        if member.finished():
            yield member, "finished before"
        else:
            waiting.append(member)
    at_work: dict[Member, subprocess.Popen[bytes]] = {}
    asked = []
    before = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)
    }
    for number in before:
        signal.signal(number, lambda received, _frame: asked.append(received))
    told_to_stop = False
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    try:
        while at_work or (waiting and not asked):
            while waiting and not asked and len(at_work) < side_by_side:
                member = waiting.pop(0)
                member.folder.parent.mkdir(parents=True, exist_ok=True)
                words = command(file, sets, member, ranks)
                with member.log.open("ab") as log:
                    # A session of its own, so that a Ctrl-C reaches it once, from here.
                    process = subprocess.Popen(
                        words,
                        stdout=log,
                        stderr=log,
                        env=environment,
                        start_new_session=True,
                    )
                at_work[member] = process
                yield member, "started"
            if asked and not told_to_stop:
                told_to_stop = True
                for process in at_work.values():
                    process.send_signal(signal.SIGTERM)
            time.sleep(LOOK_SECONDS)
            for member, process in list(at_work.items()):
                code = process.poll()
                if code is None:
                    continue
                del at_work[member]
                if code == 0:
                    yield member, "finished"
                elif told_to_stop:
                    yield member, "stopped"
                else:
                    yield member, f"failed with code {code}, see {member.log}"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in at_work.values():
            process.send_signal(signal.SIGTERM)
    if asked:
        raise StoppedError(
            f"stopped by {signal.Signals(asked[0]).name}; the same command goes on"
        )
