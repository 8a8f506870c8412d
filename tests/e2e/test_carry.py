"""What a growth carries over: AdamW's state, the schedule of the learning rate, and frozen layers, in real runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from launch import Workplace, assert_audited, losses, records, weights

from stackgrow import seal
from stackgrow.plan.resolve import make_plan
from stackgrow.recipe.load import load_recipe
from stackgrow.run_folder.folder import RunFolder

# 1 -> 2 layers under FSDP, then 2 -> 4 under tensor parallel; each freezes what it grew from for a while, and the last
# gives what is new a rate of its own.
SETS = [
    "budget.tokens=28Ki", "base.n_layers=1", "train.horizon=40 steps", "checkpoint.keep=9",
    "growth=[{operator='stack', factor=2, timing='8 steps', optimizer='asymmetric', freeze='6 steps',"
    " lr={rewarm_steps=4, ratio=0.1}}, {operator='stack', factor=2, timing='18 steps', optimizer='copy',"
    " freeze='4Ki', lr='continue', lr_new={rewarm_steps=2, ratio=1.5}, parallel={tensor=2}}]",
]  # fmt: skip
FSDP, TENSOR = "stage-2-train-2L", "stage-4-train-4L"


def moments(checkpoint: Path) -> dict[str, str]:
    manifest = seal.read_seal(checkpoint)
    assert manifest is not None
    return manifest["moments"]


def test_a_growth_that_changes_nothing_is_not_felt(
    workplace: Workplace, tmp_path: Path
) -> None:
    """Each layer copied to its place: weights, moments, step counters, rates and data go on, bit for bit."""
    text = (workplace.folder / "tiny.toml").read_text()
    (workplace.folder / "whole.toml").write_text(
        text[: text.index("[base]")] + text[text.index("[train]") :]
    )
    common = ["budget.tokens=28Ki", "train.horizon=40 steps"]
    grows = [
        "base.n_layers=4",
        "growth[0].layer_map=[0,1,2,3]",
        "growth[0].optimizer=copy",
        "growth[0].lr=continue",
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    workplace.run(*common, f"run.folder={one}", recipe="whole.toml")
    workplace.run(*common, *grows, f"run.folder={two}")
    whole, grown = losses(one), losses(two)
    assert len(grown) == 28
    for (stage, step), loss in grown.items():
        assert (
            loss == whole["stage-0-train-4L", step + 20 * (stage == "stage-2-train-4L")]
        )
    ends = (
        RunFolder(one).stage("stage-0-train-4L").checkpoint(28),
        RunFolder(two).stage("stage-2-train-4L").checkpoint(8),
    )
    assert weights(ends[0]) == weights(ends[1])
    assert moments(ends[0]) == moments(ends[1])


@pytest.fixture(scope="module")
def undisturbed(workplace: Workplace) -> Path:
    workplace.run(*SETS, "run.folder=carry", warm_ranks=2)
    return workplace.folder / "carry"


@pytest.mark.parametrize(
    ("stage", "grow", "layers"),
    [(FSDP, "stage-1-grow", 1), (TENSOR, "stage-3-grow", 2)],
)
def test_frozen_layers_keep_every_bit(
    undisturbed: Path, stage: str, grow: str, layers: int
) -> None:
    """With weight decay at 0.1, and moments that growth let them keep."""
    assert_audited(undisturbed)
    grown, at = (
        RunFolder(undisturbed).stage(grow).checkpoints,
        RunFolder(undisturbed).stage(stage),
    )
    below = ("tok_embeddings.", *(f"layers.{i}." for i in range(layers)))
    frozen = {name for name in weights(grown) if name.startswith(below)}
    assert {
        n for n, mark in weights(at.checkpoint(4)).items() if mark == weights(grown)[n]
    } == frozen
    assert not {
        n
        for n, mark in weights(at.checkpoint(8)).items()
        if mark == weights(at.checkpoint(4))[n]
    }
    same = {
        n for n, mark in moments(at.checkpoint(4)).items() if mark == moments(grown)[n]
    }
    assert same == {
        n
        for n in moments(grown)
        if n.removeprefix("optimizer.state.").startswith(below)
    }


def test_rates_and_flops_are_the_plans(undisturbed: Path) -> None:
    for stage in make_plan(
        load_recipe(RunFolder(undisturbed).recipe_file, trusted=True)
    ).train_stages:
        for step in range(1, stage.steps + 1):
            record = records(undisturbed)[stage.name, step]
            assert record["lr"] == pytest.approx(stage.learning_rate(step), rel=1e-12)
            assert record.get("lr_new") == (
                stage.new_learning_rate(step) if stage.new_rate else None
            )
            assert record["flops"] == stage.start_flops + stage.flops_after(step)


def test_frozen_stages_resume_after_kills(
    workplace: Workplace, undisturbed: Path, tmp_path: Path
) -> None:
    """Killed while layers are frozen, resumed at step 4, through the switch after step 6 and the growth after it."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run, ignore=shutil.ignore_patterns("stage-[234]*"))
    workplace.kill_at("train.step 6", *SETS, f"run.folder={run}", warm_ranks=2)
    workplace.run(*SETS, f"run.folder={run}", warm_ranks=2)
    assert losses(run) == losses(undisturbed)
    for stage in (FSDP, TENSOR):
        last, expected = (
            RunFolder(folder).stage(stage).checkpoint(10)
            for folder in (run, undisturbed)
        )
        assert weights(last) == weights(expected)
        assert moments(last) == moments(expected)
