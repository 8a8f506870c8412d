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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    told_to_stop = False
    with _asked_to_stop() as asked:
        try:
            while at_work or (waiting and not asked):
                while waiting and not asked and len(at_work) < side_by_side:
                    member = waiting.pop(0)
                    words = command(file, sets, member, ranks)
                    at_work[member] = _start(member, words, environment)
                    yield member, "started"

                if asked and not told_to_stop:
                    told_to_stop = True
                    _pass_on(at_work.values())

                time.sleep(LOOK_SECONDS)
                for member, code in _ended(at_work):
                    del at_work[member]
                    yield member, _end(member, code, told_to_stop)
        finally:
            _pass_on(at_work.values())
    if asked:
        raise StoppedError(
            f"stopped by {signal.Signals(asked[0]).name}; the same command goes on"
        )


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """The signals SIGTERM and SIGINT that have come, in a list that grows; none of them ends this process meanwhile."""
    asked: list[int] = []
    before = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)
    }
    for number in before:
        signal.signal(number, lambda received, _frame: asked.append(received))
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(
    member: Member, words: Sequence[str], environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Starts a member's command, which prints into the member's log."""
    member.folder.parent.mkdir(parents=True, exist_ok=True)
    with member.log.open("ab") as log:
        # A session of its own, so that a Ctrl-C reaches it once, from here.
        return subprocess.Popen(
            words, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def _pass_on(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Asks runs to save and end."""
    for process in processes:
        process.send_signal(signal.SIGTERM)


def _ended(
    at_work: Mapping[Member, subprocess.Popen[bytes]],
) -> list[tuple[Member, int]]:
    """The members whose processes have ended, with their exit codes."""
    ended = []
    for member, process in at_work.items():
        code = process.poll()
        if code is not None:
            ended.append((member, code))
    return ended


def _end(member: Member, code: int, told_to_stop: bool) -> str:
    """How a member has ended, in words."""
    if code == 0:
        return "finished"
    if told_to_stop:
        return "stopped"
    return f"failed with code {code}, see {member.log}"
