"""What must fit before a run starts: the recipe, the token stores, the ranks and their devices."""

from __future__ import annotations

import os
from collections.abc import Sequence

from stackgrow.data.order import Order
from stackgrow.data.store import Manifest, StoreError, TokenStore
from stackgrow.evaluate import tasks
from stackgrow.plan.checks import world_problems
from stackgrow.plan.checks_growth import trust_problems
from stackgrow.plan.resolve import make_plan
from stackgrow.plan.stages import Plan
from stackgrow.recipe.keys import Recipe
from stackgrow.recipe.load import Problem, RecipeError, load_recipe


def check(file: str, sets: Sequence[str]) -> tuple[Plan, Order]:
    """The plan, checked against the token stores and the number of ranks that are there; the order of its data."""
    recipe = load_recipe(file, sets)
    plan = make_plan(recipe, file)
    problems = [*trust_problems(recipe), *world_problems(plan, int(os.environ.get("WORLD_SIZE", "1")))]
    where = [f"data.mix[{i}].path" for i in range(len(recipe.data.mix))] or ["data.path"]
    manifests = [_store(recipe, path, at, problems) for (path, _), at in zip(recipe.data.stores, where, strict=True)]
    if problems:
        raise RecipeError(file, list(dict.fromkeys(problems)))
    try:
        order = Order([m for m in manifests if m], [w for _, w in recipe.data.stores], recipe.data.seq_len, recipe.seed)
    except StoreError as error:
        raise RecipeError(file, [("data.mix" if recipe.data.mix else "data.path", str(error))]) from error
    from stackgrow.titan import device  # torch is loaded only for a recipe that is otherwise good

    if problems := [*device.problems(plan), *(tasks.problems(recipe.eval) if recipe.eval else [])]:
        raise RecipeError(file, problems)
    return plan, order


def _store(recipe: Recipe, path: str, where: str, problems: list[Problem]) -> Manifest | None:
    """The manifest of one of the recipe's stores; adds to ``problems`` what is wrong with it."""
    try:
        manifest = TokenStore.open(path).manifest  # all its shards are there, in their size
        held_out = manifest.splits["validation"].tokens
        if recipe.validation.sequences and held_out > recipe.data.seq_len:
            TokenStore.open(path, "validation")
    except StoreError as error:
        problems.append((where, str(error)))
        return None
    if recipe.data.tokenizer not in ("", manifest.tokenizer_sha256):
        problems.append(
            (where, f"{path} was made with the tokenizer {manifest.tokenizer_sha256}, not with data.tokenizer = "
             f"{recipe.data.tokenizer}; prepare the data with that one, or change data.tokenizer")
        )  # fmt: skip
    if manifest.vocab_size != recipe.model.vocab_size:
        problems.append(
            ("model.vocab_size", f"{recipe.model.vocab_size} is not the vocabulary of the store {path}, "
             f"{manifest.vocab_size}; use that, or prepare the data with another tokenizer")
        )  # fmt: skip
    if manifest.splits["train"].tokens <= recipe.data.seq_len:
        problems.append(("data.seq_len", f"{recipe.data.seq_len} is longer than all of the store {path}"))
    if recipe.validation.sequences and held_out <= recipe.data.seq_len:
        problems.append(
            ("validation.sequences", f"{recipe.validation.sequences} cannot be taken from the store {path}, which "
             f"holds out {held_out} tokens; set 0, or prepare it with a larger --validation")
        )  # fmt: skip
    return manifest
