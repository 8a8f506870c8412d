"""The records kept in the repository: runs like any other, and what recipes/RESULTS.md says of them."""

import json
from pathlib import Path

import pytest

from stackgrow.report.compare import Comparison, compare, noise_floor
from stackgrow.run_folder.folder import RunFolder
from stackgrow.run_folder.found import plan_of_run
from stackgrow.run_folder.lines import read_records

RECIPES = Path(__file__).parents[2] / "recipes"
RESULTS = RECIPES / "experiments" / "results"
OPERATORS = {
    "stack": "G_stack",
    "zero": "G_zero",
    "random": "G_random",
    "learn": "G_learn (LiGO)",
    "learn_author": "the same, its author's rates",
    "learn_official": "the same, all maps of the official code",
}
KEPT = sorted(RESULTS.glob("ratio_8x64_*"))


def runs_of(name: str) -> list[Path]:
    return [RESULTS / f"ratio_8x64_{name}-{seed}" for seed in (1, 2, 3)]


@pytest.fixture(scope="module", params=["train", "validation"])
def comparison(request: pytest.FixtureRequest) -> Comparison:
    runs = runs_of("scratch")
    for name in OPERATORS:
        runs += runs_of(name)
    return compare(runs, request.param)


@pytest.mark.parametrize("run", KEPT, ids=lambda run: run.name)
def test_kept_records_have_their_recipe_hashes_and_what_is_known(run: Path) -> None:
    folder = RunFolder(run)
    plan = plan_of_run(run)
    assert f"{plan.recipe.name}-{plan.recipe.seed}" == run.name
    provenance = folder.provenance()
    assert len(provenance["recipe_hash"]) == 64
    assert len(folder.data_hash()) == 64
    if "sessions" not in provenance:  # of before there were any
        assert "Not known" in provenance["kept"]
    for stage in plan.train_stages:
        records = (
            folder.stage(stage.name)
            .metrics_file.read_text(encoding="utf-8")
            .splitlines()
        )
        assert json.loads(records[-1])["tokens"] == stage.start_tokens + stage.tokens


def row_of(method: str) -> str:
    text = (RECIPES / "RESULTS.md").read_text(encoding="utf-8")
    [row] = [line for line in text.splitlines() if line.startswith(f"| {method} |")]
    return row


def test_the_readme_s_table_is_what_the_records_give(comparison: Comparison) -> None:
    column = {"train": 2, "validation": 4}[comparison.loss]
    for name, method in OPERATORS.items():
        reached = comparison.speed_ups[f"ratio_8x64_{name}"]
        savings = [speed_up.in_flops for speed_up in reached]
        excluding = 0
        for speed_up in reached:
            assert speed_up.interval is not None
            excluding += speed_up.interval.excludes_0
        row = row_of(method)
        cells = [cell.strip() for cell in row.split("|")]
        assert cells[column] == f"{min(savings):+.0%} to {max(savings):+.0%}"
        assert cells[column + 1] == f"{excluding} of {len(reached)}"


def test_the_table_s_final_losses_are_those_of_the_records() -> None:
    for name, method in {"scratch": "none (scratch)", **OPERATORS}.items():
        ends = []
        for run in runs_of(name):
            records = read_records(RunFolder(run).stages()[-1].validation_file)
            ends.append(records[-1]["loss"])
        row = row_of(method)
        assert row.endswith(f"| {sum(ends) / len(ends):.3f} |")


def test_ligo_is_better_at_its_author_s_rates_as_the_readme_says() -> None:
    text = " ".join((RECIPES / "RESULTS.md").read_text(encoding="utf-8").split())
    compared = compare([*runs_of("learn"), *runs_of("learn_author")], "validation")
    savings, excluding = [], 0
    for speed_up in compared.speed_ups["ratio_8x64_learn_author"]:
        savings.append(speed_up.in_flops)
        assert speed_up.interval is not None
        excluding += speed_up.interval.excludes_0
    said = f"saves {min(savings):+.0%} to {max(savings):+.0%} by validation loss"
    assert f"{said} ({excluding} of {len(savings)} intervals exclude 0)" in text


def test_the_readme_s_noise_floor_is_what_the_records_give(
    comparison: Comparison,
) -> None:
    text = " ".join((RECIPES / "RESULTS.md").read_text(encoding="utf-8").split())
    floor = noise_floor(comparison.baseline.target)
    assert floor is not None
    loss = {"train": "training", "validation": "validation"}[comparison.loss]
    assert f"{floor.low:+.0%} to {floor.high:+.0%} by {loss} loss" in text
