"""What compare_runs says, and the pictures that it draws."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs_for_tests import SCRATCH, without_speed, written_run

from stackgrow import seal
from stackgrow.errors import ChangedError, DamagedError
from stackgrow.report.benchmarks import Score, benchmark_rows
from stackgrow.report.compare import (
    Comparison,
    as_dict,
    compare,
    outcome,
    render,
)
from stackgrow.report.isoflop import read_run
from stackgrow.run_folder.evaluations import write_evaluation
from stackgrow.run_folder.folder import RunFolder

NAME = ('name = "tiny"', 'name = "scratch"')
TOOL = Path(__file__).parents[2] / "tools" / "compare_runs.py"


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Scratch, and grown with a speed-up of 50%."""
    return [
        written_run(tmp_path / "a", *SCRATCH, NAME),
        written_run(tmp_path / "b", ratio=1.5),
    ]


def test_text_states_definition_smoothing_and_the_known_speed_up(
    runs: list[Path],
) -> None:
    text = render(compare(runs))
    assert (
        "speed-up = FLOPs(baseline) / FLOPs(run) - 1 at equal smoothed loss, with the base's FLOPs"
        in text
    )
    assert "FLOPs are 6 N D with N the parameters without the input embedding" in text
    assert "straight lines over the records within 10% of a point's FLOPs" in text
    assert (
        "tiny (G_stack, 2 growths, 1 seed) against scratch (from scratch, 1 seed)"
        in text
    )
    rows = re.findall(
        r"^ *([0-9.]+) +[0-9.e+]+ +[0-9.e+]+ +([+-][0-9.]+)% .* 1 vs 1$",
        text,
        re.MULTILINE,
    )
    assert len(rows) == 5
    for _, percent in rows:
        assert float(percent) == pytest.approx(50, abs=0.5)
    losses = [float(loss) for loss, _ in rows]
    assert losses == sorted(losses, reverse=True)


def test_one_seed_has_noise_within_the_run_alone_and_no_interval(
    runs: list[Path],
) -> None:
    text = render(compare(runs))
    assert "one seed: within-run noise only" in text
    assert "95%" not in text
    assert "noise floor" not in text
    plain = as_dict(compare(runs))
    assert plain["seeds"] == {"scratch": 1, "tiny": 1}
    assert {speed_up["interval"] for speed_up in plain["speed_ups"]["tiny"]} == {None}


@pytest.fixture
def seeds(tmp_path: Path) -> list[Path]:
    """Three seeds each of scratch and of a run that saves a little, all of them slightly apart."""
    runs = []
    for number in range(3):
        seed = ("seed = 7", f"seed = {number}")
        apart = 1 + 0.02 * number
        runs.append(
            written_run(
                tmp_path / f"scratch-{number}", *SCRATCH, NAME, seed, ratio=apart
            )
        )
        runs.append(written_run(tmp_path / f"tiny-{number}", seed, ratio=1.5 * apart))
    return sorted(runs)


def test_three_seeds_have_intervals_and_a_noise_floor(seeds: list[Path]) -> None:
    comparison = compare(seeds)
    text = render(comparison)
    assert (
        "tiny (G_stack, 2 growths, 3 seeds) against scratch (from scratch, 3 seeds)"
        in text
    )
    assert "95%: by the spread between seeds (Welch, Student's t)" in text
    assert " 3 vs 3\n" in text
    assert (
        "noise floor: one seed of scratch over another of the same (3 seeds, all pairs) shows -"
        in text
    )
    assert outcome(comparison, comparison.curves[1]).endswith(
        "; 5 of 5 95% intervals exclude 0."
    )
    middle = comparison.speed_ups["tiny"][2]
    assert middle.in_flops == pytest.approx(0.5, abs=0.01)
    assert middle.interval
    low, high = middle.interval
    # .02 apart: t(4) * .02 * sqrt(2 / 3) = .045 of log FLOPs to either side.
    assert low == pytest.approx(1.5 / 1.045 - 1, abs=0.02)
    assert high == pytest.approx(1.5 * 1.045 - 1, abs=0.02)
    json.dumps(as_dict(comparison))


def test_a_difference_within_the_spread_between_seeds_is_said_to_be_none(
    tmp_path: Path,
) -> None:
    runs = []
    for number in range(3):
        seed = ("seed = 7", f"seed = {number}")
        runs.append(
            written_run(
                tmp_path / f"scratch-{number}",
                *SCRATCH,
                NAME,
                seed,
                ratio=1 + 0.1 * number,
            )
        )
        runs.append(
            written_run(tmp_path / f"tiny-{number}", seed, ratio=1.05 + 0.1 * number)
        )
    comparison = compare(sorted(runs))
    sentence = outcome(comparison, comparison.curves[1])
    assert (
        ": no difference beyond the spread between seeds: speed-up in FLOPs +"
        in sentence
    )
    assert "; 0 of 5 95% intervals exclude 0." in sentence


