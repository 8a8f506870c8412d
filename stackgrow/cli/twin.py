"""The equal-FLOPs scratch twin of a recipe, written as a recipe: what a growth is compared with.

python tools/twin.py recipes/mine.toml                   writes recipes/mine_scratch.toml
python tools/twin.py recipes/mine.toml --set seed=2 --out twin.toml
python tools/twin.py runs/mine --out twin.toml           of a run, where the loss has decided when to grow
"""

from __future__ import annotations

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
from stackgrow.plan.resolve import make_plan
from stackgrow.plan.stages import Plan
from stackgrow.plan.twin import SUFFIX, scratch_twin, twin_text
from stackgrow.recipe.load import load_recipe
from stackgrow.recipe.shipped import find_recipe
from stackgrow.run_folder.found import plan_of_run


@quiet_at_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument(
        "recipe",
        type=find_recipe,
        help="a TOML file, the name of a shipped recipe, or a run's folder",
    )
    add_set(parser)
    parser.add_argument(
        "--out",
        type=Path,
        help=f'where to write it; default: beside the recipe, with "{SUFFIX}"',
    )
    arguments = parser.parse_args(argv)
    given = Path(arguments.recipe)
    out = arguments.out or given.with_name(f"{given.stem}{SUFFIX}.toml")
    try:
        seal.require_writable(out)
        plan = _plan_of(given, arguments.set)
        twin = scratch_twin(plan, given)
        with out.open("x", encoding="utf-8") as file:
            file.write(twin_text(plan, twin, out))
    except RunError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        what = (
            "is there already; name another file with --out"
            if isinstance(error, FileExistsError)
            else error.strerror
        )
        print(f"{out}: {what}", file=sys.stderr)
        return 2
    step = twin.flops / twin.train_stages[0].steps
    print(
        f"{out}: {twin.tokens:,} tokens in {twin.train_stages[0].steps:,} steps, {twin.flops:.6g} FLOPs; "
        f"{plan.recipe.name} has {plan.flops:.6g}, {(plan.flops - twin.flops) / step:+.2f} of its steps"
    )
    return 0


def _plan_of(given: Path, sets: Sequence[str]) -> Plan:
    if given.is_dir():
        return plan_of_run(given, sets)
    return make_plan(load_recipe(str(given), sets), given)


if __name__ == "__main__":
    sys.exit(main())
