"""Benchmarks of a run's checkpoint, by lm-eval, on as many ranks as are started; results into the run's eval/.

python tools/evaluate.py runs/quickstart          the last finished stage; [eval]'s tasks, or the paper's eight
torchrun --standalone --nproc-per-node 8 tools/evaluate.py runs/7b_gstack --tasks paper
python tools/evaluate.py runs/quickstart/stage-1-grow/checkpoint --tasks arc_easy --limit 100
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from stackgrow.cli.options import (
    add_set,
    add_trust,
    count,
    parser_of,
    quiet_at_closed_pipe,
    tell,
)
from stackgrow.errors import RunError
from stackgrow.growth import own


@quiet_at_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument(
        "source", type=Path, help="a run folder, or one of its checkpoints"
    )
    parser.add_argument(
        "--stage", help="of a run: stage to evaluate (default: the last finished one)"
    )
    parser.add_argument(
        "--step",
        type=int,
        help="of a run: checkpoint to evaluate (default: the stage's newest)",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        help="lm-eval's tasks (default: [eval]'s, or the paper's eight)",
    )
    parser.add_argument("--limit", type=count, help="examples of each task, for a try")
    parser.add_argument(
        "--batch", type=count, help="sequences in one forward pass on one rank"
    )
    parser.add_argument(
        "--include", help="folder with task files of your own; what they contain is run"
    )
    add_set(parser)
    add_trust(parser)
    arguments = parser.parse_args(argv)
    if arguments.trust:
        own.trust()
    names = ("tasks", "limit", "batch", "include")
    options = {
        name: value for name in names if (value := getattr(arguments, name)) is not None
    }
    try:
        from stackgrow.evaluate.evaluation import evaluate_run

        evaluate_run(
            arguments.source,
            stage=arguments.stage,
            step=arguments.step,
            sets=arguments.set,
            **options,
        )
    except RunError as error:
        return tell(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
