"""Look at token stores and at what a recipe trains on.

python tools/data.py inspect data/stdlib                               # counts, and what was left out
python tools/data.py inspect recipes/quickstart.toml --position 1000   # the sequence there, and its documents
python tools/data.py verify data/stdlib                                # read every byte of it
"""

from __future__ import annotations

import argparse
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
    look = verbs.add_parser(
        "inspect", help="what a store holds, or what a recipe trains on"
    )
    look.add_argument(
        "path",
        help="a token store, a recipe (*.toml), or the name of a shipped recipe",
        type=find_recipe,
    )
    look.add_argument(
        "--position", type=int, help="with a recipe: show the sequence at this position"
    )
    add_set(look)
    verbs.add_parser("verify", help="read every byte of a store").add_argument(
        "path", help="a token store"
    )
    args = parser.parse_args(argv)
    try:
        text = answer(args)
    except (ValueError, OSError) as error:
        print(f"data: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


def answer(args: argparse.Namespace) -> str:
    if args.verb == "verify":
        return inspect.verify(args.path)
    if not args.path.endswith(".toml"):
        return inspect.summary(read_manifest(args.path), "token store")
    recipe = make_plan(load_recipe(args.path, args.set), args.path).recipe
    texts = [
        inspect.summary(read_manifest(path), "token store")
        for path, _ in recipe.data.stores
    ]
    if args.position is not None:
        texts.append(inspect.sequence(recipe, args.position))
    return "\n".join(texts)


if __name__ == "__main__":
    sys.exit(main())
