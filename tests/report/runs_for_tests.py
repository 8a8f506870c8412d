"""Run folders with the records of runs whose speed-up is known, written in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recipes_for_tests import RECIPE, edited

from stackgrow.plan.resolve import make_plan
from stackgrow.plan.stages import TrainStage
from stackgrow.recipe.load import load_recipe
from stackgrow.recipe.write import to_toml
from stackgrow.run_folder.folder import RunFolder
from stackgrow.run_folder.lines import read_records

SCRATCH = (
    ("[base]\nn_layers = 2\n", ""),
    ('[[growth]]\noperator = "stack"\nfactor = 2\ntiming = "20K"\n', ""),
    ('[[growth]]\noperator = "stack"\nfactor = 2\ntiming = "40 steps"\n', ""),
)


def written_run(
    folder: Path,
    *changes: tuple[str, str],
    ratio: float = 1.0,
    floor: float = 1.7,
    done: bool = True,
) -> Path:
    """A run of tests/recipes_for_tests.py's recipe; it needs 1 / ``ratio`` of the FLOPs of ``ratio`` 1 for each loss."""
    folder.mkdir()
    run = RunFolder(folder)
    run.recipe_file.write_text(edited(*changes, text=RECIPE))
    recipe = load_recipe(run.recipe_file)
    run.recipe_file.write_text(to_toml(recipe))
    for stage in make_plan(recipe).stages:
        stage_folder = run.stage(stage.name)
        stage_folder.path.mkdir()
        if done:
            stage_folder.done_file.write_text(json.dumps({"seconds": 75.0}))
        if isinstance(stage, TrainStage):
            records = [
                record(stage, step, ratio, floor) for step in range(1, stage.steps + 1)
            ]
            write_lines(stage_folder.metrics_file, records)
            write_lines(stage_folder.validation_file, records[::10])
    return folder


def record(stage: TrainStage, step: int, ratio: float, floor: float) -> dict[str, Any]:
    place = stage.place(step)
    loss = floor + 2.0 * (ratio * place["flops"] / 1e8) ** -0.15
    return {
        **place,
        "loss": loss,
        "tps": 1000.0,
        "lr": stage.learning_rate(step),
        "grad_norm": 1 / step,
    }


def write_lines(file: Path, records: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in records))


def without_speed(run: Path) -> None:
    """The records as other software may write them, which measures no tokens per second."""
    for stage in RunFolder(run).stages():
        if stage.metrics_file.is_file():
            records = read_records(stage.metrics_file)
            for row in records:
                del row["tps"]
            write_lines(stage.metrics_file, records)
