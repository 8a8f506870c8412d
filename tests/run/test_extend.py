"""Which finished runs go on with a larger budget, from which checkpoint, and what the others are told."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
from recipes_for_tests import RECIPE, edited, plan_of

from stackgrow import seal
from stackgrow.errors import ChangedError, DamagedError
from stackgrow.plan.stages import Plan
from stackgrow.recipe.values import Duration
from stackgrow.recipe.write import to_toml
from stackgrow.run.changed import refuse_changed
from stackgrow.run.engine import _open_stage
from stackgrow.run.extend import announce, begin, find_extension, first_other_rate
from stackgrow.run_folder.evaluations import write_evaluation
from stackgrow.run_folder.extended import (
    Extension,
    counted_from_before,
    read_extensions,
)
from stackgrow.run_folder.folder import METRICS, RunFolder

DATA = "data hash"
LAST = "stage-4-train-8L"  # of 57 steps
WSD = ['train.schedule="wsd"', "train.decay_fraction=0.2"]  # from step 48 on
LONGER = "budget.tokens=150K"


def finished(
    folder: Path, plan: Plan, kept: Sequence[int], before: str = ""
) -> RunFolder:
    """A run whose last stage is done, with the checkpoints of the steps ``kept``; those of the steps up to an
    extension are ``before``'s, the shorter stage's."""
    run = RunFolder(folder)
    folder.mkdir(exist_ok=True)
    seal.write_text(run.recipe_file, to_toml(plan.recipe))
    seal.write_json(
        run.provenance_file, {"sessions": [], "data": {"manifest_hash": DATA}}
    )
    hashes = plan.stage_hashes(DATA)
    for stage in plan.stages:
        _open_stage(plan, stage, run.stage(stage.name), hashes[stage.name])
    last = run.stage(LAST)
    for step in kept:
        if not last.checkpoint(step).exists():
            last.checkpoint(step).mkdir(parents=True)
            (last.checkpoint(step) / "data").write_text(str(step))
            files = seal.file_records(last.checkpoint(step), ["data"])
            facts = {"stage_hash": hashes[LAST], "step": step, "records": {METRICS: {}}}
            seal.seal(last.checkpoint(step), files, facts)
    seal.write_json(last.done_file, {"stage_hash": hashes[LAST], "steps": max(kept)})
    return run


def longer(plan: Plan, run: RunFolder) -> Extension | None:
    return refuse_changed(plan, run, plan.stage_hashes(DATA))


@pytest.mark.parametrize(
    ("sets", "more", "step"),
    [
        (WSD, [], 40),  # the checkpoint of step 47 holds the rate of step 48
        (["train.min_learning_rate=1e-3"], [], 57),  # a constant rate
        (["growth[1].train.horizon=200 steps"], [], 57),
        (
            [*WSD, "growth[1].train.horizon=57 steps"],
            ["growth[1].train.horizon=107 steps"],
            40,
        ),
    ],
)
def test_the_newest_checkpoint_with_the_same_rates_is_gone_on_from(
    tmp_path: Path, sets: list[str], more: list[str], step: int
) -> None:
    short = plan_of(tmp_path, RECIPE, sets)
    run = finished(tmp_path / "run", short, kept=[20, 40, 47, 57])
    plan = plan_of(tmp_path, RECIPE, [*sets, *more, LONGER])
    extension = longer(plan, run)
    assert extension is not None
    assert (extension.steps, extension.from_step, extension.new_steps) == (
        57,
        step,
        106,
    )


def test_a_decay_ends_where_a_longer_run_has_none(tmp_path: Path) -> None:
    """47 of the 57 steps have the peak's rate: 46 is the last step whose checkpoint a longer run makes, too."""
    short = plan_of(tmp_path, RECIPE, WSD)
    rates = [short.train_stages[-1].learning_rate(step) for step in (47, 48)]
    assert rates[0] == 1e-3 > rates[1]
    run = finished(tmp_path / "run", short, kept=[45, 46, 47, 48])
    extension = longer(plan_of(tmp_path, RECIPE, [*WSD, LONGER]), run)
    assert extension is not None
    assert extension.from_step == 46


def test_the_rate_of_what_a_growth_made_new_decides_too(tmp_path: Path) -> None:
    """It falls from its 5 steps of rewarming on to the horizon's end, where all others stay at the peak."""
    sets = [
        "train.min_learning_rate=1e-3",
        "train.horizon=200 steps",
        "growth[1].lr=continue",
        "growth[1].lr_new={rewarm_steps=5, ratio=2.0}",
    ]
    stage = plan_of(tmp_path, RECIPE, sets).train_stages[-1]
    assert first_other_rate(stage, stage, most=57) is None
    train = dataclasses.replace(stage.train, horizon=Duration(300, "steps"))
    further = dataclasses.replace(stage, train=train)
    assert stage.rate_at(20) == further.rate_at(20)
    assert first_other_rate(stage, further, most=57) == 7


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        ([], r'"cosine" with horizon = "stage".*other learning rates from step 6 on.*'),
        (
            WSD,
            r'"wsd" with horizon = "stage".*from step 48 on, .* kept are of step 47, 57',
        ),
    ],
)
def test_another_schedule_is_refused_with_what_to_write_instead(
    tmp_path: Path, sets: list[str], told: str
) -> None:
    run = finished(tmp_path / "run", plan_of(tmp_path, RECIPE, sets), kept=[47, 57])
    with pytest.raises(
        ChangedError, match=told + r".*--set run\.folder=.*checkpoint\.keep"
    ):
        longer(plan_of(tmp_path, RECIPE, [*sets, LONGER]), run)


