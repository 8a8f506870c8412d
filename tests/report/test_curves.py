"""Smoothing and iso-loss speed-up on curves whose speed-up is known."""

import json
from pathlib import Path

import numpy as np
import pytest
from null_simulation import CASES, excluded
from recipes_for_tests import RECIPE, edited
from runs_for_tests import write_lines

from stackgrow.errors import DamagedError
from stackgrow.recipe.load import load_recipe
from stackgrow.recipe.write import to_toml
from stackgrow.report.curves import (
    WINDOW,
    SeedCurve,
    SpeedUp,
    StageCurve,
    noise_floor,
    read_curves,
    seed_curve,
    smooth,
    speed_ups,
    stage_curve,
)
from stackgrow.report.statistics import half_width, student_t
from stackgrow.run_folder.folder import RunFolder

RECORDS = 6000


def power_law(flops: np.ndarray) -> np.ndarray:
    return 1.7 + 2.0 * (flops / 1e18) ** -0.15


def curve(
    ratio: float,
    *,
    start: float = 0.0,
    end: float = 1e21,
    noise: float = 0.0,
    seed: int = 0,
    seeds: int = 1,
    offsets: tuple[float, ...] = (),
    window: float = WINDOW,
) -> StageCurve:
    """Runs that need 1 / ``ratio`` of the baseline's FLOPs for every loss, a token costing 1e10 FLOPs, and that log
    from ``start`` on, their base having had twice as many tokens for those FLOPs."""
    rng = np.random.default_rng(seed)
    members = []
    for number in range(seeds):
        flops = start + np.linspace(0, end - start, RECORDS + 1)[1:]
        loss = power_law(ratio * flops) + noise * rng.standard_normal(len(flops))
        if offsets:
            loss = loss + offsets[number]
        members.append(seed_curve(flops, (flops + start) / 1e10, loss, window))
    return joined(members)


def joined(members: list[SeedCurve]) -> StageCurve:
    whole = stage_curve("stage-0-train-8L", members)
    assert whole is not None
    return whole


@pytest.mark.parametrize("ratio", [0.8, 1.0, 1.5, 3.0])
@pytest.mark.parametrize("noise", [0.0, 0.005])
def test_known_speed_up_is_recovered_within_one_percent(
    ratio: float, noise: float
) -> None:
    grown = curve(ratio, start=0.02e21, end=0.9e21, noise=noise, seed=1, seeds=3)
    found = speed_ups(curve(1.0, noise=noise, seeds=3), grown)
    assert len(found) == 5
    for s in found:
        assert s.in_flops + 1 == pytest.approx(ratio, rel=0.01)
        # Tokens: the base's count more than its FLOPs would say.
        assert s.in_tokens == pytest.approx(s.baseline_flops / (s.flops + 0.02e21) - 1)
        assert s.interval
        low, high = s.interval
        if noise and low is not None and high is not None:
            assert low - 0.02 * ratio < ratio - 1 < high + 0.02 * ratio
            assert 0.001 < high - low < 0.06 * ratio


def test_losses_asked_for_and_those_that_one_does_not_reach() -> None:
    scratch, grown = curve(1.0), curve(1.5, start=0.02e21)
    wanted = [float(power_law(np.array(x))) for x in (0.3e21, 0.9e21, 1.2e21)]
    found = speed_ups(scratch, grown, losses=[5.0, *wanted])
    assert [s.loss for s in found] == wanted[:2], (
        "5.0 lies before the growth, the last below the baseline's end"
    )
    assert [s.baseline_flops for s in found] == pytest.approx(
        [0.3e21, 0.9e21], rel=3e-3
    )


def test_speed_up_of_the_headline() -> None:
    """7B, 194B tokens instead of 300B (paper, Figure 5 and abstract)."""
    found = SpeedUp(
        2.0, baseline_flops=300.0, baseline_tokens=300.0, flops=194.0, tokens=194.0
    )
    assert round(100 * found.in_flops, 1) == round(100 * found.in_tokens, 1) == 54.6


def test_curves_that_never_meet_have_no_speed_up() -> None:
    late = curve(30.0, start=0.5e21)
    assert late.span.high < curve(1.0).span.low
    assert speed_ups(curve(1.0), late) == []
    assert speed_ups(late, curve(1.0)) == []


@pytest.mark.parametrize(("ours", "theirs"), [(1, 1), (1, 3), (2, 2), (3, 2)])
def test_fewer_than_three_seeds_of_either_have_no_interval(
    ours: int, theirs: int
) -> None:
    found = speed_ups(
        curve(1.0, noise=0.01, seeds=theirs), curve(1.5, noise=0.01, seeds=ours)
    )
    assert found
    assert all(s.interval is None for s in found)