def test_every_difference_of_the_recipes_is_listed(runs: list[Path]) -> None:
    lines = render(compare(runs)).splitlines()
    assert "  base.n_layers: - -> 2" in lines
    assert "  growth[1].timing: - -> 40 steps" in lines
    assert not [
        line for line in lines if line.startswith(("  name", "  seed", "  train."))
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("vocab_size = 256", "vocab_size = 512"), "vocabulary: 256 -> 512"),
        (("seq_len = 64", "seq_len = 128"), "sequence length: 64 -> 128"),
        (
            ("[train]", "[validation]\nsequences = 3\n\n[train]"),
            "validation sequences: 64, first -> 3, first",
        ),
    ],
)
def test_runs_whose_losses_are_of_different_things_are_refused(
    runs: list[Path], tmp_path: Path, change: tuple[str, str], reason: str
) -> None:
    other = written_run(tmp_path / "c", change, ('name = "tiny"', 'name = "other"'))
    with pytest.raises(
        ChangedError,
        match=rf"cannot be compared: {reason}\. Their losses are of different things",
    ):
        compare([runs[0], other])
    text = render(compare([runs[0], other], force=True))
    assert f"  NOT COMPARABLE  {reason}" in text.splitlines()


@pytest.mark.parametrize(
    ("key", "name"),
    [("tokenizer_sha256", "tokenizer"), ("validation_hash", "validation data")],
)
def test_runs_on_another_tokenizer_or_held_out_text_are_refused(
    runs: list[Path], key: str, name: str
) -> None:
    for run, value in zip(runs, ("1" * 64, "2" * 64), strict=True):
        RunFolder(run).provenance_file.write_text(json.dumps({"data": {key: value}}))
    with pytest.raises(
        ChangedError, match=f"{name}: SHA-256 111111111111 -> SHA-256 222222222222"
    ):
        compare(runs)
    RunFolder(runs[1]).provenance_file.unlink()
    compare(runs)  # nothing is known against it


def test_other_training_data_are_a_difference(runs: list[Path]) -> None:
    for run, value in zip(runs, ("1" * 64, "2" * 64), strict=True):
        RunFolder(run).provenance_file.write_text(
            json.dumps({"data": {"manifest_hash": value}})
        )
    assert (
        "  training data: SHA-256 111111111111 -> SHA-256 222222222222"
        in render(compare(runs)).splitlines()
    )


def test_plain_values_are_exact_and_json(runs: list[Path]) -> None:
    low, high = sorted(compare(runs).speed_ups["tiny"], key=lambda s: s.loss)[:2]
    wanted = (low.loss + high.loss) / 2
    found = json.loads(json.dumps(as_dict(compare(runs, losses=[wanted, 0.5]))))
    [speed_up] = found["speed_ups"]["tiny"]
    assert speed_up["loss"] == wanted
    assert (
        speed_up["speed_up_flops"] == speed_up["baseline_flops"] / speed_up["flops"] - 1
    )
    assert speed_up["speed_up_flops"] == pytest.approx(0.5, abs=0.005)
    assert found["baseline"] == "scratch"
    assert found["verdicts"]["tiny"].startswith("at ")
    assert found["verdicts"]["tiny"].endswith("; not reached by both: loss 0.5")


def test_validation_loss_is_not_smoothed(runs: list[Path]) -> None:
    comparison = compare(runs, loss="validation")
    target = comparison.curves[1].target
    [seed] = target.seeds
    assert (seed.smooth == seed.loss).all()
    assert "validation loss, the mean of the seeds, not smoothed" in render(comparison)


def test_a_run_that_has_not_come_to_its_target_model_has_no_speed_up(
    runs: list[Path],
) -> None:
    shutil.rmtree(sorted(runs[1].glob("stage-*"))[-1])
    for order in (runs, runs[::-1]):
        comparison = compare(order)
        text = render(comparison)
        assert "no speed-up: tiny has not come to its target model" in text
        assert not comparison.speed_ups
        json.dumps(as_dict(comparison))
    with pytest.raises(DamagedError, match="has not come to its target model"):
        read_run(runs[1], "timing")


def test_runs_that_wrote_down_no_speed_are_compared_by_their_losses(
    runs: list[Path],
) -> None:
    expected = render(compare(runs))
    for run in runs:
        without_speed(run)
    assert render(compare(runs)) == expected


