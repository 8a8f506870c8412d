"""One run per folder: the lock names its holder, and is done without where the file system has none."""

import errno
import fcntl
import logging
import os
from pathlib import Path

import pytest

from stackgrow.errors import LockedError
from stackgrow.run.claim import run_lock


def test_the_holder_is_named(tmp_path: Path) -> None:
    held = f"is in use by process {os.getpid()} on "
    with run_lock(tmp_path), pytest.raises(LockedError, match=held), run_lock(tmp_path):
        pytest.fail("two hold it")
    with run_lock(tmp_path):
        assert (tmp_path / "run.lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING), run_lock(tmp_path):
        assert "no locks" in caplog.text