def test_the_spread_between_seeds_makes_the_interval_however_much_is_logged() -> None:
    """What the noise within a run would give is a hundredth of it."""
    baseline = curve(1.0, seeds=3, offsets=(0.0, 0.0, 0.0))
    apart = curve(1.0, seeds=3, offsets=(-0.01, 0.0, 0.01), noise=0.001)
    [_, _, s, *_] = speed_ups(baseline, apart)
    assert s.interval
    low, high = s.interval
    # t at two degrees of freedom is 4.3: 4.3 * .01 / sqrt(3) = .0248 of loss to either side.
    loss = s.loss
    assert low is not None
    assert high is not None
    assert s.baseline_flops / (1 + high) == pytest.approx(
        flops_at(loss + 0.0248), rel=0.02
    )
    assert s.baseline_flops / (1 + low) == pytest.approx(
        flops_at(loss - 0.0248), rel=0.02
    )


def flops_at(loss: float) -> float:
    return float(1e18 * ((loss - 1.7) / 2.0) ** (-1 / 0.15))


def test_an_interval_is_open_where_the_run_ends_before_it_does() -> None:
    baseline = curve(1.0, seeds=3, offsets=(-0.01, 0.0, 0.01))
    short = curve(1.0, seeds=3, offsets=(-0.01, 0.0, 0.01), end=0.5e21)
    last = speed_ups(baseline, short)[-1]
    assert last.interval
    assert last.interval.low is None
    assert last.interval.high is not None
    assert last.interval.high > 0


def test_seeds_that_differ_evenly_are_no_speed_up_without_smoothing_either() -> None:
    """Of validation losses: the mean of two seeds is the baseline's curve."""
    two = curve(1.0, seeds=2, offsets=(0.01, -0.01), window=0.0)
    found = speed_ups(curve(1.0, window=0.0), two)
    assert [s.in_flops for s in found] == pytest.approx([0.0] * 5, abs=1e-9)


def test_seeds_whose_flops_differ_are_no_speed_up() -> None:
    """Validations at 18 places, of seeds that lie .4% of FLOPs and .0135 of loss apart: pooled as if their points were
    one curve's, the lower one's was what the curve fell to first, and 3.4% were saved."""
    members = []
    for shift, offset in ((1.0, -0.0135), (1.004, 0.0), (0.996, 0.0135)):
        flops = shift * np.linspace(0, 1e21, 19)[1:]
        members.append(
            seed_curve(flops, flops / 1e10, power_law(flops) + offset, window=0.0)
        )
    flops = np.linspace(0, 1e21, 19)[1:]
    baseline = joined([seed_curve(flops, flops / 1e10, power_law(flops), window=0.0)])
    assert [s.in_flops for s in speed_ups(baseline, joined(members))] == pytest.approx(
        [0.0] * 5, abs=0.002
    )


def test_a_curve_ends_where_the_first_of_its_seeds_does() -> None:
    whole = curve(1.5, start=0.02e21, noise=0.01, seeds=2)
    short = curve(1.5, start=0.02e21, noise=0.01, seed=3, end=0.3e21)
    both = joined([*whole.seeds, *short.seeds])
    assert both.flops[-1] == 0.3e21
    assert both.by_seed.shape[0] == 3
    assert speed_ups(curve(1.0), both)[0].in_flops == pytest.approx(0.5, abs=0.05)


def test_noise_floor_is_what_seeds_of_one_recipe_show_against_each_other() -> None:
    floor = noise_floor(curve(1.0, seeds=3, offsets=(-0.01, 0.0, 0.01)))
    assert floor
    assert floor.low < -0.05
    assert floor.high > 0.05
    assert noise_floor(curve(1.0)) is None
    assert noise_floor(curve(1.0, seeds=2)) == pytest.approx((0, 0), abs=1e-9)


def test_intervals_exclude_no_difference_in_three_to_eight_percent_of_comparisons() -> (
    None
):
    """A light version of null_simulation.py, whose table stands in recipes/RESULTS.md; the bounds leave three standard
    errors of room for these few comparisons, of which each has five intervals that hang together."""
    shares = []
    for case in CASES:
        if case.interval < 100:
            continue
        for seeds in (3, 5, 10):
            share, count = excluded(case, seeds, comparisons=60, seed=1)
            assert count > 250
            assert share < 0.12, (case.name, seeds)
            shares.append(share)
    assert len(shares) == 9
    assert 0.03 < np.mean(shares) < 0.08
    every_step, _ = excluded(CASES[0], 3, comparisons=20, seed=1)
    assert every_step < 0.15, (
        "58% where the noise within runs was taken for all there is"
    )


@pytest.mark.parametrize("degrees", [1, 2, 2.4, 3.7, 5, 8.8, 11, 17, 25, 45, 200])
def test_student_t_is_the_textbook_s(degrees: float) -> None:
    scipy = pytest.importorskip("scipy.stats")
    assert float(student_t(degrees)) == pytest.approx(
        scipy.t.ppf(0.975, degrees), rel=0.025
    )
    if float(degrees).is_integer() and degrees <= 8:
        assert float(student_t(degrees)) == pytest.approx(
            scipy.t.ppf(0.975, degrees), abs=1e-3
        )