def test_two_records_are_no_curve(runs: list[Path]) -> None:
    validation = RunFolder(runs[1]).stages()[-1].validation_file
    lines = validation.read_text(encoding="utf-8").splitlines(keepends=True)
    validation.write_text("".join([lines[0], lines[-1]]), encoding="utf-8")
    comparison = compare(runs, loss="validation")
    text = render(comparison)
    assert (
        "no speed-up: tiny has 2 records of its target model, and a curve takes 5; lower validation.interval"
        in " ".join(text.split())
    )
    assert not comparison.speed_ups
    assert compare(runs).speed_ups, "there are enough of the training loss"


def test_curves_that_never_meet_are_told_with_their_spans(
    runs: list[Path], tmp_path: Path
) -> None:
    better = written_run(tmp_path / "c", (NAME[0], 'name = "better"'), floor=0.2)
    text = render(compare([runs[0], better]))
    assert "the curves never meet, so there is no speed-up: scratch from " in text
    assert re.search(r"at [0-9.e+]+ FLOPs each: loss [0-9.]+ against [0-9.]+", text)
    assert "95%" not in text


def test_benchmarks_are_those_of_the_last_checkpoint(runs: list[Path]) -> None:
    run = RunFolder(runs[1])
    for step, accuracy in ((20, 0.25), (60, 0.5)):
        sciq = {"acc": 0.1, "acc_norm": accuracy, "acc_norm_stderr": 0.05}
        tasks = {"sciq": sciq, "wikitext": {"word_perplexity": 30.0}}
        record = {
            "stage": "s",
            "step": step,
            "tokens": 1024 * step,
            "tasks": tasks,
            "seven_task_mean": None,
        }
        write_evaluation(run.eval_file(f"s-step-{step}"), record)
    comparison = compare(runs)
    scores = {
        "sciq acc_norm": Score(0.5, 0.05),
        "wikitext word_perplexity": Score(30.0),
    }
    assert comparison.evaluations == {runs[1].name: scores}
    assert "sciq acc_norm" in render(comparison)
    assert as_dict(comparison)["evaluations"][runs[1].name]["sciq acc_norm"] == {
        "value": 0.5,
        "standard_error": 0.05,
    }


def test_the_papers_other_means_are_shown_where_a_record_has_them(
    runs: list[Path],
) -> None:
    run = RunFolder(runs[1])
    record = {"stage": "s", "step": 60, "tokens": 61440, "tasks": {}}
    record |= {"seven_task_mean": None, "ten_task_mean": 0.5, "table_6_mean": 0.25}
    write_evaluation(run.eval_file("s-step-60"), record | {"table_7_mean": 0.125})
    assert compare(runs).evaluations[runs[1].name] == {
        "mean of ten": Score(0.5),
        "mean of Table 6": Score(0.25),
        "mean of Table 7": Score(0.125),
    }


@pytest.mark.parametrize(
    "record",
    [5, {"tasks": 5}, {"tokens": 1, "step": 1, "tasks": {"sciq": {"acc": "high"}}}],
)
def test_results_that_are_none_are_named(runs: list[Path], record: object) -> None:
    run = RunFolder(runs[1])
    run.eval.mkdir()
    run.eval_file("s").write_text(json.dumps(record))
    with pytest.raises(
        DamagedError,
        match=r"s\.json (holds no results of benchmarks|is damaged: not a JSON object); restore it or",
    ):
        compare(runs)


def test_benchmarks_stand_beside_their_errors_and_what_guessing_gives() -> None:
    rows = benchmark_rows(
        {
            "x": {"mean of seven": Score(0.5)},
            "y": {"sciq acc_norm": Score(0.25, 0.01), "own acc": Score(0.75)},
        }
    )
    assert rows == [
        ("run", "mean of seven", "sciq acc_norm", "own acc"),
        ("x", "0.5000", "-", "-"),
        ("y", "-", "0.2500 ± 0.0100", "0.7500"),
        ("chance", "0.2857", "0.2500", "-"),
    ]
    assert len(benchmark_rows({"y": {"own acc": Score(0.75)}})) == 2


def sealed(run: Path) -> RunFolder:
    """The run with a last checkpoint of each train stage, whose seal states the records."""
    folder = RunFolder(run)
    for stage in folder.stages():
        if not stage.metrics_file.is_file():
            continue
        (stage.checkpoint(1)).mkdir(parents=True)
        records = {}
        for file in (stage.metrics_file, stage.validation_file):
            records[file.name] = {
                "bytes": file.stat().st_size,
                "sha256": seal.sha256(file),
            }
        seal.seal(stage.checkpoint(1), {}, {"step": 1, "records": records})
    return folder


