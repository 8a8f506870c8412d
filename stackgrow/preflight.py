"""What must fit before a run starts: the recipe, the token store, the ranks and their devices, an imported base."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from stackgrow.checks import world_problems
from stackgrow.data.store import Manifest, StoreError, TokenStore, read_manifest
from stackgrow.found import with_found
from stackgrow.load import Problem, RecipeError, load_recipe
from stackgrow.plan import ImportStage, Plan
from stackgrow.resolve import make_plan


def check(file: str, sets: Sequence[str]) -> tuple[Plan, Manifest]:
    """The plan, checked against the token store and the number of ranks that are there."""
    recipe = load_recipe(file, sets)
    plan = make_plan(recipe, file)
    problems = world_problems(plan, int(os.environ.get("WORLD_SIZE", "1")))
    manifest, store_problems = _store(plan)
    problems += store_problems
    if problems or manifest is None:
        raise RecipeError(file, problems)
    from stackgrow.titan import device  # torch is loaded only for a recipe that is otherwise good

    folder = Path(recipe.folder).absolute()
    plan = with_found(plan, folder, manifest.hash("train"), file)
    if problems := [*device.problems(plan), *_import_problems(plan, folder)]:
        raise RecipeError(file, problems)
    return plan, manifest


def _import_problems(plan: Plan, folder: Path) -> list[Problem]:
    """What of a base model from elsewhere does not fit, unless the run has it already."""
    if not isinstance(stage := plan.stages[0], ImportStage) or (folder / stage.name / "DONE").exists():
        return []
    from stackgrow.growth.base import import_problems

    return import_problems(stage)


def _store(plan: Plan) -> tuple[Manifest | None, list[Problem]]:
    recipe = plan.recipe
    path = Path(recipe.data.path)
    try:
        manifest = read_manifest(path)
        TokenStore.open(path)  # that all shards are there, in their size
    except StoreError as error:
        return None, [("data.path", str(error))]
    problems = []
    if manifest.vocab_size != recipe.model.vocab_size:
        problems.append(
            ("model.vocab_size", f"{recipe.model.vocab_size} is not the vocabulary of the store {path}, "
             f"{manifest.vocab_size}; use that, or prepare the data with another tokenizer")
        )  # fmt: skip
    if manifest.splits["train"].tokens <= recipe.data.seq_len:
        problems.append(("data.seq_len", f"{recipe.data.seq_len} is longer than all of the store {path}"))
    held_out = manifest.splits["validation"].tokens if "validation" in manifest.splits else 0
    if recipe.validation.sequences and held_out <= recipe.data.seq_len:
        problems.append(
            ("validation.sequences", f"{recipe.validation.sequences} cannot be taken from the store {path}, which "
             f"holds out {held_out} tokens; set 0, or prepare it with a larger --validation")
        )  # fmt: skip
    return manifest, problems
