"""One workplace and the undisturbed runs that every end-to-end test compares with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launch import RECIPE, REPOSITORY, VOCABULARY, Workplace, environment


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "tiny.toml").write_text(RECIPE)
    stdlib = Path(os.__file__).parent
    prepare = [
        sys.executable,
        str(REPOSITORY / "tools" / "prepare_data.py"),
        "--pattern",
        "*.py",
    ]
    inputs = [
        a for p in ("json", "email", "asyncio") for a in ("--input", str(stdlib / p))
    ]
    subprocess.run(
        [*prepare, *inputs, "--train-tokenizer", str(VOCABULARY), "--out", "store", "--validation", "0.1"],
        cwd=folder, env=environment(), check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    return Workplace(folder)


@pytest.fixture(scope="session")
def reference(workplace: Workplace) -> Path:
    """The undisturbed run of one process; its output stands beside it."""
    output = workplace.run("run.folder=reference")
    (workplace.folder / "reference.txt").write_text(output)
    return workplace.folder / "reference"


@pytest.fixture(scope="session")
def reference_fsdp(workplace: Workplace) -> Path:
    """The undisturbed run of two FSDP ranks."""
    workplace.run("run.folder=reference_fsdp", ranks=2)
    return workplace.folder / "reference_fsdp"
