"""What a recipe costs on a cluster: memory, days, GPU-hours, disk, data, and the saving that can be expected.

python tools/plan_recipe.py recipes/7b_gstack.toml --gpus 256 --gpu h100
python tools/plan_recipe.py recipes/7b_gstack.toml --gpus 64 --gpu a100 --search --plot plan.png
python tools/plan_recipe.py recipes/7b_gstack.toml --gpus 256 --gpu h100 --price 2.5 --bandwidth 40

Exit code 0: it fits; 2: it does not, or with --search nothing does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from stackgrow import seal
from stackgrow.cli.options import (
    add_set,
    parser_of,
    quiet_at_closed_pipe,
)
from stackgrow.errors import RunError
from stackgrow.plan.cost import GPUS, MFU, Cluster, estimate
from stackgrow.plan.reliability import (
    BANDWIDTH,
    GPU_HOURS_PER_FAILURE,
    STARTUP,
    Machine,
)
from stackgrow.plan.resolve import make_plan
from stackgrow.plan.search import search
from stackgrow.recipe.load import load_recipe
from stackgrow.recipe.shipped import find_recipe
from stackgrow.recipe.values import tokens
from stackgrow.report.cost_table import Assumed, render_cost, render_cost_json

NOTHING_FITS = (
    2  # exit code: the recipe as it is, or with --search anything that was looked at
)


@quiet_at_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    _add_options(parser)
    arguments = parser.parse_args(argv)
    _check_numbers(parser, arguments)
    machine = Machine(
        arguments.bandwidth * 1e9, arguments.startup, arguments.gpu_hours_per_failure
    )
    assumed = Assumed(machine, arguments.price, arguments.currency)
    try:
        seal.require_writable(arguments.plot)
        plan = make_plan(load_recipe(arguments.recipe, arguments.set), arguments.recipe)
        cluster = Cluster(arguments.gpus, arguments.gpu, arguments.mfu)
        cost = estimate(plan, cluster, arguments.data_tokens)
        choices = None
        if arguments.search:
            choices = {
                stage.name: search(stage, cluster) for stage in plan.train_stages
            }
        render = render_cost_json if arguments.json else render_cost
        print(render(cost, choices, assumed))
        if arguments.plot:
            from stackgrow.report.plan_picture import draw_plan

            draw_plan(plan, arguments.plot)
    except RunError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if choices is None:
        fits = not cost.problems
    else:
        fits = all(choices.values())
    return 0 if fits else NOTHING_FITS


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", type=find_recipe, help="a TOML file, or the name of a shipped recipe"
    )
    add_set(parser)
    parser.add_argument("--gpus", type=int, required=True, help="how many")
    parser.add_argument("--gpu", choices=sorted(GPUS), required=True, help="which")
    parser.add_argument(
        "--mfu",
        type=float,
        default=MFU,
        help=f"model FLOPs utilization, assumed; default {MFU}",
    )
    parser.add_argument(
        "--price", type=float, metavar="AMOUNT", help="of a GPU-hour, in --currency"
    )
    parser.add_argument(
        "--currency", default="USD", help="what --price is in; default USD"
    )
    parser.add_argument(
        "--bandwidth",
        type=float,
        default=BANDWIDTH / 1e9,
        metavar="GB/S",
        help=f"of all ranks to shared storage, assumed; default {BANDWIDTH / 1e9:g}",
    )
    parser.add_argument(
        "--startup",
        type=float,
        default=STARTUP,
        metavar="SECONDS",
        help=f"from a failure to the next step, without reading the checkpoint, assumed; default {STARTUP:g}",
    )
    parser.add_argument(
        "--gpu-hours-per-failure",
        type=float,
        default=GPU_HOURS_PER_FAILURE,
        metavar="HOURS",
        help=f"assumed; default {GPU_HOURS_PER_FAILURE:,.0f}, Llama 3's",
    )
    parser.add_argument(
        "--data-tokens", type=tokens().parse, help='tokens of one epoch, such as "627B"'
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="propose layouts, micro-batches and recomputation",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the plan")


def _check_numbers(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace
) -> None:
    """Ends the program where a number is out of its range."""
    if arguments.gpus < 1 or not 0 < arguments.mfu <= 1:
        parser.error("--gpus must be at least 1, and --mfu above 0 and at most 1")
    if (
        min(arguments.bandwidth, arguments.gpu_hours_per_failure) <= 0
        or arguments.startup < 0
    ):
        parser.error(
            "--bandwidth and --gpu-hours-per-failure must be above 0, and --startup not below it"
        )


if __name__ == "__main__":
    sys.exit(main())
