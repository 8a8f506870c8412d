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
from stackgrow.run_folder.folder import FOUND, RunFolder


def write_found(folder: Path, stage_hash: str, found: int | str, **facts: Any) -> None:
    """``folder``: the stage's. ``facts`` are for the reader."""
    seal.write_json(folder / FOUND, {"stage_hash": stage_hash, "found": found, **facts})


def with_found(plan: Plan, folder: Path, data_hash: str, file: str | Path = "recipe") -> Plan:
    """``plan`` as the stages in run ``folder`` have settled it. What another recipe's stage found does not count."""
    while True:
        hashes, found = plan.stage_hashes(data_hash), {}
        for stage in plan.stages:
            if stage.finds is None:
                continue
            name = stage.name
            record = seal.read_json(folder / name / FOUND) or {}
            if record.get("stage_hash") == hashes[name]:
                value = record.get("found")
                if not isinstance(value, stage.finds):
                    raise DamagedError(f"{folder / name / FOUND}: {value!r} is nothing that the stage finds")
                found[name] = value
        if found == plan.found:
            return plan
        plan = make_plan(plan.recipe, file, found)  # which changes the hashes of later stages


def plan_of_run(folder: Path, sets: Sequence[str] = ()) -> Plan:
    """The plan of a run, from what it wrote; ``sets`` change free keys."""
    file = RunFolder(folder).recipe_file
    plan = make_plan(load_recipe(file, sets, trusted=True), file)
    return with_found(plan, folder, RunFolder(folder).data_hash(), file)
