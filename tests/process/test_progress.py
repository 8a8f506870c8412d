import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
from types import SimpleNamespace

import pytest

from stackgrow.process import progress as progress_module
from stackgrow.process.progress import RENEW_LINE, Progress
from stackgrow.text import clock

RECORD = {"step": 50, "tokens": 204_800, "loss": 5.25, "lr": 1e-3, "tps": 12_300.0}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    progress = Progress("stage-0-train-2L", 100, enabled=True, stream=stream)
    progress.start(0)
    progress.validated(0, 7.8)
    progress.update(RECORD)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "stage-0-train-2L  step 0/100  validation loss 7.8000"
    assert lines[1].startswith(
        "stage-0-train-2L  step 50/100 (50%)  tokens 205K  loss 5.2500  val 7.8000  lr 1.00e-03"
    )
    assert "12.3K tok/s  ETA 0:00" in lines[1]


def test_what_a_gpu_does_with_its_time_is_said_where_it_is_worth_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    progress = Progress("stage", 100, enabled=True, stream=stream)
    progress.start(0)
    now[0] += 50 * 2.0  # 2 seconds a step
    progress.update(
        {**RECORD, "mfu": 0.412, "data_wait": 0.5, "lag": 0.2, "slowest_rank": 13}
    )
    progress.update(
        {**RECORD, "mfu": 0.45, "data_wait": 0.05, "lag": 0.01, "slowest_rank": 2}
    )
    slow, good = stream.getvalue().splitlines()
    assert "12.3K tok/s  MFU 41%  waits for data 25%  rank 13 late by 10%  ETA" in slow
    assert "12.3K tok/s  MFU 45%  ETA" in good


def test_one_renewed_line_on_a_terminal() -> None:
    stream = Terminal()
    progress = Progress("stage", 100, enabled=True, stream=stream)
    progress.start(0)
    for _ in range(3):
        progress.update(RECORD)
    progress.close()
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().count("\r") == 3


@pytest.mark.parametrize("columns", [132, 80, 60, 20])
def test_the_line_is_never_wider_than_the_terminal(columns: int) -> None:
    """One that breaks is not renewed: it left a hundred rows behind in 80 columns."""
    reader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(terminal, "w") as stream:
        progress = Progress(
            "stage-10-train-24L", 1_000_000, enabled=True, stream=stream
        )
        progress.start(0)
        progress.validated(0, 7.8)
        progress.update({**RECORD, "step": 123_456, "tokens": 204_800_000_000})
        line = os.read(reader, 4096).decode().removeprefix(RENEW_LINE)
    os.close(reader)
    assert len(line) < columns
    assert line.startswith("stage-10-train-24L")
    assert ("step 123456/1000000 (12%)" in line) == (columns >= 60)
    assert ("loss 5.2500" in line) == (columns >= 60)
    assert ("lr 1.00e-03" in line) == (columns == 132)


def test_training_goes_on_where_nobody_reads_any_more() -> None:
    """As in ``run_recipe ... | head``."""
    program = (
        "from stackgrow.process.progress import Progress\n"
        "progress = Progress('stage', 100, enabled=True)\n"
        f"for _ in range(20_000): progress.update({RECORD})\n"
        "import sys; print('all steps made', file=sys.stderr)\n"
    )
    done = subprocess.run(
        f'{sys.executable} -c "{program}" | head -1',
        shell=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.count("\n") == 1
    assert done.stderr == "all steps made\n"


def test_other_ranks_are_silent() -> None:
    stream = io.StringIO()
    progress = Progress("stage", 100, enabled=False, stream=stream)
    progress.update(RECORD)
    progress.validated(1, 2.0)
    progress.close()
    assert stream.getvalue() == ""


def test_rate_counts_this_sessions_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 20.0])
    monkeypatch.setattr(
        "stackgrow.process.progress.time",
        SimpleNamespace(monotonic=lambda: next(moments)),
    )
    stream = io.StringIO()
    progress = Progress("stage", 100, enabled=True, stream=stream)
    progress.start(40)
    progress.update(RECORD)  # 10 steps in 20 seconds, 50 to go
    assert "ETA 1:40" in stream.getvalue()


def test_seconds_are_told_as_a_clock_does() -> None:
    assert [clock(s) for s in (0, 59.6, 61, 3725)] == [
        "0:00",
        "1:00",
        "1:01",
        "1:02:05",
    ]
