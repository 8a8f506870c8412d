"""What the command lines of all verbs have in common."""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable, Sequence

from stackgrow.errors import RunError
from stackgrow.process.progress import hush

# torchrun kills the other ranks when one fails: they wait, so that the reason is told by then.
TOLD_AFTER_SECONDS = 3


CLOSED_PIPE = 141  # 128 + SIGPIPE, as of any command whose output nobody reads any more


def quiet_at_closed_pipe(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """A page's ``main`` that ends without a word where its output is closed, as by ``| head``."""

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        try:
            code = main(argv)
            sys.stdout.flush()
        except BrokenPipeError:
            hush(sys.stdout)
            return CLOSED_PIPE
        return code

    return wrapped


def parser_of(page: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the page's docstring, examples included."""
    return argparse.ArgumentParser(description=page, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_set(parser: argparse.ArgumentParser) -> None:
    """``--set KEY=VALUE``, as often as wanted."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a recipe key: train.compile=true, growth[0].timing=10B (the first [[growth]])",
    )


def tell(error: RunError) -> int:
    """One message for the whole job, from the rank that is to tell it, or for each node; returns the exit code."""
    rank = "LOCAL_RANK" if error.teller is None else "RANK"
    if int(os.environ.get(rank, "0")) == (error.teller or 0):
        print(error, file=sys.stderr, flush=True)
    else:
        time.sleep(TOLD_AFTER_SECONDS)
    return error.exit_code


def add_trust(parser: argparse.ArgumentParser) -> None:
    about = "run code that the recipe names: operators as module:function, and what task files contain"
    parser.add_argument("--trust", action="store_true", help=about)
