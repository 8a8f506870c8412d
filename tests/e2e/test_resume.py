"""Kill -9 at the moments that matter, run the same command again: bit for bit the undisturbed run."""

import shutil
from pathlib import Path

import pytest
from launch import (
    BASE,
    GROW,
    TARGET,
    Workplace,
    assert_audited,
    losses,
    records,
    stage_of,
    weights,
)

from stackgrow.run_folder.folder import LEDGER, VALIDATION


def assert_same_run(run: Path, reference: Path) -> None:
    assert_audited(run)
    assert losses(run) == losses(reference)
    assert losses(run, VALIDATION) == losses(reference, VALIDATION)
    assert weights(stage_of(run, TARGET).checkpoint(20)) == weights(
        stage_of(reference, TARGET).checkpoint(20)
    )


@pytest.mark.parametrize("ranks", [0, 2])
def test_killed_in_base_after_growth_and_in_target(
    workplace: Workplace, tmp_path: Path, ranks: int, request: pytest.FixtureRequest
) -> None:
    reference: Path = request.getfixturevalue(
        "reference_fsdp" if ranks else "reference"
    )
    run, place = tmp_path / "run", f"run.folder={tmp_path}/run"

    workplace.kill_at("train.step 7", place, warm_ranks=ranks)
    assert not stage_of(run, BASE).done_file.exists()
    # Right after growth, before the first checkpoint of the grown model: torchtitan itself would go on from
    # random weights here, since the stage's checkpoint folder may exist already.
    rare = "checkpoint.interval=1000 steps"
    workplace.kill_at("train.step 19", place, rare, warm_ranks=ranks)
    assert stage_of(run, GROW).done_file.exists()
    assert not stage_of(run, TARGET).sealed_steps()
    workplace.kill_at("train.step 10", place, warm_ranks=ranks)
    assert stage_of(run, TARGET).sealed_steps()
    assert not stage_of(run, TARGET).done_file.exists()
    workplace.run(place, warm_ranks=ranks)
    assert_same_run(run, reference)


def test_torn_first_save_of_the_grown_stage(
    workplace: Workplace, reference: Path, tmp_path: Path
) -> None:
    """A first save that was torn (data without metadata) is set aside, and the stage starts from its input."""
    run = tmp_path / "run"
    shutil.copytree(reference, run, ignore=shutil.ignore_patterns(TARGET, LEDGER))
    torn = stage_of(run, TARGET).checkpoint(4)
    torn.mkdir(parents=True)
    (torn / "__0_0.distcp").write_bytes(b"half a tensor")
    shutil.copy(stage_of(reference, TARGET).stage_file, run / TARGET)
    output = workplace.run(f"run.folder={run}")
    assert "Incomplete checkpoint moved to" in output
    assert (stage_of(run, TARGET).quarantine / "step-4.0" / "__0_0.distcp").exists()
    assert_same_run(run, reference)


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(
    workplace: Workplace, reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference, run, ignore=shutil.ignore_patterns(LEDGER))
    stage_of(run, TARGET).done_file.unlink()
    data = stage_of(run, TARGET).checkpoint(20) / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.unlink()
    data.write_bytes(content)
    output = workplace.run(f"run.folder={run}")
    assert "__0_0.distcp is damaged (SHA-256 differs)" in output
    assert_same_run(run, reference)


def test_more_ranks_on_resume_keep_the_order_of_the_data(
    workplace: Workplace, reference: Path, tmp_path: Path
) -> None:
    run, place = tmp_path / "run", f"run.folder={tmp_path}/run"
    workplace.kill_at("train.step 11", place)
    workplace.run(place, warm_ranks=2)
    expected, found = records(reference), records(run)
    assert [r["position"] for r in found.values()] == [
        r["position"] for r in expected.values()
    ]
    worst = max(abs(found[k]["loss"] / expected[k]["loss"] - 1) for k in expected)
    assert worst < 2e-6  # float32 summation order, as in test_parallel.py
