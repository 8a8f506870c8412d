"""A path that another machine has made is waited for, and missed in the end."""

import threading
import time
from pathlib import Path

import pytest

from stackgrow.errors import DiskError
from stackgrow.process import ranks


def test_what_comes_late_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    late = tmp_path / "late"
    threading.Timer(0.3, late.touch).start()
    ranks.wait_for(tmp_path, late)
    assert late.exists()


def test_rank_0_need_not_wait_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(ranks, "VISIBLE_SECONDS", 0.2)
    ranks.wait_for(tmp_path / "never")
    assert slept == []


def test_what_never_comes_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "VISIBLE_SECONDS", 0.2)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(
        DiskError,
        match=r"never: written by rank 0, .* to rank 3 on .* a file system that all nodes",
    ):
        ranks.wait_for(tmp_path, tmp_path / "never")
