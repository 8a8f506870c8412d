"""One request stops a run at the next good place, also while its main thread is in C; a second one ends it."""

import fcntl
import os
import signal
import subprocess
import sys
import termios
import textwrap
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def start(program: str) -> subprocess.Popen:
    text = (
        "import os, signal, time\nfrom stackgrow.process import signals\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # under nohup it is ignored
        + textwrap.dedent(program)
    )
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", text],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def rest(process: subprocess.Popen) -> str:
    """What it prints after ready; communicate() would miss what readline() has read ahead."""
    assert process.stdout is not None
    return process.stdout.read()


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP]
)
def test_one_request_is_noted_and_interrupts_nothing(number: signal.Signals) -> None:
    process = start(
        f"""
        signals.watch()
        print('ready')
        os.kill(os.getpid(), {int(number)})
        os.kill(os.getpid(), {int(number)})  # passed on twice, as torchrun and Slurm do
        time.sleep(0.5)  # for the listener
        print(signals.asked())
        """
    )
    assert rest(process) == f"{number.name}\n"
    assert process.wait(timeout=20) == 0


def test_a_second_request_ends_a_process_that_sits_in_c() -> None:
    """As in a collective: Python's own handlers would wait for the main thread."""
    process = start(
        """
        signals.watch()
        signals.started()
        signals.SAME_REQUEST_SECONDS = 0.1
        signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)  # the listener's thread takes them
        reading, _ = os.pipe()
        print('ready')
        os.read(reading, 1)
        """
    )
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    deadline = time.monotonic() + 20
    while (
        process.poll() is None and time.monotonic() < deadline
    ):  # on a busy machine it may see two as one
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert process.wait(timeout=1) == 128 + signal.SIGTERM


def test_who_waits_for_ranks_that_never_come_just_ends() -> None:
    """torchrun asks the others to stop when a rank has failed at the start; they may sit in C, waiting for it."""
    process = start(
        """
        signals.watch()
        signals.START_SECONDS = 0.3
        reading, _ = os.pipe()
        print('ready')
        os.read(reading, 1)
        """
    )
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75


def test_a_forked_helper_does_not_report_to_its_parent() -> None:
    process = start(
        """
        signals.watch()
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.write(writing, b'.')
            time.sleep(20)
            os._exit(0)
        os.read(reading, 1)
        os.kill(child, signal.SIGUSR1)  # ignored
        time.sleep(0.1)
        os.kill(child, signal.SIGTERM)
        print('ready')
        print(os.waitpid(child, 0)[1], signals.asked())
        """
    )
    assert rest(process) == f"{int(signal.SIGTERM)} None\n"


def test_a_closed_terminal_asks_to_stop_and_what_is_printed_then_is_no_error(
    tmp_path: Path,
) -> None:
    """The kernel sends SIGHUP, and from then on writing to the terminal fails."""
    program = f"""
        import sys
        from stackgrow.process.progress import say
        signals.watch()
        say('ready')
        while not signals.asked():
            time.sleep(0.01)
        say('saving')
        say('saved', stream=sys.stderr)
        open({str(tmp_path / "end")!r}, 'w').write(signals.asked())
        """
    text = (
        "import os, signal, time\nfrom stackgrow.process import signals\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # under nohup it is ignored
        + textwrap.dedent(program)
    )
    terminal, inner = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", text], cwd=REPOSITORY, stdin=inner, stdout=inner, stderr=inner,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(inner)
    assert os.read(terminal, 100).startswith(b"ready")
    os.close(terminal)
    assert process.wait(timeout=20) == 0
    assert (tmp_path / "end").read_text(encoding="utf-8") == "SIGHUP"


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    """As under nohup."""
    process = start(
        """
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signals.watch()
        print('ready')
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.3)
        print(signals.asked())
        """
    )
    assert rest(process) == "None\n"
    assert process.wait(timeout=20) == 0


def test_a_caller_that_lives_on_has_its_own_signals_again() -> None:
    """As a notebook after stackgrow.run_recipe: twice, a request in the first before it had started."""
    process = start(
        """
        import threading
        signals.START_SECONDS = 1
        mine = lambda *_: print('mine')
        signal.signal(signal.SIGUSR1, mine)
        before = [signal.getsignal(number) for number in signals.SIGNALS]
        signals.watch()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)  # for the listener
        print('ready')
        print(signals.asked())
        signals.unwatch()
        print(signals.asked(), before == [signal.getsignal(number) for number in signals.SIGNALS])
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(1.5)  # the listener has ended; nothing ends the process that had not started
        print(threading.active_count())
        signals.watch()
        os.kill(os.getpid(), signal.SIGINT)
        print(signals.asked())
        signals.unwatch()
        """
    )
    assert rest(process) == "SIGTERM\nNone True\nmine\n1\nSIGINT\n"
    assert process.wait(timeout=20) == 0
