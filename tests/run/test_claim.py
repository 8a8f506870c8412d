"""One run per folder: the lock names its holder, and is done without where the file system has none."""

import errno
import fcntl
import logging
import os
from pathlib import Path

import pytest

from stackgrow.errors import LockedError
from stackgrow.run.claim import run_lock
from stackgrow.run_folder.folder import RunFolder


def test_the_holder_of_the_lock_is_named(tmp_path: Path) -> None:
    run, holder = RunFolder(tmp_path), f"process {os.getpid()} on "
    with (
        run_lock(run),
        pytest.raises(LockedError, match=f"is in use by {holder}"),
        run_lock(run),
    ):
        pytest.fail("two hold it")
    with run_lock(run):
        assert run.lock_file.read_text(encoding="utf-8").startswith(holder)


def test_a_file_system_without_locks_is_told_and_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING), run_lock(RunFolder(tmp_path)):
        assert "no locks" in caplog.text
