"""Who ran what: one entry per session, each naming the one before, and a lock file that pip can use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from recipes_for_tests import RECIPE, plan_of, written

from stackgrow.data.order import Order
from stackgrow.data.store import Manifest, Split
from stackgrow.run_folder import provenance
from stackgrow.run_folder.folder import RunFolder
from stackgrow.run_folder.requirements import requirements


@pytest.fixture
def order(tmp_path: Path) -> Order:
    splits = {name: Split(1000, 1, ()) for name in ("train", "validation")}
    return Order(
        [
            Manifest(
                tmp_path, "uint16", 256, 0, "tokenizer.model", "ab" * 32, splits, {}
            )
        ],
        [1.0],
        64,
        seed=7,
    )


def read(run: Path) -> dict:
    return json.loads((RunFolder(run).provenance_file).read_text(encoding="utf-8"))


def test_sessions_are_appended_and_tell_how_they_ended(
    tmp_path: Path, order: Order
) -> None:
    plan, file = plan_of(tmp_path), str(written(tmp_path, RECIPE))
    with provenance.session(
        RunFolder(tmp_path), plan, file, ["log.interval=5 steps"], order
    ) as first:
        provenance.add(RunFolder(tmp_path), "stage-0-train-2L", start_step=0)
        running = read(tmp_path)["sessions"][0]

    def stop() -> None:
        with provenance.session(RunFolder(tmp_path), plan, file, [], order):
            provenance.add(RunFolder(tmp_path), "stage-0-train-2L", start_step=12)
            raise ValueError("stopped in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        stop()
    record = read(tmp_path)
    one, two = record["sessions"]
    assert "ended" not in running, "nor does it of a session that is killed"
    assert provenance.identity(running) == provenance.identity(one) == first
    assert two["previous"] == provenance.link(one, provenance.CHAIN)
    for name in ("stages", "ended", "started"):
        assert two["previous"] != provenance.link(
            {**one, name: "edited"}, provenance.CHAIN
        )
    assert one["previous"] is None
    assert (one["overrides"], two["overrides"]) == (["log.interval=5 steps"], [])
    assert (one["ended"]["how"], two["ended"]["how"]) == (
        "finished",
        "ValueError: stopped in the middle",
    )
    assert two["stages"] == {"stage-0-train-2L": {"start_step": 12}}
    assert record["texts"][two["texts"]["recipe_file"]] == RECIPE
    assert len(record["texts"]) == 4, "what did not change is written once"
    assert record["texts"][two["texts"]["packages"]] == (
        RunFolder(tmp_path).requirements_file
    ).read_text(encoding="utf-8")
    assert not list(tmp_path.glob("*.tmp"))


def test_every_fact_known_at_the_start_is_part_of_the_identity(
    tmp_path: Path, order: Order
) -> None:
    plan, file = plan_of(tmp_path), str(written(tmp_path, RECIPE))
    with provenance.session(RunFolder(tmp_path), plan, file, [], order) as identity:
        pass
    (entry,) = read(tmp_path)["sessions"]
    for name in entry.keys() - {"stages", "ended"}:
        assert provenance.identity({**entry, name: "edited"}) != identity


def test_no_secret_of_the_environment_is_written_down() -> None:
    matter = {
        "NCCL_DEBUG": "INFO",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "OMP_NUM_THREADS": "1",
        "ATEN_CPU_CAPABILITY": "avx2",
        "SLURM_JOB_ID": "7",
    }
    others = {
        "HF_TOKEN": "x",
        "TORCH_HUB_TOKEN": "x",
        "NCCL_SECRET": "x",
        "AWS_ACCESS_KEY_ID": "x",
        "HOME": "/root",
    }
    assert provenance.environment({**others, **matter}) == matter


def test_the_instructions_that_torch_uses_are_written_down() -> None:
    """Not those that the CPU has: they decide in which order is summed, and a variable may ask for fewer."""
    code = "import json, torch, stackgrow.run_folder.provenance as p; print(json.dumps(p.hardware()))"
    told = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "default"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    asked_for = json.loads(told)
    assert asked_for["cpu_capability"] == "DEFAULT"
    here = provenance.hardware()
    assert here["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert asked_for == {**here, "cpu_capability": "DEFAULT"}


def test_lock_file_states_what_is_installed_in_a_form_that_pip_takes(
    tmp_path: Path,
) -> None:
    lock = requirements()
    assert f"torch=={metadata.version('torch')}" in lock.splitlines()
    (RunFolder(tmp_path).requirements_file).write_text(lock)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--no-deps",
        "--no-index",
        "-r",
        RunFolder(tmp_path).requirements_file.name,
    ]
    done = subprocess.run(
        pip,
        cwd=tmp_path,
        # The machine's own constraints say nothing of the file's form.
        env={**os.environ, "PIP_CONFIG_FILE": os.devnull},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "Would install" not in done.stdout, (
        "every line is satisfied by what is there"
    )
    pinned = [
        line for line in lock.splitlines() if line and not line.startswith(("#", "--"))
    ]
    assert done.stdout.count("Requirement already satisfied") == len(pinned) > 30


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit, in the place of this one."""
    (tmp_path / "stackgrow").mkdir()
    (tmp_path / "pyproject.toml").write_text("", encoding="utf-8")
    (tmp_path / "stackgrow" / "code.py").write_text("x = 1\n", encoding="utf-8")
    (tmp_path / ".gitignore").write_text("__pycache__\n", encoding="utf-8")
    who = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    for command in (
        ["init", "-q"],
        ["add", "."],
        [*who, "commit", "-q", "-m", "first"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)
    return tmp_path


def test_the_code_is_the_commit_and_all_that_differs_from_it(checkout: Path) -> None:
    """Files that are changed, and new ones, which git diff does not show; not those that git ignores."""
    clean = provenance.code_version()
    assert clean.keys() == {"commit"}
    (checkout / "stackgrow" / "__pycache__").mkdir()
    (checkout / "stackgrow" / "__pycache__" / "code.pyc").write_bytes(b"x")
    assert provenance.code_version() == clean
    hashes = []
    for name, text in (
        ("new.py", "y = 1\n"),
        ("new.py", "y = 2\n"),
        ("code.py", "x = 2\n"),
    ):
        (checkout / "stackgrow" / name).write_text(text, encoding="utf-8")
        hashes.append(provenance.code_version()["dirty_sha256"])
    assert len(set(hashes)) == 3


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_the_code_of_a_checkout_of_another_user_is_named(checkout: Path) -> None:
    named = provenance.code_version()
    for path in (checkout, *checkout.rglob("*")):
        os.chown(path, 12345, 12345)
    assert provenance.code_version() == named
    assert len(named["commit"]) == 40
