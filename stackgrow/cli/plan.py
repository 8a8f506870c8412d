"""What a recipe costs on a cluster: memory, days, GPU-hours, disk, data, and the saving that can be expected.

python tools/plan_recipe.py recipes/7b_gstack.toml --gpus 256 --gpu h100
python tools/plan_recipe.py recipes/7b_gstack.toml --gpus 64 --gpu a100 --search --plot plan.png
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from stackgrow.cli.options import add_set, parser_of, quiet_at_closed_pipe
from stackgrow.errors import RunError
from stackgrow.plan.cost import GPUS, MFU, Cluster, estimate
from stackgrow.plan.resolve import make_plan
from stackgrow.plan.search import search
from stackgrow.recipe.load import load_recipe
from stackgrow.recipe.shipped import find_recipe
from stackgrow.recipe.values import tokens
from stackgrow.report.cost_table import render_cost, render_cost_json


@quiet_at_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("recipe", type=find_recipe, help="a TOML file, or the name of a shipped recipe")
    add_set(parser)
    parser.add_argument("--gpus", type=int, required=True, help="how many")
    parser.add_argument("--gpu", choices=sorted(GPUS), required=True, help="which")
    parser.add_argument("--mfu", type=float, default=MFU, help=f"model FLOPs utilization, assumed; default {MFU}")
    parser.add_argument("--data-tokens", type=tokens().parse, help='tokens of one epoch, such as "627B"')
    parser.add_argument("--search", action="store_true", help="propose layouts, micro-batches and recomputation")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the plan")
    arguments = parser.parse_args(argv)
    if arguments.gpus < 1 or not 0 < arguments.mfu <= 1:
        parser.error("--gpus must be at least 1, and --mfu above 0 and at most 1")
    try:
        plan = make_plan(load_recipe(arguments.recipe, arguments.set), arguments.recipe)
        cluster = Cluster(arguments.gpus, arguments.gpu, arguments.mfu)
        cost = estimate(plan, cluster, arguments.data_tokens)
        choices = {s.name: search(s, cluster) for s in plan.train_stages} if arguments.search else None
        print((render_cost_json if arguments.json else render_cost)(cost, choices))
        if arguments.plot:
            from stackgrow.report.plan_picture import draw_plan

            draw_plan(plan, arguments.plot)
    except RunError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
