"""Compare runs with the first of them: the iso-loss speed-up in FLOPs and tokens, and the benchmarks.

python tools/compare_runs.py runs/quickstart_scratch runs/quickstart
python tools/compare_runs.py runs/scratch-* runs/grown-* --figure curves.png --figure curves.svg --html report.html
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from stackgrow import seal
from stackgrow.cli.options import parser_of, quiet_at_closed_pipe
from stackgrow.errors import RunError


@quiet_at_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        help="run folders; those that differ in the seed alone are one recipe's",
    )
    parser.add_argument(
        "--loss",
        choices=["train", "validation"],
        default="train",
        help="default: train",
    )
    parser.add_argument(
        "--at",
        type=float,
        nargs="+",
        default=[],
        metavar="LOSS",
        help="default: five that both reach",
    )
    parser.add_argument(
        "--figure",
        type=Path,
        action="append",
        default=[],
        help="picture to write, *.png or *.svg",
    )
    parser.add_argument("--html", type=Path, help="page to write, everything in it")
    parser.add_argument(
        "--json", action="store_true", help="print plain values instead of a table"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="compare runs whose tokenizer, held-out text or sequence length differ",
    )
    arguments = parser.parse_args(argv)
    if any(file.suffix not in (".png", ".svg") for file in arguments.figure):
        parser.error("--figure writes *.png or *.svg")
    try:
        seal.require_writable(arguments.html, *arguments.figure)
        from stackgrow.report import compare

        comparison = compare.compare(
            arguments.runs, arguments.loss, arguments.at, arguments.force
        )
        if arguments.json:
            print(json.dumps(compare.as_dict(comparison), indent=1))
        else:
            print(compare.render(comparison))
        for file in arguments.figure:
            from stackgrow.report.figure import save_figure

            save_figure(comparison, file)
        if arguments.html:
            from stackgrow.report.html import write_report

            write_report(arguments.runs, arguments.html, arguments.force)
    except RunError as error:
        print(f"compare_runs: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
