"""What compare_runs says, and the pictures that it draws."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs_for_tests import SCRATCH, written_run

from stackgrow.errors import DamagedError
from stackgrow.report.compare import as_dict, compare, evaluation_rows, render
from stackgrow.report.isoflop import read_run

NAME = ('name = "tiny"', 'name = "scratch"')
TOOL = Path(__file__).parents[2] / "tools" / "compare_runs.py"


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Scratch, and grown with a speed-up of 50%."""
    return [written_run(tmp_path / "a", *SCRATCH, NAME), written_run(tmp_path / "b", ratio=1.5)]


def test_text_states_definition_smoothing_and_the_known_speed_up(runs: list[Path]) -> None:
    text = render(compare(runs))
    assert "speed-up = FLOPs(baseline) / FLOPs(run) - 1 at equal smoothed loss, with the base's FLOPs" in text
    assert "straight lines over the records within 10% of a point's FLOPs" in text
    assert "tiny against scratch" in text
    rows = re.findall(r"^ *([0-9.]+) .* ([+-][0-9.]+)% +-? .*$", text, re.MULTILINE)
    assert len(rows) == 5
    for _, percent in rows:
        assert float(percent) == pytest.approx(50, abs=0.5)
    losses = [float(loss) for loss, _ in rows]
    assert losses == sorted(losses, reverse=True)


def test_plain_values_are_exact_and_json(runs: list[Path]) -> None:
    low, high = sorted(compare(runs).speed_ups["tiny"], key=lambda s: s.loss)[:2]
    wanted = (low.loss + high.loss) / 2
    found = json.loads(json.dumps(as_dict(compare(runs, losses=[wanted, 0.5]))))
    [speed_up] = found["speed_ups"]["tiny"]
    assert speed_up["loss"] == wanted
    assert speed_up["speed_up_flops"] == speed_up["baseline_flops"] / speed_up["flops"] - 1
    assert speed_up["speed_up_flops"] == pytest.approx(0.5, abs=0.005)
    assert found["baseline"] == "scratch"
    assert found["verdicts"]["tiny"].startswith("at ")
    assert found["verdicts"]["tiny"].endswith("; not reached by both: loss 0.5")


def test_validation_loss_is_not_smoothed(runs: list[Path]) -> None:
    comparison = compare(runs, loss="validation")
    target = comparison.curves[1].target
    assert (target.smooth == target.loss).all()
    assert "validation loss, the mean of the seeds, not smoothed" in render(comparison)


def test_a_run_that_has_not_come_to_its_target_model_has_no_speed_up(runs: list[Path]) -> None:
    shutil.rmtree(sorted(runs[1].glob("stage-*"))[-1])
    for order in (runs, runs[::-1]):
        text = render(comparison := compare(order))
        assert "no speed-up: tiny has not come to its target model" in text
        assert not comparison.speed_ups
        json.dumps(as_dict(comparison))
    with pytest.raises(DamagedError, match="has not come to its target model"):
        read_run(runs[1], "timing")


def test_curves_that_never_meet_are_told_with_their_spans(runs: list[Path], tmp_path: Path) -> None:
    better = written_run(tmp_path / "c", (NAME[0], 'name = "better"'), floor=0.2)
    text = render(compare([runs[0], better]))
    assert "the curves never meet, so there is no speed-up: scratch from " in text
    assert re.search(r"at [0-9.e+]+ FLOPs each: loss [0-9.]+ against [0-9.]+", text)
    assert "95%" not in text


def test_benchmarks_are_those_of_the_last_checkpoint(runs: list[Path]) -> None:
    (runs[1] / "eval").mkdir()
    for step, accuracy in ((20, 0.25), (60, 0.5)):
        tasks = {"sciq": {"acc": 0.1, "acc_norm": accuracy}, "wikitext": {"word_perplexity": 30.0}}
        record = {"stage": "s", "step": step, "tokens": 1024 * step, "tasks": tasks, "seven_task_mean": None}
        (runs[1] / "eval" / f"s-step-{step}.json").write_text(json.dumps(record))
    comparison = compare(runs)
    assert comparison.evaluations == {runs[1].name: {"sciq acc_norm": 0.5, "wikitext word_perplexity": 30.0}}
    assert "sciq acc_norm" in render(comparison)
    head, first, second = evaluation_rows({"x": {"mean of seven": 0.5}, "y": {"other acc": 0.25}})
    assert (head, first, second) == (
        ("run", "mean of seven", "other acc"), ("x", "0.5000", "-"), ("y", "-", "0.2500"),
    )  # fmt: skip


def test_tool_writes_pictures_and_a_page(runs: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = ["--figure", tmp_path / "c.png", "--figure", tmp_path / "c.svg", "--html", tmp_path / "c.html", "--json"]
    command = [sys.executable, TOOL, *runs, *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["speed_ups"]["tiny"]
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "c.svg").read_text()
    assert svg.startswith("<svg")
    assert svg.count('id="axes_') == 3
    assert "currentColor" in svg
    assert "#1b1f23" not in svg, "ink is the page's"
    assert len(svg) < 400_000
    missing = subprocess.run([sys.executable, str(TOOL), "nowhere"], capture_output=True, text=True, timeout=100)
    assert missing.returncode == 65
    assert missing.stderr == "compare_runs: nowhere is not a run: it has no recipe.toml\n"
