"""Smoothing and iso-loss speed-up on curves whose speed-up is known."""

import json
from pathlib import Path

import numpy as np
import pytest
from recipes_for_tests import RECIPE, edited

from stackgrow.errors import DamagedError
from stackgrow.recipe.load import load_recipe
from stackgrow.recipe.write import to_toml
from stackgrow.report.curves import Part, SpeedUp, make_part, read_curves, smooth, speed_ups

RECORDS = 6000


def power_law(flops: np.ndarray) -> np.ndarray:
    return 1.7 + 2.0 * (flops / 1e18) ** -0.15


def part(
    ratio: float, *, start: float = 0.0, end: float = 1e21, noise: float = 0.0, seed: int = 0, seeds: int = 1
) -> Part:
    """A run that needs 1 / ``ratio`` of the baseline's FLOPs for every loss, a token costing 1e10 FLOPs, and that
    logs from ``start`` on, its base having had twice as many tokens for those FLOPs."""
    flops = np.tile(start + np.linspace(0, end - start, RECORDS + 1)[1:], seeds)
    loss = power_law(ratio * flops) + noise * np.random.default_rng(seed).standard_normal(len(flops))
    rows = np.stack([flops, (flops + start) / 1e10, loss, np.repeat(np.arange(seeds), RECORDS)], axis=1)
    return make_part("stage-0-train-8L", rows[np.argsort(flops, kind="stable")])


@pytest.mark.parametrize("ratio", [0.8, 1.0, 1.5, 3.0])
@pytest.mark.parametrize("noise", [0.0, 0.005])
def test_known_speed_up_is_recovered_within_one_percent(ratio: float, noise: float) -> None:
    grown = part(ratio, start=0.02e21, end=0.9e21, noise=noise, seed=1)
    found = speed_ups(part(1.0, noise=noise), grown)
    assert len(found) == 5
    for s in found:
        assert s.in_flops + 1 == pytest.approx(ratio, rel=0.01)
        # Tokens: the base's count more than its FLOPs would say.
        assert s.in_tokens == pytest.approx(s.baseline_flops / (s.flops + 0.02e21) - 1)
        if s.interval is None:  # at the end of a curve, which a part of the replicates does not reach
            assert s is found[-1]
            continue
        assert s.interval[0] - 0.01 * ratio < ratio - 1 < s.interval[1] + 0.01 * ratio
        if noise:
            assert 0.001 < s.interval[1] - s.interval[0] < 0.03 * ratio


def test_losses_asked_for_and_those_that_one_does_not_reach() -> None:
    scratch, grown = part(1.0), part(1.5, start=0.02e21)
    wanted = [float(power_law(np.array(x))) for x in (0.3e21, 0.9e21, 1.2e21)]
    found = speed_ups(scratch, grown, losses=[5.0, *wanted])
    assert [s.loss for s in found] == wanted[:2], "5.0 lies before the growth, the last below the baseline's end"
    assert [s.baseline_flops for s in found] == pytest.approx([0.3e21, 0.9e21], rel=3e-3)


def test_speed_up_of_the_headline() -> None:
    """7B, 194B tokens instead of 300B (paper, Figure 5 and abstract)."""
    found = SpeedUp(2.0, baseline_flops=300.0, baseline_tokens=300.0, flops=194.0, tokens=194.0)
    assert round(100 * found.in_flops, 1) == round(100 * found.in_tokens, 1) == 54.6


def test_curves_that_never_meet_have_no_speed_up() -> None:
    late = part(30.0, start=0.5e21)
    assert late.span[0] < part(1.0).span[1]
    assert speed_ups(part(1.0), late) == []
    assert speed_ups(late, part(1.0)) == []


def test_seeds_are_pooled_and_their_spread_widens_the_interval() -> None:
    rng, several = np.random.default_rng(2), part(1.5, start=0.02e21, noise=0.01, seeds=4)
    offset = 0.03 * rng.standard_normal(4)
    rows = np.stack([several.flops, several.tokens, several.loss + offset[several.seed], several.seed], axis=1)
    widths = [
        s.interval[1] - s.interval[0] for p in (several, make_part("s", rows))
        if (s := speed_ups(part(1.0), p)[2]).interval
    ]  # fmt: skip
    assert widths[1] > 3 * widths[0]


def test_seeds_that_differ_evenly_are_no_speed_up_without_smoothing_either() -> None:
    """Of validation losses: the mean of two seeds is the baseline's curve."""
    two = part(1.0, seeds=2)
    rows = np.stack([two.flops, two.tokens, two.loss + np.where(two.seed, 0.01, -0.01), two.seed], axis=1)
    rows = rows[np.lexsort(rows.T[::-1])]
    one = part(1.0)
    baseline = make_part("s", np.stack([one.flops, one.tokens, one.loss, one.seed], axis=1), window=0.0)
    found = speed_ups(baseline, make_part("s", rows, window=0.0))
    assert [s.in_flops for s in found] == pytest.approx([0.0] * 5, abs=1e-9)
    assert all(s.interval and s.interval[0] < 0 < s.interval[1] for s in found[:2])


def test_a_seed_that_has_not_come_so_far_is_left_out_where_it_is_not(recwarn: pytest.WarningsRecorder) -> None:
    two = part(1.5, start=0.02e21, noise=0.01, seeds=2)
    rows = np.stack([two.flops, two.tokens, two.loss, two.seed], axis=1)
    short = make_part("s", rows[(two.seed == 0) | (two.flops < 0.3e21)])
    found = speed_ups(part(1.0), short)
    assert found[0].in_flops == pytest.approx(0.5, abs=0.05)
    assert found[0].interval
    assert not recwarn.list


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
    text = edited(("seed = 7", f"seed = {seed}"), ('name = "tiny"', f'name = "{name}"'), text=RECIPE)
    folder.mkdir()
    (folder / "recipe.toml").write_text(text)
    (folder / "recipe.toml").write_text(to_toml(load_recipe(folder / "recipe.toml")))
    for stage, start in (("stage-2-train-2L", 0), ("stage-10-train-8L", 50)):
        (folder / stage).mkdir()
        rows = [{"tokens": 10 * (start + i), "flops": 1e3 * (start + i), "loss": 5 / (seed + i)} for i in range(1, 51)]
        (folder / stage / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_runs_that_differ_in_the_seed_alone_are_one_curve(tmp_path: Path) -> None:
    runs = [written_run(tmp_path / "a", 7), written_run(tmp_path / "b", 8), written_run(tmp_path / "c", 7, "other")]
    changed = runs[2] / "recipe.toml"
    changed.write_text(edited(("learning_rate = 0.001", "learning_rate = 0.002"), text=changed.read_text()))
    first, second = read_curves(runs)
    assert (first.name, first.seeds, second.name, second.seeds) == ("tiny", 2, "other", 1)
    assert [p.stage for p in first.parts] == ["stage-2-train-2L", "stage-10-train-8L"]
    assert len(first.target.loss) == 100
    assert (first.target.tokens[0], first.target.flops[-1], second.target.loss[0]) == (510, 1e5, 5 / 8)


def test_what_is_no_run_or_has_no_records_is_told(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match="is not a run: it has no recipe"):
        read_curves([tmp_path])
    with pytest.raises(DamagedError, match=r"has no validation\.jsonl with records"):
        read_curves([written_run(tmp_path / "a", 7)], loss="validation")
