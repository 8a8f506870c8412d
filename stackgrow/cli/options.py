"""What the command lines of all verbs have in common."""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from stackgrow.errors import RunError, disk_error
from stackgrow.process.progress import hush, say

# torchrun kills the other ranks when one fails: they wait, so that the reason is told by then.
TOLD_AFTER_SECONDS = 3


CLOSED_PIPE = 141  # 128 + SIGPIPE, as of any command whose output nobody reads any more


def quiet_at_closed_pipe(
    main: Callable[[Sequence[str] | None], int],
) -> Callable[..., int]:
    """A page's ``main`` that ends without a word where its output is closed, as by ``| head``, and with a line where a
    file cannot be read or written."""

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        try:
            code = main(argv)
            sys.stdout.flush()
        except BrokenPipeError:
            hush(sys.stdout)
            return CLOSED_PIPE
        except OSError as error:
            return tell(disk_error(error))
        return code

    return wrapped


def parser_of(page: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the page's docstring, examples included."""
    return argparse.ArgumentParser(
        description=page, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_set(parser: argparse.ArgumentParser) -> None:
    """``--set KEY=VALUE``, as often as wanted."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a recipe key: train.compile=true, growth[0].timing=10B (the first [[growth]])",
    )


def count(text: str) -> int:
    """A command line's number of things, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 1")
    return int(text)


def tell(error: RunError) -> int:
    """One message for the whole job, from the rank that is to tell it, or for each node; returns the exit code."""
    rank = "LOCAL_RANK" if error.teller is None else "RANK"
    if int(os.environ.get(rank, "0")) == (error.teller or 0):
        say(str(error), stream=sys.stderr)
        _tell_torchrun(str(error))
    else:
        time.sleep(TOLD_AFTER_SECONDS)
    return error.exit_code


def _tell_torchrun(message: str) -> None:
    """torchrun ends with a traceback of its own, and at the very end with what it finds in a file of each rank."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        facts = {"py_callstack": message, "timestamp": str(int(time.time()))}
        content = {"message": {"message": message, "extraInfo": facts}}
        Path(file).write_text(json.dumps(content), encoding="utf-8")


def add_trust(parser: argparse.ArgumentParser) -> None:
    about = "run code that the recipe names: operators as module:function, and what task files contain"
    parser.add_argument("--trust", action="store_true", help=about)
