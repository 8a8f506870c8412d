"""The ``stackgrow`` command: ``stackgrow VERB ...``, each verb a page of this room and a script of tools/.

stackgrow run quickstart --plan
stackgrow audit runs/quickstart
torchrun --standalone --nproc-per-node 8 -m stackgrow.cli.main run recipes/7b_gstack.toml
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version

from stackgrow.cli.options import parser_of


@dataclass(frozen=True)
class Verb:
    """``page``: the module of this room; ``first``: what the verb puts in front of the arguments it is given."""

    name: str
    page: str
    help: str
    first: tuple[str, ...] = ()


VERBS = (
    Verb("run", "run", "run a recipe, or print its plan"),
    Verb("plan", "plan", "what a recipe costs on a cluster"),
    Verb("twin", "twin", "the equal-FLOPs scratch twin of a recipe, as a recipe"),
    Verb("sweep", "sweep", "many runs of one recipe"),
    Verb("runs", "runs", "the runs in a folder: how far, how large, what can go"),
    Verb("dry-run", "dry_run", "build every stage as one rank of many, without GPUs"),
    Verb("prepare", "prepare", "text -> a token store"),
    Verb(
        "inspect",
        "data",
        "what a token store holds, or what a recipe trains on",
        ("inspect",),
    ),
    Verb("verify", "data", "read every byte of a token store", ("verify",)),
    Verb("grow", "grow", "grow a checkpoint without a recipe"),
    Verb("export", "export", "a checkpoint -> a folder that transformers loads"),
    Verb("evaluate", "evaluate", "benchmarks of a checkpoint"),
    Verb("compare", "compare", "compare runs with the first of them"),
    Verb("report", "report", "report.html of a run, or of several"),
    Verb("audit", "audit", "is a run what it claims to be"),
    Verb("fit", "fit", "growth timing and scaling laws from a sweep"),
)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = parser_of(__doc__)
    parser.prog = "stackgrow"
    parser.add_argument("--version", action="version", version=version("stackgrow"))
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        verbs.add_parser(verb.name, help=verb.help, add_help=False)
    name = parser.parse_args(words[:1]).verb
    verb = next(verb for verb in VERBS if verb.name == name)
    # Each page reads its own arguments, and names itself in its messages as the user has called it.
    sys.argv[0] = f"stackgrow {verb.name}"
    page = import_module(f"stackgrow.cli.{verb.page}")
    code: int = page.main([*verb.first, *words[1:]])
    return code


if __name__ == "__main__":
    sys.exit(main())
