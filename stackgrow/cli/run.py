"""Run a recipe, or print its plan.

torchrun --standalone --nproc-per-node 8 tools/run_recipe.py recipes/7b_gstack.toml
python tools/run_recipe.py recipes/quickstart.toml --plan
torchrun --standalone --nproc-per-node 8 tools/run_recipe.py recipes/7b_gstack.toml --check
stackgrow run quickstart --plan                          a shipped recipe, by its name
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from stackgrow.cli.options import (
    add_set,
    add_trust,
    parser_of,
    quiet_at_closed_pipe,
    tell,
)
from stackgrow.errors import LockedError, RunError, StoppedError
from stackgrow.growth import own
from stackgrow.recipe.shipped import find_recipe


@quiet_at_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument(
        "recipe", type=find_recipe, help="a TOML file, or the name of a shipped recipe"
    )
    add_set(parser)
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print the plan, and what it leaves unchecked, and exit",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="check all that the run would check before its first step, on the ranks that this is started on, and exit",
    )
    add_trust(parser)
    parser.add_argument("--json", action="store_true", help="with --plan: as JSON")
    parser.add_argument(
        "--state",
        action="store_true",
        help="print how far the run is; exit code 0: finished, 75: stopped and saved, 73: running, 1: anything else",
    )
    arguments = parser.parse_args(argv)
    if arguments.trust:
        own.trust()
    try:
        if arguments.plan:
            show_plan(arguments)
        elif arguments.check:
            check_all(arguments)
        elif arguments.state:
            return show_state(arguments)
        else:
            from stackgrow.run.engine import run

            run(arguments.recipe, arguments.set)
    except RunError as error:
        return tell(error)
    return 0


def show_plan(arguments: argparse.Namespace) -> None:
    from stackgrow.data.order import read_order
    from stackgrow.data.store import StoreError
    from stackgrow.plan.resolve import make_plan
    from stackgrow.recipe.load import load_recipe
    from stackgrow.report.plan_table import plan_dict, render_plan
    from stackgrow.run.preflight import unchecked
    from stackgrow.text import wrapped

    plan = make_plan(load_recipe(arguments.recipe, arguments.set), arguments.recipe)
    if os.environ.get("RANK", "0") != "0":
        return
    order, missing = None, []
    try:
        order = read_order(plan.recipe.data, plan.recipe.seed)
    except StoreError as error:  # not prepared yet, or wrong: a plan does not need it
        missing = ["", *wrapped(f"data: {error}")]
    if arguments.json:
        print(
            json.dumps(
                {**plan_dict(plan, order), "unchecked": unchecked(plan)}, indent=2
            )
        )
        return
    lines = [
        render_plan(plan, order),
        *missing,
        "",
        "not checked by --plan, but by --check:",
    ]
    for item in unchecked(plan):
        lines.extend(wrapped(f"- {item}"))
    print("\n".join(lines))


def check_all(arguments: argparse.Namespace) -> None:
    """Says that a run would start, or raises what it would raise."""
    from stackgrow.run.claim import check_folder
    from stackgrow.run.preflight import check, held_out_note, unchecked
    from stackgrow.text import numbered

    plan, order = check(arguments.recipe, arguments.set, all_at_once=True)
    if os.environ.get("RANK", "0") != "0":
        return
    longer = check_folder(plan, order, arguments.recipe)
    ranks = numbered(int(os.environ.get("WORLD_SIZE", "1")), "rank")
    print(f"nothing is wrong with {arguments.recipe} on {ranks}; checked beside it:")
    for item in unchecked(plan):
        print(f"- {item}")
    if longer:
        print(longer)
    note = held_out_note(plan.recipe)
    if note:
        print(f"to be noted: {note}")


def show_state(arguments: argparse.Namespace) -> int:
    """The state of the recipe's run folder in a line; returns the exit code of the session that left it so."""
    from stackgrow.plan.resolve import make_plan
    from stackgrow.recipe.load import load_recipe
    from stackgrow.run_folder.state import FINISHED, RUNNING, state_of

    folder = Path(
        make_plan(
            load_recipe(arguments.recipe, arguments.set), arguments.recipe
        ).recipe.folder
    )
    found = state_of(folder)
    where = f", {found.stage} step {found.step} of {found.steps}" if found.stage else ""
    print(f"{folder}  {found.state}{where}  {found.why}".rstrip())
    if found.state == FINISHED:
        return 0
    if found.state == RUNNING:
        return LockedError.exit_code
    return StoppedError.exit_code if found.why.startswith(StoppedError.__name__) else 1


if __name__ == "__main__":
    sys.exit(main())