@pytest.mark.parametrize(
    "sets",
    [["budget.tokens=90K"], [LONGER, "train.weight_decay=0.2"], [LONGER, "seed=8"]],
)
def test_what_is_more_than_longer_is_another_recipe(
    tmp_path: Path, sets: list[str]
) -> None:
    run = finished(tmp_path / "run", plan_of(tmp_path, RECIPE, WSD), kept=[40, 57])
    with pytest.raises(ChangedError, match="was made by another recipe"):
        longer(plan_of(tmp_path, RECIPE, [*WSD, *sets]), run)


def test_other_data_are_not_gone_on_with(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", plan_of(tmp_path, RECIPE, WSD), kept=[40, 57])
    plan = plan_of(tmp_path, RECIPE, [*WSD, LONGER])
    with pytest.raises(ChangedError, match="the data or a stage before it"):
        refuse_changed(plan, run, plan.stage_hashes("other data"))


def test_a_run_is_finished_first(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", plan_of(tmp_path, RECIPE, WSD), kept=[40, 57])
    run.stage(LAST).done_file.unlink()
    with pytest.raises(ChangedError, match="Finish it with the budget"):
        longer(plan_of(tmp_path, RECIPE, [*WSD, LONGER]), run)


def test_a_damaged_checkpoint_is_not_gone_on_from(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", plan_of(tmp_path, RECIPE, WSD), kept=[40, 57])
    (run.stage(LAST).checkpoint(40) / "data").write_text("41")
    with pytest.raises(DamagedError, match=r"step-40, which .* is damaged: data is"):
        longer(plan_of(tmp_path, RECIPE, [*WSD, LONGER]), run)


def test_benchmark_results_of_weights_that_are_made_anew_are_put_aside(
    tmp_path: Path,
) -> None:
    run = finished(tmp_path / "run", plan_of(tmp_path, RECIPE, WSD), kept=[40, 57])
    for name, step in ((LAST, 40), (LAST, 57), ("stage-0-train-2L", 57)):
        file = run.eval_file(f"{name}-step-{step}")
        write_evaluation(file, {"stage": name, "step": step})
    plan = plan_of(tmp_path, RECIPE, [*WSD, LONGER])
    extension = longer(plan, run)
    assert extension is not None
    announce(plan, run, extension)
    begin(plan, run, extension)
    names = [file.stem for file in run.eval_files()]
    assert names == ["stage-0-train-2L-step-57", f"{LAST}-step-40"]
    ended = run.stage(LAST).ended_at(57)
    assert [file.stem for file in ended.results.iterdir()] == [f"{LAST}-step-57"]


@pytest.mark.parametrize(("timing", "steps"), [("20%", 20), ("12.3%", 12)])
def test_a_timing_that_follows_from_the_budget_is_told_as_what_it_was(
    tmp_path: Path, timing: str, steps: int
) -> None:
    text = edited(('timing = "20K"', f'timing = "{timing}"'))
    run = finished(tmp_path / "run", plan_of(tmp_path, text, WSD), kept=[40, 57])
    told = f'growth[0].timing = "{steps * 1024} tokens"'
    with pytest.raises(ChangedError) as caught:
        longer(plan_of(tmp_path, text, [*WSD, LONGER]), run)
    assert told in str(caught.value)
    fixed = edited(('timing = "20K"', told.removeprefix("growth[0].")))
    assert longer(plan_of(tmp_path, fixed, [*WSD, LONGER]), run)


def test_a_run_goes_on_longer_twice_and_may_change_its_mind_before(
    tmp_path: Path,
) -> None:
    """A checkpoint counts up to the step that was gone on from, whichever shorter stage made it."""
    sets = ["train.min_learning_rate=1e-3"]
    budgets = ["100K", "110K", "150K", "200K"]
    plans = [plan_of(tmp_path, RECIPE, [*sets, f"budget.tokens={b}"]) for b in budgets]
    run = finished(tmp_path / "run", plans[0], kept=[40, 57])
    for plan, kept in ((plans[1], []), (plans[2], [80, 106]), (plans[3], [155])):
        extension = longer(plan, run)
        assert extension is not None
        announce(plan, run, extension)
        if kept:  # else the next budget comes before anything of this has begun
            begin(plan, run, extension)
            assert find_extension(plan, run, plan.stage_hashes(DATA)[LAST]) == extension
            finished(run.path, plan, kept)
    hashes = [plan.stage_hashes(DATA)[LAST] for plan in plans]
    folder = run.stage(LAST)
    assert counted_from_before(folder, hashes[3]) == {hashes[2]: 106, hashes[0]: 57}
    assert [entry.steps for entry in read_extensions(folder)] == [57, 106]
    assert folder.ended_at(57).checkpoint(57).is_dir()
    assert folder.sealed_steps() == [40, 57, 80, 106, 155]
