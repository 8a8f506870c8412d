"""When to grow: the forms of a timing, a guideline of one's own, and growth that the loss decides."""

import re
from pathlib import Path
from textwrap import dedent

import pytest
from recipes_for_tests import RECIPE, edited, plan_of, problems_of

from stackgrow.plan import guidelines
from stackgrow.plan.resolve import make_plan
from stackgrow.plan.stages import ImportStage
from stackgrow.recipe.write import to_toml
from stackgrow.run_folder.folder import FOUND, RunFolder, StageFolder
from stackgrow.run_folder.found import plan_of_run, with_found, write_found

SLOPE = "growth[0].timing={loss_slope=5, min='10K', max='20%'}"
OWN = "guideline={a=0.5,b=0.0,c=1.9,source='my sweep',max_parameters=1e5}"


def test_a_share_of_the_budget(tmp_path: Path) -> None:
    assert (
        plan_of(tmp_path, RECIPE, ["growth[0].timing=12.5%"]).train_stages[0].steps
        == 12
    )  # 12.5K / 1024
    assert (
        plan_of(tmp_path, RECIPE, ["growth[0].timing=12.50 %"])
        .recipe.growth[0]
        .timing.percent
        == 12.5
    )  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "share", ["0%", "100%", "0.1", "5 percent", "%", "5%%", "1e1%", "-5%"]
)
def test_what_is_no_share(tmp_path: Path, share: str) -> None:
    problems = problems_of(tmp_path, edited(('timing = "20K"', f'timing = "{share}"')))
    assert '"5%" (of budget.tokens)' in problems["growth[0].timing"]


def test_factor_auto_is_the_papers(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, RECIPE, ["growth[0].factor=auto", "model.n_layers=16"])
    assert [s.model.n_layers for s in plan.train_stages] == [2, 8, 16]
    assert any(
        "growth[0].factor: 4, which the paper uses throughout" in note
        for note in plan.notes
    )


def test_a_factor_beyond_the_papers_best_is_told(tmp_path: Path) -> None:
    notes = plan_of(tmp_path, RECIPE, ["growth[0].factor=8", "model.n_layers=32"]).notes
    assert any(
        "growth[0].factor: 8 is beyond the best of the paper, 2 to 4" in note
        for note in notes
    )
    assert not any("growth[1].factor" in note for note in notes)


def test_a_guideline_of_ones_own(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, RECIPE, ["growth[1].timing=auto", OWN])
    n = plan.recipe.model.non_embedding_parameters()
    d = guidelines.growth_timing(n, 6 * n * 100_000, (0.5, 0.0, 1.9))
    assert d == pytest.approx(10**1.9 * n**0.5)
    assert plan.train_stages[2].start_tokens == pytest.approx(d, abs=512)
    (note,) = (note for note in plan.notes if "growth[1].timing" in note)
    assert "my sweep" in note
    assert "extrapolated: fitted up to 100K" in note
    fixed, unused = (
        plan_of(tmp_path, RECIPE, ["growth[1].timing=30K", *more])
        for more in ([], [OWN])
    )
    assert fixed.stage_hashes("x") == unused.stage_hashes("x"), (
        "it enters by what it leads to"
    )


def test_bounds_are_shown_beforehand(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, RECIPE, [SLOPE])
    base = plan.train_stages[0]
    assert base.until is not None
    assert (
        base.until.min_steps,
        base.until.max_steps,
        base.steps,
        base.until.window,
    ) == (10, 20, 20, 5)
    (note,) = (note for note in plan.notes if "growth[0].timing" in note)
    assert "after 10.2K to 20.5K tokens, step 10 to 20 of stage-0-train-2L" in note
    assert "less than 5 per billion tokens (a line over 5 steps)" in note
    early = plan_of(tmp_path, RECIPE, ["growth[0].timing=10K"]).flops
    assert f"{early:.3g} to {plan.flops:.3g} FLOPs" in note


def test_what_a_stage_found_settles_the_later_ones(tmp_path: Path) -> None:
    plan, run = plan_of(tmp_path, RECIPE, [SLOPE]), tmp_path / "run"
    before = plan.stage_hashes("data")
    base, grow, middle, grow_2, last = plan.stages
    (run / base.name).mkdir(parents=True)
    write_found(StageFolder(run / base.name), before[base.name], 13)
    settled = with_found(plan, RunFolder(run), "data")
    assert [s.steps for s in settled.train_stages] == [13, 27, 57]
    assert settled.train_stages[0].horizon_steps == 20, (
        "the schedule is that of the latest growth"
    )
    after = settled.stage_hashes("data")
    assert after[base.name] == before[base.name], "its own checkpoints remain its own"
    assert all(after[s.name] != before[s.name] for s in (grow, middle, grow_2, last))
    assert settled.tokens <= plan.recipe.budget.tokens < settled.tokens + 1024
    RunFolder(run).recipe_file.write_text(to_toml(plan.recipe), encoding="utf-8")
    RunFolder(run).provenance_file.write_text(
        '{"data": {"manifest_hash": "data"}}', encoding="utf-8"
    )
    assert plan_of_run(run).stages == settled.stages


def test_what_another_recipe_found_does_not_count(tmp_path: Path) -> None:
    plan, run = plan_of(tmp_path, RECIPE, [SLOPE]), tmp_path / "run"
    (run / "stage-0-train-2L").mkdir(parents=True)
    write_found(StageFolder(run / "stage-0-train-2L"), "another stage's hash", 13)
    assert (run / "stage-0-train-2L" / FOUND).exists()
    assert with_found(plan, RunFolder(run), "data") is plan


