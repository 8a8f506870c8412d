"""Many runs of one recipe, one for every combination of values; what is finished is left alone, the rest goes on.

stackgrow sweep recipes/quickstart.toml --over seed=1,2,3 --side-by-side 2
stackgrow sweep recipes/quickstart.toml --over seed=1,2,3 --over growth[0].timing=100K,200K --out runs/timing
stackgrow sweep recipes/mine.toml --over seed=1,2,3 --slurm="--partition=gpu --gpus-per-node=8 --time=4:00:00" --ranks 8

Each run lies in OUT/NAME-key-value-..., and what it prints beside it in *.log; stackgrow runs OUT shows them all.
--slurm submits a job array, --side-by-side tasks of it at a time, and returns.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from stackgrow.cli.options import add_set, count, parser_of, quiet_at_closed_pipe, tell
from stackgrow.errors import RunError
from stackgrow.recipe.load import load_recipe
from stackgrow.recipe.shipped import find_recipe
from stackgrow.run.sweep import Member, check_members, members, run_members


def values_of(text: str) -> tuple[str, list[str]]:
    """``seed=1,2,3`` as the key and its values."""
    key, equals, values = text.partition("=")
    if (
        not equals
        or not key.strip()
        or not all(part.strip() for part in values.split(","))
    ):
        raise argparse.ArgumentTypeError(
            f"{text!r} must be KEY=VALUE,VALUE,..., such as seed=1,2,3"
        )
    return key.strip(), [part.strip() for part in values.split(",")]


@quiet_at_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument(
        "recipe", type=find_recipe, help="a TOML file, or the name of a shipped recipe"
    )
    parser.add_argument(
        "--over",
        type=values_of,
        action="append",
        required=True,
        metavar="KEY=VALUE,VALUE",
    )
    add_set(parser)
    parser.add_argument(
        "--out", type=Path, help="folder of the runs (default: runs/NAME-sweep)"
    )
    parser.add_argument(
        "--side-by-side",
        type=count,
        default=1,
        metavar="K",
        help="runs at a time (default: 1)",
    )
    parser.add_argument(
        "--ranks",
        type=count,
        default=1,
        metavar="N",
        help="ranks of each run (default: 1)",
    )
    parser.add_argument(
        "--threads",
        type=count,
        default=1,
        metavar="N",
        help="threads of each rank (default: 1)",
    )
    parser.add_argument(
        "--slurm",
        metavar="OPTIONS",
        help="submit a job array with these options of sbatch",
    )
    parser.add_argument(
        "--only", type=int, metavar="I", help=argparse.SUPPRESS
    )  # a task of the array
    arguments = parser.parse_args(argv)
    over = dict(arguments.over)
    if len(over) < len(arguments.over):
        parser.error("--over names a key twice; give all its values at once")
    try:
        name = load_recipe(arguments.recipe, arguments.set).name
        wanted = members(name, arguments.out or Path("runs") / f"{name}-sweep", over)
        check_members(arguments.recipe, arguments.set, wanted)
        if arguments.slurm is not None:
            return submit(arguments, wanted)
        if arguments.only is not None:
            wanted = [wanted[arguments.only]]
        return work(arguments, wanted)
    except RunError as error:
        return tell(error)


def work(arguments: argparse.Namespace, wanted: Sequence[Member]) -> int:
    """Runs them here; 1 if any failed."""
    failed = 0
    changes = run_members(
        arguments.recipe,
        arguments.set,
        wanted,
        side_by_side=arguments.side_by_side,
        ranks=arguments.ranks,
        threads=arguments.threads,
    )
    for member, change in changes:
        failed += change.startswith("failed")
        print(f"{member.folder.name}  {change}", flush=True)
    print(
        f"{len(wanted) - failed} of {len(wanted)} runs are finished; stackgrow runs {wanted[0].folder.parent}"
    )
    return 1 if failed else 0


def submit(arguments: argparse.Namespace, wanted: Sequence[Member]) -> int:
    """Hands a job array to Slurm, whose task I runs member I; returns sbatch's exit code."""
    folder = wanted[0].folder.parent
    folder.mkdir(parents=True, exist_ok=True)
    again = [
        sys.executable,
        "-m",
        "stackgrow.cli.main",
        "sweep",
        arguments.recipe,
        "--out",
        str(folder),
    ]
    for key, values in arguments.over:
        again += ["--over", f"{key}={','.join(values)}"]
    for assignment in arguments.set:
        again += ["--set", assignment]
    again += ["--ranks", str(arguments.ranks), "--threads", str(arguments.threads)]
    script = f"exec {shlex.join(again)} --only $SLURM_ARRAY_TASK_ID"
    array = f"--array=0-{len(wanted) - 1}%{arguments.side_by_side}"
    names = ["--job-name=stackgrow-sweep", f"--output={folder}/slurm-%A_%a.log"]
    words = ["sbatch", array, *names, *shlex.split(arguments.slurm), f"--wrap={script}"]
    try:
        done = subprocess.run(words)
    except FileNotFoundError:
        print(
            "sweep: there is no sbatch here; leave out --slurm, or give it on a Slurm machine",
            file=sys.stderr,
        )
        return 2
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
