"""Look at token stores and at what a recipe trains on.

python tools/data.py inspect data/stdlib                               # counts, and what was left out
python tools/data.py inspect recipes/quickstart.toml --position 1000   # the sequence there, and its documents
python tools/data.py verify data/stdlib                                # read every byte of it
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from stackgrow.cli.options import add_set, parser_of, quiet_at_closed_pipe
from stackgrow.data import inspect
from stackgrow.data.store import read_manifest
from stackgrow.plan.resolve import make_plan
from stackgrow.recipe.load import load_recipe
from stackgrow.recipe.shipped import find_recipe


@quiet_at_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    look = verbs.add_parser("inspect", help="what a store holds, or what a recipe trains on")
    look.add_argument(
        "path", help="a token store, a recipe (*.toml), or the name of a shipped recipe", type=find_recipe
    )
    look.add_argument("--position", type=int, help="with a recipe: show the sequence at this position")
    add_set(look)
    verbs.add_parser("verify", help="read every byte of a store").add_argument("path", help="a token store")
    args = parser.parse_args(argv)
    try:
        if args.verb == "verify":
            print(inspect.verify(args.path))
        elif not args.path.endswith(".toml"):
            print(inspect.summary(read_manifest(args.path), "token store"))
        else:
            recipe = make_plan(load_recipe(args.path, args.set), args.path).recipe
            for path, _ in recipe.data.stores:
                print(inspect.summary(read_manifest(path), "token store"))
            if args.position is not None:
                print(inspect.sequence(recipe, args.position))
    except (ValueError, OSError) as error:
        print(f"data: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
