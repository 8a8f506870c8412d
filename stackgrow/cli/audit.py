"""Audit a run: is it what it claims to be, from the recipe to the final weights?

python tools/audit_run.py runs/quickstart
python tools/audit_run.py runs/quickstart --against runs/quickstart-2
torchrun --standalone --nproc-per-node 2 tools/audit_run.py runs/mine --replay stage-2-train-8L:100+50

The verdict is PASSED, FAILED, or PASSED, BUT NOT CHECKED with what was not; then comes what it rests on (SECURITY.md).

--replay trains N steps again from a checkpoint that the run has kept (or from step 0), in a scratch folder, and
compares losses and weights: bit for bit on the ranks, machine and software of the run, else within a stated tolerance;
with --strict, always bit for bit.
Nothing in the run folder is changed, or followed out of it; an operator that its recipe names as module:function is
executed with --trust alone. Exit codes: 0 passed, 65 failed, 73 the run is running, 74 something in it may not be read,
2 a wrong command line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from stackgrow import seal
from stackgrow.audit.case import Case, open_case
from stackgrow.audit.chain import audit_run
from stackgrow.audit.report import Look, audit_page
from stackgrow.audit.same import same_run
from stackgrow.cli.options import (
    add_trust,
    parser_of,
    quiet_at_closed_pipe,
    tell,
)
from stackgrow.errors import DamagedError, RunError
from stackgrow.growth import own
from stackgrow.recipe.load import RecipeError


@quiet_at_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.trust:
        own.trust()
    further: dict[str, Callable[[Case], Look]] = {}
    if arguments.replay:
        from stackgrow.audit.replay import replay

        further["replay"] = lambda case: replay(
            case, arguments.replay, arguments.strict
        )
    if arguments.against:
        further["against"] = lambda case: same_run(case, open_case(arguments.against))
    try:
        seal.require_writable(arguments.html)
        if os.environ.get("RANK", "0") != "0":
            if arguments.replay:  # trains along, and finds nothing
                list(further["replay"](open_case(arguments.run, arguments.data)))
            return 0
        audit = audit_run(
            arguments.run, arguments.data, full=arguments.full, further=further
        )
        if arguments.html:
            seal.write_text(arguments.html, audit_page(audit))
    except RecipeError as error:  # which a run wrote itself
        return tell(DamagedError(error))
    except RunError as error:
        return tell(error)
    print(json.dumps(audit.to_dict(), indent=1) if arguments.json else audit.render())
    return DamagedError.exit_code if audit.findings else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run folder")
    parser.add_argument(
        "--data",
        type=Path,
        action="append",
        default=[],
        help="a token store, where it is not at the recipe's place",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="read every file of the token store, not a few",
    )
    parser.add_argument(
        "--replay",
        metavar="STAGE:STEP+N",
        help="train N steps again from a checkpoint, and compare",
    )
    strict = "with --replay: no tolerance for a machine or software that the run claims, and the optimizer's state too"
    parser.add_argument("--strict", action="store_true", help=strict)
    parser.add_argument(
        "--against",
        type=Path,
        metavar="OTHER",
        help="whether another run folder holds the same run",
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write the verdict as a page, too"
    )
    add_trust(parser)
    parser.add_argument("--json", action="store_true", help="for machines")
    arguments = parser.parse_args(argv)
    if arguments.strict and not arguments.replay:
        parser.error("--strict says how --replay compares: give both")
    for folder in filter(None, (arguments.run, arguments.against, *arguments.data)):
        if not folder.is_dir():
            parser.error(f"{folder} is no folder")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
