"""Fits to sweeps whose constants are known, with and without a valley to find."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tomli
from recipes_for_tests import RECIPE, edited, recipe_of

from stackgrow.cli.fit import main
from stackgrow.errors import DamagedError
from stackgrow.plan import guidelines
from stackgrow.report.guideline_table import render_fits, render_toml
from stackgrow.report.isoflop import (
    Fit,
    Run,
    fit_law,
    fit_valleys,
    read_table,
    valleys,
)
from stackgrow.report.prediction import Target, fit_difference, predict

TOOL = Path(__file__).parents[2] / "tools" / "fit_guidelines.py"
TRUE = {"a": 0.88, "b": 163.27, "c": -5.74}
BUDGET = {4.1e8: 2.2e20, 1.1e9: 7e20, 3e9: 1.2e21}  # the paper's sizes and FLOPs
TIMINGS = (1e9, 5e9, 10e9, 20e9, 50e9)


def sweep(
    noise: float, seed: int = 0, curvature: float = 0.08, shift: float = 0.0
) -> list[Run]:
    """Runs whose loss is least at the timing of eq. 2 (times 10^shift), each off by one normal number."""
    rng, runs = np.random.default_rng(seed), []
    for n, budget in BUDGET.items():
        for d in TIMINGS:
            C = np.linspace(0.2, 1, 80) * budget
            best = (
                TRUE["a"] * math.log10(n) + TRUE["b"] / np.log10(C) + TRUE["c"] + shift
            )
            loss = (
                2.6 * (C / 1e20) ** -0.05
                + curvature * (math.log10(d) - best) ** 2
                + rng.normal(0, noise)
            )
            runs.append(Run(f"{n} {d}", n, d, C, loss))
    return runs


def test_constants_are_exact_without_noise() -> None:
    fit = fit_valleys(valleys(sweep(0.0)))
    assert fit.values == pytest.approx(
        TRUE, rel=1e-3
    )  # the curves are read between their points


def test_constants_are_recovered_within_their_uncertainty() -> None:
    scores = []
    for seed in range(12):
        fit = fit_valleys(valleys(sweep(0.002, seed), points=4))
        scores += [(fit.values[name] - TRUE[name]) / fit.errors[name] for name in "abc"]
    assert np.mean(np.abs(scores) < 2) >= 0.85  # 95% of a normal distribution
    assert 0.5 < np.std(scores) < 1.6  # nor are they stated too large


@pytest.mark.parametrize(
    ("sets", "problem"),
    [
        ({"curvature": -0.08}, "the losses do not curve upwards"),
        ({"shift": 3.0}, "the loss is still falling at the largest value tried"),
        ({"shift": -4.0}, "the loss is still falling at the smallest value tried"),
    ],
)
def test_a_sweep_without_a_valley(sets: dict[str, float], problem: str) -> None:
    found = valleys(sweep(0.0, **sets))
    assert {v.problem for v in found} == {problem}
    assert all(v.best is None for v in found)
    with pytest.raises(
        DamagedError, match="0 valleys of 0 sizes do not determine a, b and c"
    ):
        fit_valleys(found)
    assert f"no valley: {problem}" in render_fits(found, "0 valleys", {})


def test_one_size_and_three_timings() -> None:
    runs = [r for r in sweep(0.0) if r.parameters == 3e9]
    with pytest.raises(DamagedError, match="of 1 sizes do not determine"):
        fit_valleys(valleys(runs))
    assert valleys(runs[:2]) == []
    fit = fit_valleys(valleys([r for r in sweep(0.0) if r.at in TIMINGS[1:4]]))
    assert math.isnan(fit.errors["a"])  # a parabola goes through any three points


def test_a_scaling_law_is_found_again() -> None:
    rng, flops = np.random.default_rng(0), [1e19, 1e20, 1e21, 3e21]
    losses = [30 * c**-0.055 * (1 + rng.normal(0, 1e-3)) for c in flops]
    runs = [
        Run("", n, None, np.array([c / 2, c]), np.array([9.0, loss]))
        for n, (c, loss) in enumerate(zip(flops, losses, strict=True))
    ]
    law = fit_law(runs)
    assert law is not None
    for name, true in {"a": 30, "b": -0.055}.items():
        assert abs(law.values[name] - true) < 3 * law.errors[name]
        assert law.errors[name] < 0.2 * abs(true)
    assert fit_law(runs[:1]) is None


def test_scaling_law_is_the_least_squares_of_the_losses() -> None:
    """As the paper fits it: through losses that no power law goes through, not their logarithms' fit."""
    flops, losses = np.array([1e18, 1e20, 1e21, 1e22]), np.array([6.0, 3.2, 2.9, 2.3])
    runs = [
        Run(str(n), n, None, np.array([c / 2, c]), np.array([9.0, loss]))
        for n, (c, loss) in enumerate(zip(flops, losses, strict=True))
    ]
    law = fit_law(runs)
    assert law is not None
    a, b = law.values["a"], law.values["b"]

    def squares(factor: float, shift: float) -> float:
        return float(np.square(factor * a * flops ** (b + shift) - losses).sum())

    for factor, shift in ((1.001, 0.0), (0.999, 0.0), (1.0, 1e-5), (1.0, -1e-5)):
        assert squares(factor, shift) > squares(1.0, 0.0)
    in_logarithms = np.polyfit(np.log(flops), np.log(losses), 1)[0]
    assert abs(b - in_logarithms) > 0.002
    scipy = pytest.importorskip("scipy.optimize")
    start = (a * 1e20**b, b)
    best, covariance = scipy.curve_fit(
        lambda c, level, power: level * (c / 1e20) ** power, flops, losses, start
    )
    assert b == pytest.approx(best[1], rel=1e-4)
    assert law.errors["b"] == pytest.approx(math.sqrt(covariance[1, 1]), rel=1e-3)


