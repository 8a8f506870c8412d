"""What a stage finds out as it runs and later stages follow from: the weights of an imported base, the step at which
the loss called for growth. It is written once, atomically, and never found out again. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stackgrow import seal
from stackgrow.errors import DamagedError
from stackgrow.plan.resolve import make_plan
from stackgrow.plan.stages import Plan
from stackgrow.recipe.load import load_recipe
from stackgrow.run_folder.folder import RunFolder, StageFolder


def write_found(
    folder: StageFolder, stage_hash: str, found: int | str, **facts: Any
) -> None:
    """``facts`` are for the reader."""
    seal.write_json(
        folder.found_file, {"stage_hash": stage_hash, "found": found, **facts}
    )


def with_found(
    plan: Plan, folder: RunFolder, data_hash: str, file: str | Path = "recipe"
) -> Plan:
    """``plan`` as the stages in run ``folder`` have settled it. What another recipe's stage found does not count.

    Raises:
        DamagedError: a stage is said to have found what it cannot find.
    """
    while True:
        hashes = plan.stage_hashes(data_hash)
        found: dict[str, int | str] = {}
        for stage in plan.stages:
            if stage.finds is None:
                continue
            stage_folder = folder.stage(stage.name)
            record = seal.read_json(stage_folder.found_file) or {}
            if record.get("stage_hash") != hashes[stage.name]:
                continue
            value = record.get("found")
            if not isinstance(value, stage.finds):
                raise DamagedError(
                    f"{stage_folder.found_file}: {value!r} is nothing that the stage finds"
                )
            found[stage.name] = value
        if found == plan.found:
            return plan
        plan = make_plan(
            plan.recipe, file, found
        )  # which changes the hashes of later stages


def plan_of_run(folder: Path, sets: Sequence[str] = ()) -> Plan:
    """The plan of a run, from what it wrote; ``sets`` change free keys."""
    run = RunFolder(folder)
    if run.recipe_file.exists() and not run.recipe_file.is_file():
        raise DamagedError(f"{run.recipe_file} is no plain file; restore it")
    plan = make_plan(load_recipe(run.recipe_file, sets, trusted=True), run.recipe_file)
    return with_found(plan, run, run.data_hash(), run.recipe_file)
