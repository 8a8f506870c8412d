"""G_learn (LiGO) in a real run: its maps are trained as a stage of their own, then folded in."""

import json
from pathlib import Path

import pytest
from launch import Workplace, assert_audited, losses, records, weights

from stackgrow import seal
from stackgrow.checkpoint.dcp import places, read_metadata
from stackgrow.run_folder.folder import METRICS, VALIDATION, RunFolder

BASE, LEARN, GROW, TARGET = (
    "stage-0-train-2L",
    "stage-1-learn-4L",
    "stage-2-grow",
    "stage-3-train-4L",
)
SETS = [
    "growth[0].operator=learn",
    "growth[0].learn_steps=8 steps",
    "budget.tokens=32Ki",
]
NARROW = [
    "base.model.dim=32",
    "base.model.n_heads=2",
    "base.model.n_kv_heads=1",
    "base.model.ffn_dim=88",
    # A base of 8 steps: what is looked at comes after it.
    "growth[0].timing=8Ki",
    "budget.tokens=20Ki",
]
SUMMATION_ORDER = 2e-6  # float32, as in test_parallel.py; measured 9e-8
ROUNDING = 1e-6  # of a mean loss over 704 tokens


@pytest.fixture(scope="module")
def wide_fsdp(workplace: Workplace) -> Path:
    """Depth and width, on two FSDP ranks, undisturbed."""
    workplace.run(*SETS, *NARROW, "run.folder=learn_fsdp", warm_ranks=2)
    return workplace.folder / "learn_fsdp"


def test_learned_depth_begins_as_stacking_and_folds_what_was_trained(
    workplace: Workplace, reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    output = workplace.run(*SETS, f"run.folder={run}")
    assert "learn 2 -> 4 layers" in output
    validation, metrics = losses(run, VALIDATION), records(run)
    stacked = losses(reference, VALIDATION)["stage-2-train-4L", 0]
    assert validation[LEARN, 0] == stacked, "untrained maps are G_stack"
    assert validation[LEARN, 8] < validation[LEARN, 0]
    assert abs(validation[TARGET, 0] / validation[LEARN, 8] - 1) < ROUNDING, (
        "folded is what was trained"
    )
    assert validation[TARGET, 4] < validation[TARGET, 0]
    assert [r["position"] for r in metrics.values()] == [
        16 * i for i in range(1, 33)
    ], "no token twice, none skipped"
    flops = [r["flops"] for r in metrics.values()]
    ledger = json.loads(RunFolder(run).ledger_file.read_text())
    assert ledger["total"]["flops"] == pytest.approx(flops[-1])
    assert ledger["total"]["tokens"] == 32 * 1024
    # The maps cost more than 6 N D of the target: here the mixing of nine weight types, once per step.
    step, target_step = flops[21] - flops[20], flops[-1] - flops[-2]
    assert step - target_step == pytest.approx(
        2 * 2 * 4 * 2 * 46_208
    )  # 2 L l P, forward and for D's gradient


def test_growth_record_and_what_is_saved(wide_fsdp: Path) -> None:
    growth = json.loads(RunFolder(wide_fsdp).stage(GROW).growth_file.read_text())
    learned = RunFolder(wide_fsdp).stage(LEARN).checkpoint(8)
    assert growth["operator"] == "learn"
    assert growth["source"]["position"] == 128
    assert growth["network"]["checkpoint"] == str(learned)
    manifest = seal.read_seal(RunFolder(wide_fsdp).stage(GROW).checkpoints)
    assert manifest is not None
    assert growth["network"]["position"] == manifest["position"] == 256
    assert growth["tensors"] == weights(RunFolder(wide_fsdp).stage(GROW).checkpoints)
    assert {name.split(".")[0] for name in weights(learned)} == {"widths", "depths"}
    validation = losses(wide_fsdp, VALIDATION)
    assert abs(validation[TARGET, 0] / validation[LEARN, 8] - 1) < ROUNDING
    assert_audited(wide_fsdp)


def test_one_rank_and_two_agree(
    workplace: Workplace, wide_fsdp: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    workplace.run(*SETS, *NARROW, f"run.folder={run}")
    for name in (METRICS, VALIDATION):
        one, two = losses(run, name), losses(wide_fsdp, name)
        assert one.keys() == two.keys()
        assert max(abs(one[k] / two[k] - 1) for k in one) < SUMMATION_ORDER
    # AdamW hides a gradient that is scaled by the number of ranks; its norm does not.
    first, second = records(run), records(wide_fsdp)
    assert (
        max(abs(first[k]["grad_norm"] / second[k]["grad_norm"] - 1) for k in first)
        < 10 * SUMMATION_ORDER
    )


def test_killed_while_learning_and_while_growing(
    workplace: Workplace, wide_fsdp: Path, tmp_path: Path
) -> None:
    run, sets = tmp_path / "run", [*SETS, *NARROW, f"run.folder={tmp_path}/run"]
    workplace.kill_at(
        "train.step 11", *sets, warm_ranks=2
    )  # before its first checkpoint
    assert not RunFolder(run).stage(LEARN).sealed_steps()
    workplace.kill_at("train.step 7", *sets, warm_ranks=2)
    assert not RunFolder(run).stage(LEARN).done_file.exists()
    workplace.kill_at("grow.computed 1", *sets, warm_ranks=2)
    workplace.run(*sets, warm_ranks=2)
    assert losses(run) == losses(wide_fsdp)
    assert losses(run, VALIDATION) == losses(wide_fsdp, VALIDATION)
    found, expected = RunFolder(run), RunFolder(wide_fsdp)
    for stage, step in ((LEARN, 8), (TARGET, 4)):
        assert weights(found.stage(stage).checkpoint(step)) == weights(
            expected.stage(stage).checkpoint(step)
        ), stage
    assert weights(found.stage(GROW).checkpoints) == weights(
        expected.stage(GROW).checkpoints
    )


def test_bf16_is_applied_on_one_rank_and_on_two(
    workplace: Workplace, wide_fsdp: Path, tmp_path: Path
) -> None:
    """The maps stay float32 and their model computes in bf16, in the same way with FSDP and without."""
    runs = []
    for ranks in (1, 2):
        workplace.run(
            *SETS,
            *NARROW,
            "budget.tokens=19Ki",
            "base.train.precision=fp32",  # a CPU computes bf16 slowly
            "train.precision=bf16",
            f"run.folder={tmp_path}/{ranks}",
            warm_ranks=ranks,
        )
        runs.append(losses(tmp_path / str(ranks)))
    exact = losses(wide_fsdp)
    for run in runs:
        assert (
            1e-6
            < max(abs(run[k] / exact[k] - 1) for k in exact if k[0] == LEARN)
            < 2e-2
        )


def test_a_damaged_source_stops_the_stage(workplace: Workplace, tmp_path: Path) -> None:
    run, sets = tmp_path / "run", [*SETS, f"run.folder={tmp_path}/run"]
    workplace.kill_at("train.step 23", *sets)
    checkpoint, name = (
        RunFolder(run).stage(BASE).checkpoint(20),
        "layers.1.attention.wq.weight",
    )
    ((_, place),) = places(read_metadata(checkpoint), name)
    data = checkpoint / place.relative_path
    content = bytearray(data.read_bytes())
    content[place.offset + place.length // 2] ^= 1
    data.write_bytes(content)
    assert f"{name} is not what was saved" in workplace.run(*sets, code=65)
