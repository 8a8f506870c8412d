"""Builds every stage of a recipe as one rank of many, traces a step, and compares its bytes with the planner's.

python tools/dry_run.py recipes/7b_gstack.toml --ranks 256
python tools/dry_run.py recipes/7b_gstack.toml --ranks 1024 --set parallel.tensor=8
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence

from stackgrow.cli.options import add_set, parser_of, quiet_at_closed_pipe
from stackgrow.plan.checks import world_problems
from stackgrow.plan.resolve import make_plan
from stackgrow.process.progress import say
from stackgrow.recipe.load import RecipeError, load_recipe
from stackgrow.recipe.shipped import find_recipe
from stackgrow.text import aligned, numbered

HEAD = (
    "stage",
    "parameters",
    "gradients",
    "optimizer",
    "equal",
    "working: traced",
    "planned",
    "ratio",
    "seconds",
)


@quiet_at_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument(
        "recipe", type=find_recipe, help="a TOML file, or the name of a shipped recipe"
    )
    add_set(parser)
    parser.add_argument(
        "--ranks", type=int, required=True, help="how many ranks the run would have"
    )
    arguments = parser.parse_args(argv)
    if arguments.ranks < 1:
        parser.error("--ranks must be at least 1")
    try:
        plan = make_plan(load_recipe(arguments.recipe, arguments.set), arguments.recipe)
        if problems := world_problems(plan, arguments.ranks):
            raise RecipeError(arguments.recipe, problems)
    except RecipeError as error:
        print(error, file=sys.stderr)
        return 2
    from stackgrow.titan.dry_run import compare

    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    rows: list[tuple[str, ...]] = [HEAD]
    equal = True
    count = sum(not stage.learns_maps for stage in plan.train_stages)
    say(
        f"tracing a step of each of {numbered(count, 'stage')}, on one rank of {arguments.ranks}; a 7B takes minutes",
        stream=sys.stderr,
    )
    for compared in compare(plan, arguments.ranks):
        stage, traced, planned = compared.stage, compared.traced, compared.planned
        same = traced.state_equals(planned)
        say(
            f"{stage.name}: traced in {traced.seconds:.0f} s ({len(rows)} of {count})",
            stream=sys.stderr,
        )
        equal = equal and same
        state = [
            f"{size:,}"
            for size in (traced.parameters, traced.gradients, traced.optimizer)
        ]
        working = [f"{size:,}" for size in (traced.working, planned.working)]
        ratio, seconds = (
            f"{planned.working / traced.working:.3f}",
            f"{traced.seconds:.1f}",
        )
        rows.append(
            (stage.name, *state, "yes" if same else "NO", *working, ratio, seconds)
        )
    print("\n".join(aligned(rows)))
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
