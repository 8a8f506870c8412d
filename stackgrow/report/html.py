"""report.html of one run or of several beside each other: a single file that needs nothing else, for screens of any
width, light and dark, and for paper. Its look is page.html.jinja, which escapes whatever a run says."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from stackgrow import seal
from stackgrow.errors import RunError, disk_error
from stackgrow.report.benchmarks import benchmark_rows
from stackgrow.report.compare import (
    SMOOTHING,
    Comparison,
    certainty,
    compare,
    noise,
    outcome,
    speed_up_rows,
    verdict,
)
from stackgrow.report.curves import COUNTED, DEFINITION, has_records
from stackgrow.report.figure import color_of, panel_svg, panels_of
from stackgrow.report.page import page
from stackgrow.report.run_page import run_page
from stackgrow.run_folder.folder import RunFolder
from stackgrow.text import short

TEMPLATE = "report/page.html.jinja"
TITLES = {"train": "Training loss", "validation": "Validation loss"}


@dataclass(frozen=True)
class LegendEntry:
    color: str
    label: str


@dataclass(frozen=True)
class Against:
    """A run against the baseline; ``rows`` under their head, [] where there is no speed-up."""

    label: str
    verdict: str
    certainty: str
    rows: list[tuple[str, ...]]


@dataclass(frozen=True)
class LossSection:
    """The curves of one loss."""

    title: str
    caption: str
    legend: list[LegendEntry]
    pictures: list[Markup]
    against: list[Against]


@dataclass(frozen=True)
class Differences:
    label: str
    lines: list[str]


@dataclass(frozen=True)
class ComparisonHead:
    """What a comparison says on top: a sentence for each run, and what stands against it."""

    sentences: list[str]
    definition: str
    noise: str
    not_as_sealed: list[str]
    not_comparable: list[str]
    differences: list[Differences]


def write_report(runs: Sequence[Path], target: Path, force: bool = False) -> None:
    """Writes the report of ``runs``, the first being the baseline of the others, to file ``target``.

    Raises:
        RunError: a folder that is no run or without records, runs that cannot be compared (unless by ``force``), or
            matplotlib is not installed.
        RecipeError: a run's recipe.toml cannot be read.
    """
    # A section for each loss that all runs have; held-out text may be none.
    comparisons = [compare(runs, force=force)]
    if all(has_records(run, "validation") for run in runs):
        comparisons.append(compare(runs, "validation", force=force))

    first = comparisons[0]
    several = len(first.curves) > 1
    title = first.baseline.name
    if several:
        title = f"{', '.join(curve.name for curve in first.curves[1:])} against {title}"
    values = {
        "title": title,
        "comparison": _comparison_head(first) if several else None,
        "losses": [_loss_section(comparison) for comparison in comparisons],
        "benchmarks": _transposed(benchmark_rows(first.evaluations))
        if first.evaluations
        else None,
        "runs": [run_page(run) for run in runs],
    }
    seal.write_text(target, page(TEMPLATE, values))


def finish_report(run: Path) -> str:
    """Writes the report of a run that has just ended, where matplotlib is there; returns a line that says where it is.
    A failure is logged: the run has succeeded."""
    target = RunFolder(run).report_file
    try:
        write_report([run], target)
    except RunError as error:  # matplotlib is missing
        return f"report       none: {error}"
    except OSError as error:
        return f"report       none: {disk_error(error)}"
    except Exception:
        logging.getLogger(__name__).exception("the report of %s cannot be written", run)
        return "report       none: see the message above"
    return f"report       {short(target)}"


def _comparison_head(comparison: Comparison) -> ComparisonHead:
    differences = []
    not_comparable = []
    for curve in comparison.curves[1:]:
        differences.append(Differences(curve.label, comparison.differences[curve.name]))
        not_comparable += [
            f"{curve.name}: {reason}"
            for reason in comparison.unlike.get(curve.name, [])
        ]
    return ComparisonHead(
        sentences=[outcome(comparison, curve) for curve in comparison.curves[1:]],
        definition=f"{DEFINITION}; {COUNTED}",
        noise=noise(comparison),
        not_as_sealed=comparison.edited,
        not_comparable=not_comparable,
        differences=differences,
    )


def _loss_section(comparison: Comparison) -> LossSection:
    caption = SMOOTHING[comparison.loss]
    if any(len(curve.stages) > 1 for curve in comparison.curves):
        caption += "; dashed: stages before the target model's; dots: where a grown stage begins"
    against = []
    for curve in comparison.curves[1:]:
        label = f"{curve.label} against {comparison.baseline.label}"
        rows = speed_up_rows(comparison, curve)
        against.append(
            Against(
                label, verdict(comparison, curve), certainty(comparison, curve), rows
            )
        )
    return LossSection(
        title=TITLES[comparison.loss],
        caption=caption,
        legend=[
            LegendEntry(color_of(number), curve.legend)
            for number, curve in enumerate(comparison.curves)
        ],
        pictures=[
            Markup(panel_svg(comparison, panel)) for panel in panels_of(comparison)
        ],
        against=against,
    )


def _transposed(rows: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    return list(zip(*rows, strict=True))
