"""What a growth carries over: AdamW's state, the schedule of the learning rate, and frozen layers, in real runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from launch import Workplace, losses, records, steps_logged, weights

from stackgrow import seal
from stackgrow.load import load_recipe
from stackgrow.resolve import make_plan

TARGET = "stage-2-train-4L"
SETS = [
    "budget.tokens=32Ki", "train.horizon=40 steps", "checkpoint.keep=9", "growth[0].optimizer=asymmetric",
    "growth[0].lr={rewarm_steps=4, ratio=0.1}", "growth[0].freeze=6 steps",
]  # fmt: skip


def moments(checkpoint: Path) -> dict[str, str]:
    manifest = seal.read_seal(checkpoint)
    assert manifest is not None
    return manifest["moments"]


def test_a_growth_that_changes_nothing_is_not_felt(workplace: Workplace, tmp_path: Path) -> None:
    """Each layer copied to its place: weights, moments, step counters, rates and data go on, bit for bit."""
    common = ["budget.tokens=28Ki", "train.horizon=40 steps"]
    one, two = tmp_path / "one", tmp_path / "two"
    workplace.run(*common, "base.n_layers=4", "growth[0].layer_map=[0,1,2,3]", "growth[0].optimizer=copy",
                  "growth[0].lr=continue", f"run.folder={two}")  # fmt: skip
    text = (workplace.folder / "tiny.toml").read_text()
    (workplace.folder / "whole.toml").write_text(text[: text.index("[base]")] + text[text.index("[train]") :])
    workplace.run(*common, f"run.folder={one}", recipe="whole.toml")
    whole = {step: loss for (_, step), loss in losses(one).items()}
    grown = losses(two)
    assert [grown["stage-0-train-4L", step] for step in range(1, 21)] == [whole[step] for step in range(1, 21)]
    assert [grown[TARGET, step] for step in range(1, 9)] == [whole[step] for step in range(21, 29)]
    ends = one / "stage-0-train-4L" / "checkpoint" / "step-28", two / TARGET / "checkpoint" / "step-8"
    assert weights(ends[0]) == weights(ends[1])
    assert moments(ends[0]) == moments(ends[1])


@pytest.fixture(scope="module")
def undisturbed(workplace: Workplace) -> Path:
    workplace.run(*SETS, "run.folder=carry", ranks=2)
    return workplace.folder / "carry"


def up_to_the_growth(run: Path, copy: Path) -> Path:
    """A run folder in which the target stage has not begun."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns(TARGET))
    return copy


def test_frozen_layers_keep_every_bit(undisturbed: Path) -> None:
    """With weight decay at 0.1, and moments that asymmetric growth let them keep."""
    grown = undisturbed / "stage-1-grow" / "checkpoint"
    frozen = {n for n in weights(grown) if n.startswith(("tok_embeddings.", "layers.0.", "layers.1."))}
    at = undisturbed / TARGET / "checkpoint"
    before, after = at / "step-4", at / "step-12"
    assert {n for n, mark in weights(before).items() if mark == weights(grown)[n]} == frozen
    assert not {n for n, mark in weights(after).items() if mark == weights(before)[n]}
    same = {n for n, mark in moments(before).items() if mark == moments(grown)[n]}
    assert same == {n for n in moments(grown) if n.removeprefix("optimizer.state.").startswith(tuple(frozen))}
    target = make_plan(load_recipe(undisturbed / "recipe.toml", trusted=True)).train_stages[1]
    rates = [r["lr"] for (stage, _), r in records(undisturbed).items() if stage == TARGET]
    assert rates == pytest.approx([target.learning_rate(step) for step in range(1, 13)], rel=1e-12)


def test_frozen_stage_resumes_after_kills(workplace: Workplace, undisturbed: Path, tmp_path: Path) -> None:
    """Killed while layers are frozen; resumed at step 4 it goes through the switch after step 6."""
    run = up_to_the_growth(undisturbed, tmp_path / "run")
    workplace.kill_when(lambda: steps_logged(run, TARGET) >= 5, *SETS, f"run.folder={run}", ranks=2)
    workplace.run(*SETS, f"run.folder={run}", "validation.sequences=0", ranks=2)
    assert losses(run) == losses(undisturbed)
    last = Path(TARGET) / "checkpoint" / "step-12"
    assert weights(run / last) == weights(undisturbed / last)
    assert moments(run / last) == moments(undisturbed / last)


def test_frozen_stage_under_tensor_parallel(workplace: Workplace, undisturbed: Path, tmp_path: Path) -> None:
    run = up_to_the_growth(undisturbed, tmp_path / "run")
    workplace.run(*SETS, f"run.folder={run}", "parallel.tensor=2", "validation.sequences=0", ranks=2)
    expected, found = losses(undisturbed), losses(run)
    assert max(abs(found[k] / expected[k] - 1) for k in expected) < 2e-6  # as in test_parallel.py
    grown, before = weights(run / "stage-1-grow" / "checkpoint"), weights(run / TARGET / "checkpoint" / "step-4")
    assert {n for n in grown if grown[n] == before[n]} == {
        n for n in grown if n.startswith(("tok_embeddings.", "layers.0.", "layers.1."))
    }
