"""Growth timing from a sweep: IsoFLOP valleys, the guideline d(N, C) and scaling laws, as in the paper's section 4.2.

python tools/fit_guidelines.py runs/410m_timing_* runs/1.1b_timing_* runs/3b_timing_* --out fit.json --plot fit.png
python tools/fit_guidelines.py sweep.csv                   columns parameters, timing, flops, loss
python tools/fit_guidelines.py runs/*_factor_* runs/*_scratch --variable factor    its eq. 49, and Figures 10 and 22
python tools/fit_guidelines.py runs/410m_750b_scratch runs/410m_750b_gstack --difference 8T    its Figure 6b
python tools/fit_guidelines.py --predict 13B:2T --predict 70B:2T    the guideline's d, as in its Table 4
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from stackgrow import seal
from stackgrow.cli.options import parser_of, quiet_at_closed_pipe
from stackgrow.errors import RunError, disk_error
from stackgrow.recipe.values import tokens
from stackgrow.report.guideline_table import draw_fits, render_fits, render_toml
from stackgrow.report.isoflop import (
    Fit,
    Run,
    fit_law,
    fit_valleys,
    read_run,
    read_table,
    valleys,
)
from stackgrow.report.prediction import Target, fit_difference, predict
from stackgrow.report.prediction_table import (
    draw_differences,
    render_differences,
    render_predictions,
)


@quiet_at_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument(
        "sources",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="run folders, or CSV files of curves",
    )
    parser.add_argument(
        "--variable",
        choices=["timing", "factor"],
        default="timing",
        help="what the sweep varies",
    )
    parser.add_argument("--points", type=int, default=6, help="IsoFLOP curves per size")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write all numbers")
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="draw the curves, the fit and the laws"
    )
    parser.add_argument(
        "--difference",
        nargs="*",
        type=amount,
        metavar="TOKENS",
        help="instead: a logarithm through the difference of losses from scratch and grown, and what it has at TOKENS",
    )
    parser.add_argument(
        "--predict",
        action="append",
        default=[],
        type=target,
        metavar="N:D",
        help="what the guideline and the fits have for N parameters and D tokens, such as 13B:2T",
    )
    arguments = parser.parse_args(argv)
    if not arguments.sources and not arguments.predict:
        parser.error("give runs, or what to --predict")
    try:
        seal.require_writable(arguments.out, arguments.plot)
        if arguments.difference is not None:
            difference(arguments)
        else:
            fit(arguments)
    except RunError as error:
        return _failed(error)
    except BrokenPipeError:
        raise  # a reader that leaves early, which is no disk's fault
    except OSError as error:
        return _failed(disk_error(error))
    return 0


def _failed(error: RunError) -> int:
    print(f"fit_guidelines: {error}", file=sys.stderr)
    return error.exit_code


def amount(given: str) -> int:
    """``13B``, of tokens or parameters."""
    return int(tokens().parse(given))


def target(given: str) -> Target:
    """``13B:2T``."""
    parameters, _, amount_of_tokens = given.partition(":")
    return Target(amount(parameters), amount(amount_of_tokens))


def read_sources(arguments: argparse.Namespace) -> list[Run]:
    runs: list[Run] = []
    for source in arguments.sources:
        if source.is_dir():
            runs.append(read_run(source, arguments.variable))
        else:
            runs.extend(read_table(source, arguments.variable))
    return runs


def difference(arguments: argparse.Namespace) -> None:
    """Prints, and where asked for writes, how the differences of losses go on."""
    found = fit_difference(read_sources(arguments))
    print(render_differences(found, arguments.difference))
    if arguments.out:
        plain = {"differences": [dataclasses.asdict(one) for one in found]}
        arguments.out.write_text(json.dumps(plain, indent=2), encoding="utf-8")
    if arguments.plot:
        draw_differences(found, arguments.difference, arguments.plot)


def fit(arguments: argparse.Namespace) -> None:
    """Prints, and where asked for writes and draws, all that the sources tell."""
    runs = read_sources(arguments)
    grown = [run for run in runs if run.at is not None]
    laws = {}
    for name, group in (
        ("scratch", [run for run in runs if run.at is None]),
        ("grown", grown),
    ):
        law = fit_law(group)
        if law:
            laws[name] = law
    variable = arguments.variable
    curves = valleys(runs, arguments.points, variable)
    guideline: Fit | None = None
    problem = ""
    try:
        guideline = fit_valleys(curves)
    except RunError as error:
        problem = str(error)
    if runs:
        print(render_fits(curves, guideline or problem, laws, variable))
    # A recipe has a place for a timing's fit alone: of factors the paper uses 4.
    timing = guideline if variable == "timing" else None
    if timing:
        source = (
            f"{timing.points} valleys of {len(grown)} runs by tools/fit_guidelines.py"
        )
        print("\n" + render_toml(timing, curves, source))
    predictions = [predict(wanted, timing, laws) for wanted in arguments.predict]
    if predictions:
        print(render_predictions(predictions))
    if arguments.out:
        plain = {
            variable: dataclasses.asdict(guideline) if guideline else None,
            "problem": problem or None,
            "laws": {name: dataclasses.asdict(law) for name, law in laws.items()},
            "valleys": [dataclasses.asdict(valley) for valley in curves],
            "predictions": [dataclasses.asdict(one) for one in predictions],
        }
        arguments.out.write_text(json.dumps(plain, indent=2), encoding="utf-8")
    if arguments.plot:
        draw_fits(runs, curves, guideline, laws, arguments.plot, variable)


if __name__ == "__main__":
    sys.exit(main())