def test_slope_of_a_straight_line(tmp_path: Path) -> None:
    stage = plan_of(tmp_path, RECIPE, [SLOPE]).train_stages[0]
    until = stage.until
    assert until is not None
    losses = {step: 9 - 7 * step * 1024 / 1e9 for step in range(3, 13)} | {
        2: 1.0,
        13: 1.0,
    }
    assert until.fall(losses, stage.batches, 12) == pytest.approx(
        7
    )  # per billion tokens; outside of the window nothing counts
    assert until.fall({12: 3.0}, stage.batches, 12) == float("inf"), (
        "one loss has no slope"
    )


def test_a_base_from_elsewhere(tmp_path: Path) -> None:
    sets = ["base.from=models/llama", "base.position=5", "growth[0].timing=start"]
    plan = plan_of(tmp_path, RECIPE, sets)
    assert [s.name for s in plan.stages[:3]] == [
        "stage-0-import-2L",
        "stage-1-grow",
        "stage-2-train-4L",
    ]
    assert isinstance(plan.stages[0], ImportStage)
    first = plan.train_stages[0]
    assert (first.start_tokens, first.start_sequences, first.steps) == (0, 5, 40)
    assert plan.tokens == 97 * 1024, "the budget is what this run trains"
    trained = plan_of(tmp_path, RECIPE, sets[:2])
    assert [s.name for s in trained.stages[:3]] == [
        "stage-0-import-2L",
        "stage-1-train-2L",
        "stage-2-grow",
    ]
    with_weights = make_plan(
        trained.recipe, found={"stage-0-import-2L": "weights"}
    ).stage_hashes("data")
    changed = [
        name
        for name, value in trained.stage_hashes("data").items()
        if with_weights[name] != value
    ]
    assert changed == [s.name for s in trained.stages[1:]], (
        "the weights define all that follows"
    )


def test_a_base_outside_the_working_directory_is_named_on_the_command_line(
    tmp_path: Path,
) -> None:
    text = edited(("[base]\n", '[base]\nfrom = "/models/llama"\n'))
    assert "--set base.from=" in problems_of(tmp_path, text)["base.from"]


def test_the_examples_of_the_readme(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "recipes" / "REFERENCE.md").read_text(
        encoding="utf-8"
    )
    blocks = [
        dedent(block)
        for block in re.findall(r"(?:^ {4}.+\n|^\n(?= {4}))+", readme, re.MULTILINE)
    ]
    (slope,) = (b for b in blocks if b.lstrip().startswith("timing = {"))
    (own,) = (b for b in blocks if b.lstrip().startswith("[guideline]"))
    (base,) = (b for b in blocks if b.lstrip().startswith("[base]"))
    start, end = RECIPE.index("[base]"), RECIPE.index("[train]")
    grown = RECIPE[:start] + base + own + RECIPE[end:]
    plan = plan_of(tmp_path, grown, ["model.n_layers=44"])
    assert [s.name for s in plan.stages] == [
        "stage-0-import-22L",
        "stage-1-grow",
        "stage-2-train-44L",
    ]
    assert plan.recipe.guideline is not None
    fit = (plan.recipe.guideline.a, plan.recipe.guideline.b, plan.recipe.guideline.c)
    assert fit == guidelines.TIMING
    tokens = ["budget.tokens=750B", "train.global_batch_tokens=1Mi"]
    waits = plan_of(
        tmp_path,
        edited(
            ('timing = "20K"', slope.strip()), ('timing = "40 steps"', 'timing = "20B"')
        ),
        tokens,
    )
    assert waits.train_stages[0].until is not None
    assert waits.train_stages[0].start_tokens + waits.train_stages[
        0
    ].tokens == pytest.approx(15e9, rel=1e-4)


def test_a_warm_up_of_more_than_a_fifth_of_its_stage_is_noted(tmp_path: Path) -> None:
    a_fifth = plan_of(tmp_path, RECIPE, ["base.train.warmup=4 steps"])
    assert a_fifth.train_stages[0].steps == 20
    assert not any("warm-up" in note for note in a_fifth.notes)
    longer = plan_of(tmp_path, RECIPE, ["base.train.warmup=5 steps"])
    (note,) = (note for note in longer.notes if "warm-up" in note)
    assert note.startswith("stage-0-train-2L: its warm-up takes 5 of its 20 steps, 25%")


def test_the_guideline_s_n_is_named(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, RECIPE, ["growth[1].timing=auto", OWN])
    (note,) = (note for note in plan.notes if "growth[1].timing" in note)
    assert "without embedding and head, C = 6 N D" in note


def test_a_base_may_grow_as_it_is_initialised(tmp_path: Path) -> None:
    for zero in ("0B", "0 steps"):
        made = plan_of(tmp_path, edited(('timing = "20K"', f'timing = "{zero}"')))
        assert made.train_stages[0].steps == 0
        assert made.train_stages[1].start_sequences == 0
        assert any(
            "growth[0].timing: 0, the base grows as" in note for note in made.notes
        )
    problems = problems_of(tmp_path, edited(('timing = "40 steps"', 'timing = "0B"')))
    assert "is not at least one step" in problems["growth[1].timing"]
