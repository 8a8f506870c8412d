"""TensorBoard, read with its own reader, of a run that was killed in both stages and gone on with."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from pathlib import Path

import pytest
from launch import Workplace, records
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stackgrow.run_folder.folder import METRICS, VALIDATION, RunFolder, StageFolder

STAGES = ("stage-0-train-2L", "stage-2-train-4L")


@dataclasses.dataclass
class Curve:
    """One tag of one stage."""

    x: list[int]
    values: list[float]


@pytest.fixture(scope="module")
def run(workplace: Workplace) -> RunFolder:
    """20 steps of 2 layers, growth, 20 of 4; killed in step 7 and in step 31, between two checkpoints."""
    folder = "run.folder=charts"
    workplace.kill_at("train.step 7", folder)
    workplace.kill_at("train.step 27", folder)  # the session begins with step 5
    workplace.run(folder)
    return RunFolder(workplace.folder / "charts")


def curves(stage: StageFolder) -> dict[str, Curve]:
    reader = EventAccumulator(str(stage.tensorboard), size_guidance={"scalars": 0})
    reader.Reload()
    found = {}
    for tag in reader.Tags()["scalars"]:
        events = reader.Scalars(tag)
        found[tag] = Curve(
            [event.step for event in events], [event.value for event in events]
        )
    return found


def test_tags_are_few_and_short_and_the_same_in_every_stage(run: RunFolder) -> None:
    base, grown = (set(curves(run.stage(name))) for name in STAGES)
    assert base == grown
    assert len(base) < 20
    assert max(map(len, base)) < 40
    assert {
        "loss/train",
        "loss/validation",
        "loss_by_gflops/train",
        "train/learning_rate",
    } <= base


def test_x_is_where_the_run_is_and_no_step_is_there_twice_or_missing(
    run: RunFolder,
) -> None:
    written = records(run.path, METRICS)
    validated = records(run.path, VALIDATION)
    for name in STAGES:
        found = curves(run.stage(name))
        rows = [row for (stage, _), row in written.items() if stage == name]
        assert len(rows) == 20
        loss = found["loss/train"]
        assert loss.x == [row["tokens"] for row in rows]
        assert loss.values == pytest.approx([row["loss"] for row in rows], rel=1e-6)
        assert found["loss_by_gflops/train"].x == [
            round(row["flops"] / 1e9) for row in rows
        ]
        rows = [row for (stage, _), row in validated.items() if stage == name]
        assert found["loss/validation"].x == [row["tokens"] for row in rows]


def test_growth_is_in_the_middle_of_one_curve(run: RunFolder) -> None:
    base, grown = (curves(run.stage(name)) for name in STAGES)
    x = base["loss/train"].x + grown["loss/train"].x
    assert x == [1024 * step for step in range(1, 41)]
    # The grown model is validated before its first step, where the base was after its last.
    assert base["loss/validation"].x[-1] == grown["loss/validation"].x[0] == 20 * 1024


def test_a_stage_has_one_event_file(run: RunFolder) -> None:
    for name in STAGES:
        files = list(run.stage(name).tensorboard.rglob("*"))
        assert len(files) == 1, files


def test_records_say_how_fast_and_how_late(run: RunFolder) -> None:
    for row in records(run.path, METRICS).values():
        assert 0 <= row["data_wait"] < 60
        assert row["lag"] == 0, "one rank waits for nobody"
        assert row["slowest_rank"] == 0
        assert "mfu" not in row, "a CPU has no peak to compare with"
        assert math.isfinite(row["tps"])


def test_wandb_is_refused_with_the_remedy_where_it_is_not_installed(
    workplace: Workplace, tmp_path: Path
) -> None:
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    output = workplace.run("log.wandb=true", f"run.folder={tmp_path}/run", code=2)
    assert (
        "log.wandb: true needs the package wandb: pip install 'stackgrow[wandb]', or set false"
        in output
    )
    assert not (tmp_path / "run").exists()
