"""Run a recipe, or print its plan.

torchrun --standalone --nproc-per-node 8 tools/run_recipe.py recipes/7b_gstack.toml
python tools/run_recipe.py recipes/quickstart.toml --plan
"""

import argparse
import os
import sys
import time

from stackgrow.errors import RunError

# torchrun kills the other ranks when one fails: they wait, so that the reason is told by then.
TOLD_AFTER_SECONDS = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="the TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key")
    parser.add_argument("--plan", action="store_true", help="print the plan and exit")
    parser.add_argument("--json", action="store_true", help="with --plan: as JSON")
    arguments = parser.parse_args()
    try:
        if arguments.plan:
            show_plan(arguments)
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
    from stackgrow.report.plan_table import render_plan, render_plan_json

    plan = make_plan(load_recipe(arguments.recipe, arguments.set), arguments.recipe)
    if os.environ.get("RANK", "0") == "0":
        try:
            order = read_order(plan.recipe.data, plan.recipe.seed)
        except StoreError:  # not prepared yet, or wrong; running says so
            order = None
        print((render_plan_json if arguments.json else render_plan)(plan, order))


def tell(error: RunError) -> int:
    """One message for the whole job, from the rank that is to tell it, or for each node; returns the exit code."""
    rank = "LOCAL_RANK" if error.teller is None else "RANK"
    if int(os.environ.get(rank, "0")) == (error.teller or 0):
        print(error, file=sys.stderr, flush=True)
    else:
        time.sleep(TOLD_AFTER_SECONDS)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
