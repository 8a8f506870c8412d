"""Run folders with the records of runs whose speed-up is known, written in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from recipes_for_tests import RECIPE, edited

from stackgrow.plan.resolve import make_plan
from stackgrow.plan.stages import TrainStage
from stackgrow.recipe.load import load_recipe
from stackgrow.recipe.write import to_toml

SCRATCH = (
    ("[base]\nn_layers = 2\n", ""),
    ('[[growth]]\noperator = "stack"\nfactor = 2\ntiming = "20K"\n', ""),
    ('[[growth]]\noperator = "stack"\nfactor = 2\ntiming = "40 steps"\n', ""),
)


def written_run(
    folder: Path, *changes: tuple[str, str], ratio: float = 1.0, floor: float = 1.7, done: bool = True
) -> Path:
    """A run of tests/recipes_for_tests.py's recipe; it needs 1 / ``ratio`` of the FLOPs of ``ratio`` 1 for each loss."""
    folder.mkdir()
    (folder / "recipe.toml").write_text(edited(*changes, text=RECIPE))
    recipe = load_recipe(folder / "recipe.toml")
    (folder / "recipe.toml").write_text(to_toml(recipe))
    for stage in make_plan(recipe).stages:
        (folder / stage.name).mkdir()
        if done:
            (folder / stage.name / "DONE").write_text(json.dumps({"seconds": 75.0}))
        if isinstance(stage, TrainStage):
            rows = [stage.place(step) for step in range(1, stage.steps + 1)]
            loss = floor + 2.0 * (ratio * np.array([row["flops"] for row in rows]) / 1e8) ** -0.15
            rows = [{**row, "loss": value, "tps": 1000.0} for row, value in zip(rows, loss.tolist(), strict=True)]
            for name, kept in (("metrics", rows), ("validation", rows[::10])):
                (folder / stage.name / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    return folder