def test_seeds_at_one_timing_are_runs_of_their_own() -> None:
    """Each is off by a number of its own: shifted alike, as one run, their refits would spread more widely."""
    seeds = [
        replace(run, name=f"{run.name} {seed}")
        for seed in range(3)
        for run in sweep(0.002, seed)
    ]
    fit = fit_valleys(valleys(seeds, points=3))
    for name, true in TRUE.items():
        assert abs(fit.values[name] - true) < 3 * fit.errors[name]
    as_one_run = [replace(run, name=run.name.rpartition(" ")[0]) for run in seeds]
    alike = fit_valleys(valleys(as_one_run, points=3))
    assert fit.values == alike.values
    assert fit.errors["a"] == pytest.approx(alike.errors["a"] / math.sqrt(3), rel=0.15)


def test_table_of_a_fit_is_a_recipe_s(tmp_path: Path) -> None:
    found = valleys(sweep(0.0))
    text = render_toml(fit_valleys(found), found, 'our "own" sweep')
    guideline = recipe_of(
        tmp_path, edited(("[train]\n", f"{text}\n\n[train]\n"), text=RECIPE)
    ).guideline
    assert guideline is not None
    assert (guideline.a, guideline.b, guideline.c) == pytest.approx(
        tuple(TRUE.values()), rel=1e-3
    )
    assert (guideline.source, guideline.max_parameters) == ('our "own" sweep', 3e9)