def test_half_width_is_welch_s() -> None:
    scipy = pytest.importorskip("scipy.stats")
    first, second = np.array([1.0, 1.2, 1.1]), np.array([2.0, 2.6, 2.2, 1.9])
    wanted = scipy.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    half = half_width(first[:, None], second[:, None])[0]
    assert half == pytest.approx((wanted.high - wanted.low) / 2, rel=0.02)


def test_smoothing_keeps_a_straight_line_to_its_ends_and_is_as_stated() -> None:
    x = np.sort(np.random.default_rng(0).uniform(1, 10, 300))
    assert smooth(x, 3 - 0.2 * x) == pytest.approx(3 - 0.2 * x, rel=1e-9)
    y = np.random.default_rng(1).standard_normal(300)
    inside = np.abs(x - x[150]) <= 0.1 * x[150]
    line = np.polynomial.Polynomial.fit(x[inside], y[inside], 1)
    assert smooth(x, y)[150] == pytest.approx(line(x[150]))
    assert np.array_equal(smooth(np.array([5.0]), np.array([2.0])), [2.0])


def written_run(folder: Path, seed: int, name: str = "tiny") -> Path:
    """A run folder with the records of two stages, of which the second has a two-digit number."""
    text = edited(
        ("seed = 7", f"seed = {seed}"),
        ('name = "tiny"', f'name = "{name}"'),
        text=RECIPE,
    )
    folder.mkdir()
    run = RunFolder(folder)
    run.recipe_file.write_text(text)
    run.recipe_file.write_text(to_toml(load_recipe(run.recipe_file)))
    for stage, start in (("stage-2-train-2L", 0), ("stage-10-train-8L", 50)):
        run.stage(stage).path.mkdir()
        rows = []
        for step in range(1, 51):
            place = {
                "step": step,
                "tokens": 10 * (start + step),
                "flops": 1e3 * (start + step),
            }
            rows.append({**place, "loss": 5 / (seed + step)})
        write_lines(run.stage(stage).metrics_file, rows)
    return folder


def test_runs_that_differ_in_the_seed_alone_are_one_curve(tmp_path: Path) -> None:
    runs = [
        written_run(tmp_path / "a", 7),
        written_run(tmp_path / "b", 8),
        written_run(tmp_path / "c", 7, "other"),
    ]
    changed = RunFolder(runs[2]).recipe_file
    changed.write_text(
        edited(
            ("learning_rate = 0.001", "learning_rate = 0.002"), text=changed.read_text()
        )
    )
    first, second = read_curves(runs)
    assert (first.name, first.seeds, second.name, second.seeds) == (
        "tiny",
        2,
        "other",
        1,
    )
    assert [stage.stage for stage in first.stages] == [
        "stage-2-train-2L",
        "stage-10-train-8L",
    ]
    assert [len(seed.loss) for seed in first.target.seeds] == [50, 50]
    assert (first.target.tokens[0], first.target.flops[-1]) == (510, 1e5)
    assert second.target.seeds[0].loss[0] == 5 / 8


def test_runs_on_other_data_are_no_seeds_of_one_curve(tmp_path: Path) -> None:
    runs = [written_run(tmp_path / "a", 7), written_run(tmp_path / "b", 8)]
    for run, validation_hash in zip(runs, ("1" * 64, "2" * 64), strict=True):
        RunFolder(run).provenance_file.write_text(
            json.dumps({"data": {"validation_hash": validation_hash}})
        )
    assert [one.seeds for one in read_curves(runs)] == [1, 1]


def test_what_is_no_run_or_has_no_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match="is not a run: it has no recipe"):
        read_curves([tmp_path])
    with pytest.raises(DamagedError, match=r"has no validation\.jsonl with records"):
        read_curves([written_run(tmp_path / "a", 7)], loss="validation")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (
            '{"step": 1, "tokens": 1, "flops": 1, "loss": "low"}',
            "loss is 'low', which is no such number",
        ),
        ("5", "'5' is no record of a step"),
        (
            '{"step": 1, "tokens": 1, "flops": 1e308, "loss": 2.0}',
            r"flops is '1e\+308', which is no such number",
        ),
        (
            '{"step": 1, "tokens": null, "flops": 1, "loss": 2.0}',
            "tokens is 'None', which is no such number",
        ),
    ],
)
def test_a_record_that_is_none_is_named(
    tmp_path: Path, line: str, problem: str
) -> None:
    run = written_run(tmp_path / "a", 7)
    file = RunFolder(run).stage("stage-10-train-8L").metrics_file
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(
        DamagedError, match=rf"metrics\.jsonl:51: {problem}; restore the file"
    ):
        read_curves([run])