def test_records_that_are_as_they_were_sealed_are_not_spoken_of(
    runs: list[Path],
) -> None:
    sealed(runs[1])
    comparison = compare(runs)
    assert comparison.edited == []
    assert "NOT AS SEALED" not in render(comparison)


@pytest.mark.parametrize("change", ["edited", "cut", "added to", "missing"])
def test_records_that_are_not_as_they_were_sealed_are_told_above_the_table(
    runs: list[Path], change: str
) -> None:
    stage = sealed(runs[1]).stages()[-1]
    file = stage.metrics_file
    text = file.read_text()
    if change == "edited":
        file.write_text(text.replace('"loss": 2.', '"loss": 1.'))
        expected = "is not what step-1 was sealed with: edited, or cut"
    elif change == "cut":
        file.write_text(text[: text.rindex("{")])
        expected = "is not what step-1 was sealed with: edited, or cut"
    elif change == "added to":
        file.write_text(text + text.splitlines()[-1] + "\n")
        expected = "was added to after step-1 was sealed, the stage's last"
    else:
        file = stage.validation_file
        file.unlink()
        expected = "is missing, which step-1 was sealed with"
    line = f"b: {stage.name}/{file.name} {expected}"
    comparison = compare(runs)
    assert render(comparison).splitlines()[0] == f"NOT AS SEALED  {line}"
    assert as_dict(comparison)["not_as_sealed"] == [line]


def test_a_run_that_was_stopped_has_records_beyond_its_newest_seal(
    runs: list[Path],
) -> None:
    stage = sealed(runs[1]).stages()[-1]
    with stage.metrics_file.open("a") as file:
        file.write(stage.metrics_file.read_text().splitlines()[-1] + "\n")
    stage.done_file.unlink()
    assert compare(runs).edited == []


def test_the_page_tells_of_edited_records_too(runs: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from stackgrow.report.html import write_report

    stage = sealed(runs[1]).stages()[-1]
    stage.metrics_file.write_text(
        stage.metrics_file.read_text().replace('"loss": 2.', '"loss": 1.')
    )
    for shown in (runs, runs[1:]):
        write_report(shown, tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text()
        assert "is not what step-1 was sealed with: edited, or cut" in page


def points_outside(comparison: Comparison) -> tuple[int, int]:
    """Of the smoothed curves over FLOPs: how many points lie outside of the axes, and how many there are."""
    from stackgrow.report.figure import draw_over_flops, new_figure

    figure = new_figure(4, 3)
    draw_over_flops(figure, comparison)
    axes = figure.axes[0]
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    outside = total = 0
    for curve in comparison.curves:
        for stage in curve.stages:
            inside = (left <= stage.flops) & (stage.flops <= right)
            inside &= (low <= stage.smooth) & (stage.smooth <= high)
            outside += int((~inside).sum())
            total += len(inside)
    return outside, total


def test_every_point_is_shown_where_there_are_few(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = written_run(tmp_path / "run")
    for stage in RunFolder(run).stages():
        if stage.validation_file.is_file():
            lines = stage.metrics_file.read_text().splitlines(keepends=True)
            stage.validation_file.write_text(lines[0] + lines[-1])
    comparison = compare([run], "validation")
    outside, total = points_outside(comparison)
    assert outside == 0
    assert total == 2 * len(comparison.baseline.stages)

    # A line has no dot at its ends, and of a single point is no line.
    from stackgrow.report.figure import panel_svg, panels_of

    few = panel_svg(comparison, panels_of(comparison)[0])
    many_points = compare([run])
    assert points_outside(many_points)[0] > 0, "the first fall is left out"
    many = panel_svg(many_points, panels_of(many_points)[0])
    assert few.count("<use") > many.count("<use")


def test_tool_writes_pictures_and_a_page(runs: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = [
        "--figure",
        tmp_path / "c.png",
        "--figure",
        tmp_path / "c.svg",
        "--html",
        tmp_path / "c.html",
        "--json",
    ]
    command = [sys.executable, TOOL, *runs, *options]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["speed_ups"]["tiny"]
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "c.svg").read_text()
    assert svg.startswith("<svg")
    assert svg.count('id="axes_') == 4, (
        "loss over FLOPs with the difference below it, over tokens, the speed-up"
    )
    assert "currentColor" in svg
    assert "#1b1f23" not in svg, "ink is the page's"
    assert len(svg) < 400_000
    missing = subprocess.run(
        [sys.executable, str(TOOL), "nowhere"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert missing.returncode == 65
    assert (
        missing.stderr == "compare_runs: nowhere is not a run: it has no recipe.toml\n"
    )