def test_the_tool_fits_a_sweep_from_a_table(tmp_path: Path) -> None:
    with (tmp_path / "sweep.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["parameters", "timing", "flops", "loss"])
        for run in sweep(0.001):
            writer.writerows(
                [run.parameters, run.at, *row]
                for row in zip(run.flops, run.loss, strict=True)
            )
        for n, budget in BUDGET.items():
            writer.writerows(
                [n, "", c, 2.8 * (c / 1e20) ** -0.05]
                for c in np.linspace(0.2, 1, 9) * budget
            )
    command = [
        sys.executable,
        str(TOOL),
        "sweep.csv",
        "--out",
        "fit.json",
        "--plot",
        "fit.svg",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    output = done.stdout
    plain = json.loads((tmp_path / "fit.json").read_text())
    for name, true in TRUE.items():
        assert (
            abs(plain["timing"]["values"][name] - true)
            < 3 * plain["timing"]["errors"][name]
        )
    assert plain["laws"]["scratch"]["values"]["b"] == pytest.approx(-0.05, abs=2e-3)
    assert (
        tomli.loads(output[output.index("[guideline]") :])["guideline"]["a"]
        == plain["timing"]["values"]["a"]
    )
    picture = (tmp_path / "fit.svg").read_text()
    assert "scratch law" in picture
    assert "growth timing d, tokens" in picture
    assert_marks_are_amounts(picture)


def assert_marks_are_amounts(picture: str) -> None:
    """Not the formulas that matplotlib has for logarithmic axes, in a text that is not read as formulas."""
    texts = re.findall(r"<text [^>]*>([^<]*)</text>", picture)
    assert len(texts) >= 20
    assert not [text for text in texts if "$" in text]


def test_a_sweep_of_factors_is_fitted_with_scratch_as_factor_1(tmp_path: Path) -> None:
    """The paper's factors (Figure 10), least at its eq. 50; without scratch the valley of the 1.1B is out of reach."""
    true = {"a": 1.01, "b": -29.88, "c": -7.36}
    sweeps = {1.233e9: (1, 4, 8, 24), 2.234e9: (1, 4, 8, 16, 32)}
    table, out, plot = (tmp_path / name for name in ("f.csv", "f.json", "f.svg"))
    with table.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["parameters", "factor", "flops", "loss"])
        for n, factors in sweeps.items():
            for g in factors:
                for C in np.linspace(1e20, 7e20, 40):
                    best = true["a"] * math.log10(n) + true["b"] / math.log10(C)
                    off = math.log10(g) - best - true["c"]
                    loss = 2.6 * (C / 1e20) ** -0.05 + 0.08 * off**2
                    writer.writerow([n, "" if g == 1 else g, C, loss])
    wanted = ("--variable", "factor", "--out", str(out), "--plot", str(plot))
    printed = told(str(table), *wanted)
    assert "log10(g) = a log10(N) + b / log10(C) + c (eq. 49: preliminary" in printed
    assert "(paper -29.88)" in printed
    assert "[guideline]" not in printed, "a recipe's is that of timings"
    fitted = json.loads(out.read_text())["factor"]["values"]
    n, C = 1.233e9, 5e20
    found = guidelines.by_size_and_flops(n, C, tuple(fitted[name] for name in "abc"))
    assert found == pytest.approx(guidelines.preliminary_factor(n, C), rel=0.01)
    picture = plot.read_text()
    assert "growth factor g" in picture
    assert_marks_are_amounts(picture)
    grown = [run for run in read_table(table, "factor") if run.at is not None]
    without = valleys(grown, variable="factor")
    assert "still falling at the smallest" in str(without[0].problem)


def test_bad_rows_are_named(tmp_path: Path) -> None:
    file = tmp_path / "sweep.csv"
    file.write_text("parameters,timing,flops,loss\n1e9,1e9,1e20,high\n")
    with pytest.raises(
        DamagedError,
        match=r"sweep.csv:2: .*needs numbers for parameters, timing, flops, loss",
    ):
        read_table(file, "timing")
    file.write_text("parameters,flops,loss\n1e9,1e20,2\n")
    with pytest.raises(DamagedError, match=r"sweep.csv:2: 'timing'"):
        read_table(file, "timing")


def scratch_and_grown(noise: float = 0.0) -> list[Run]:
    """Two losses that differ by 0.5 - 0.02 log10(C), each off by noise."""
    rng = np.random.default_rng(0)
    C = np.linspace(0.02, 1, 300) * 1.5e21
    scratch = 2.6 * (C / 1e20) ** -0.05
    grown = scratch - (0.5 - 0.02 * np.log10(C))
    pair = []
    for at, loss in ((None, scratch), (1e10, grown)):
        noisy = loss + rng.normal(0, noise, len(C))
        pair.append(Run(str(at), 3.08e8, at, C, noisy))
    return pair


def test_the_logarithm_of_a_difference_is_found_and_continued() -> None:
    (found,) = fit_difference(scratch_and_grown())
    assert (found.a, found.b) == pytest.approx((0.5, -0.02), rel=1e-3)
    assert found.vanishes == pytest.approx(1e25, rel=0.02)
    assert found.checked == pytest.approx(found.measured, abs=1e-5)
    assert found.rms < 1e-5
    (noisy,) = fit_difference(scratch_and_grown(noise=0.002))
    assert noisy.at(1e22) == pytest.approx(0.5 - 0.02 * 22, abs=0.002)
    assert noisy.rms == pytest.approx(0.002 * math.sqrt(2), rel=0.4)
    with pytest.raises(DamagedError, match="from scratch and grown ones"):
        fit_difference(scratch_and_grown()[:1])


def test_predictions_are_those_of_table_4_and_of_the_laws() -> None:
    for n, tokens, d in (
        (8e9, 15e12, 6.58),
        (7e9, 2e12, 11.11),
        (13e9, 2e12, 15.84),
        (70e9, 2e12, 42.48),
    ):
        assert round(predict(Target(n, tokens)).timing / 1e9, 2) == d
    laws = {
        name: Fit({"a": a, "b": -0.05}, {}, 4)
        for name, a in (("scratch", 25.0), ("grown", 24.5))
    }
    found = predict(Target(13e9, 2.6e11), None, laws)
    assert found.loss == pytest.approx(25 * found.target.flops**-0.05)
    assert found.speed_up == pytest.approx((25 / 24.5) ** 20 - 1)


def test_the_tool_predicts_and_continues_a_difference(tmp_path: Path) -> None:
    table, out = tmp_path / "pair.csv", tmp_path / "out.json"
    with table.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["parameters", "timing", "flops", "loss"])
        for run in scratch_and_grown():
            for flops, loss in zip(run.flops, run.loss, strict=True):
                writer.writerow([run.parameters, run.at or "", flops, loss])
    plot = tmp_path / "difference.png"
    printed = told(
        str(table), "--difference", "750B", "8T", "--out", str(out), "--plot", str(plot)
    )
    expected = 0.5 - 0.02 * math.log10(6 * 3.08e8 * 8e12)
    assert f"at 8T tokens: {expected:+.4f}" in printed
    assert json.loads(out.read_text())["differences"][0]["b"] == pytest.approx(
        -0.02, rel=1e-3
    )
    assert plot.stat().st_size > 1000
    printed = told("--predict", "13B:2T", "--predict", "70B:2T")
    assert re.search(r"13B +2T +1.56e\+23 +15.84B +-", printed)
    assert "42.48B" in printed


def told(*arguments: str) -> str:
    """What the tool prints."""
    with io.StringIO() as output, contextlib.redirect_stdout(output):
        assert main(arguments) == 0
        return output.getvalue()
