"""The workplace of a file of end-to-end tests, and the undisturbed runs that they compare with.

Under pytest-xdist the first worker that needs one of these makes it, and every other takes a copy.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launch import RECIPE, REPOSITORY, VOCABULARY, Workplace, environment


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """The workplace of all workers: what is copied from is made here, and nothing else is done in it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # each worker's is a folder in that of all
    folder /= "shared"
    folder.mkdir(exist_ok=True)
    (folder / "tiny.toml").write_text(RECIPE)
    return Workplace(folder)


@pytest.fixture(scope="module")
def workplace(shared: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Each file's own: which files a worker gets is chance, and two may call a run of theirs by one name."""
    own = Workplace(tmp_path_factory.mktemp("workplace"))
    (own.folder / "tiny.toml").write_text(RECIPE)
    _take_over(shared, own, "store", lambda: _prepare(shared.folder / "store"))
    return own


@pytest.fixture(scope="module")
def reference(shared: Workplace, workplace: Workplace) -> Path:
    """The undisturbed run of one process; its output stands beside it."""

    def make() -> None:
        output = shared.run("run.folder=reference", report=True)
        (shared.folder / "reference.txt").write_text(output)

    run = _take_over(shared, workplace, "reference", make)
    run.with_suffix(".txt").write_bytes((shared.folder / "reference.txt").read_bytes())
    return run


@pytest.fixture(scope="module")
def reference_fsdp(shared: Workplace, workplace: Workplace) -> Path:
    """The undisturbed run of two FSDP ranks."""

    def make() -> None:
        shared.run("run.folder=reference_fsdp", warm_ranks=2)

    return _take_over(shared, workplace, "reference_fsdp", make)


def _take_over(
    shared: Workplace, own: Workplace, name: str, make: Callable[[], object]
) -> Path:
    """Copies folder ``name`` of the shared workplace, which ``make`` makes unless another worker has."""
    made = shared.folder / f"{name}.made"
    with (shared.folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            make()
            made.touch()
    # Files that are links to each other, as those of a growth, are so in the copy.
    subprocess.run(["cp", "-a", shared.folder / name, own.folder], check=True)
    return own.folder / name


def _prepare(store: Path) -> None:
    """The token store of some packages of the standard library."""
    command = [
        sys.executable,
        str(REPOSITORY / "tools" / "prepare_data.py"),
        "--pattern",
        "*.py",
    ]
    for package in ("json", "email", "asyncio"):
        command += ["--input", str(Path(os.__file__).parent / package)]
    subprocess.run(
        [*command, "--train-tokenizer", str(VOCABULARY), "--out", store.name, "--validation", "0.1"],
        cwd=store.parent, env=environment(), check=True, capture_output=True, timeout=120,
    )  # fmt: skip
