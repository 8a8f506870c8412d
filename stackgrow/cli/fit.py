"""Growth timing from a sweep: IsoFLOP valleys, the guideline d(N, C) and scaling laws, as in the paper's section 4.2.

python tools/fit_guidelines.py runs/410m_timing_* runs/1.1b_timing_* runs/3b_timing_* --out fit.json --plot fit.png
python tools/fit_guidelines.py sweep.csv                   columns parameters, timing, flops, loss
python tools/fit_guidelines.py runs/1.1b_factor_* --variable factor
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from stackgrow.cli.options import parser_of
from stackgrow.errors import RunError, disk_error
from stackgrow.report.guideline_table import draw_fits, render_fits, render_toml
from stackgrow.report.isoflop import Fit, fit_law, fit_timing, read_run, read_table, valleys


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("sources", nargs="+", type=Path, metavar="RUN", help="run folders, or CSV files of curves")
    parser.add_argument("--variable", choices=["timing", "factor"], default="timing", help="what the sweep varies")
    parser.add_argument("--points", type=int, default=6, help="IsoFLOP curves per size")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write all numbers")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the curves, the fit and the laws")
    arguments = parser.parse_args(argv)
    try:
        runs = []
        for source in arguments.sources:
            new = [read_run(source, arguments.variable)] if source.is_dir() else read_table(source, arguments.variable)
            runs += new
        found = valleys(runs, arguments.points)
        groups = {"scratch": [r for r in runs if r.at is None], "grown": [r for r in runs if r.at]}
        laws = {name: law for name, group in groups.items() if (law := fit_law(group))}
        timing: Fit | str | None = None
        if arguments.variable == "timing":
            try:
                timing = fit_timing(found)
            except RunError as error:
                timing = str(error)
        print(render_fits(found, timing, laws))
        fit = timing if isinstance(timing, Fit) else None
        if fit:
            source = f"{fit.points} valleys of {len(groups['grown'])} runs by tools/fit_guidelines.py"
            print("\n" + render_toml(fit, found, source))
        if arguments.out:
            plain = {
                "timing": dataclasses.asdict(fit) if fit else None,
                "problem": None if fit else timing,
                "laws": {name: dataclasses.asdict(law) for name, law in laws.items()},
                "valleys": [dataclasses.asdict(v) for v in found],
            }
            arguments.out.write_text(json.dumps(plain, indent=2))
        if arguments.plot:
            draw_fits(runs, found, fit, laws, arguments.plot)
    except (RunError, OSError) as error:
        known = error if isinstance(error, RunError) else disk_error(error)
        print(f"fit_guidelines: {known}", file=sys.stderr)
        return known.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
