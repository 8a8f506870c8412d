"""report.html of a run, or of several beside the first: one file, everything in it.

python tools/report.py runs/quickstart                                  writes runs/quickstart/report.html
python tools/report.py runs/quickstart_scratch runs/quickstart --out compared.html
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from stackgrow import seal
from stackgrow.cli.options import parser_of, quiet_at_closed_pipe
from stackgrow.errors import RunError
from stackgrow.run_folder.folder import RunFolder


@quiet_at_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument(
        "--out",
        type=Path,
        help="file to write (default: report.html in the first run's folder)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="compare runs whose tokenizer, held-out text or sequence length differ",
    )
    arguments = parser.parse_args(argv)
    target = arguments.out or RunFolder(arguments.runs[0]).report_file
    try:
        seal.require_writable(target)
        from stackgrow.report.html import write_report

        # The page shows a provenance as far as it goes; who asks for the page is told that it is damaged.
        for run in arguments.runs:
            RunFolder(run).provenance()
        write_report(arguments.runs, target, arguments.force)
    except RunError as error:
        print(f"report: {error}", file=sys.stderr)
        return error.exit_code
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
