"""What must fit before a run starts: the recipe, the token stores, the ranks and their devices."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from stackgrow.data.order import Order
from stackgrow.data.store import Manifest, StoreError, TokenStore
from stackgrow.evaluate import tasks
from stackgrow.growth import own
from stackgrow.plan.checks import world_problems
from stackgrow.plan.checks_growth import trust_problems
from stackgrow.plan.resolve import make_plan
from stackgrow.plan.stages import ImportStage, Plan
from stackgrow.recipe.keys import Recipe
from stackgrow.recipe.load import Problem, RecipeError, load_recipe
from stackgrow.run_folder.folder import RunFolder
from stackgrow.text import numbered


def check(
    file: str, sets: Sequence[str], *, all_at_once: bool = False
) -> tuple[Plan, Order]:
    """The plan, checked against the token stores and the number of ranks that are there; the order of its data.
    ``all_at_once``: devices, benchmarks and a base from elsewhere, for which torch is loaded, are looked at where
    something else is wrong, too.

    Raises:
        RecipeError: naming everything that was found.
    """
    recipe = load_recipe(file, sets)
    plan = make_plan(recipe, file)
    problems = [
        *trust_problems(recipe),
        *tasks.trust_problems(recipe.eval, sets),
        *world_problems(plan, int(os.environ.get("WORLD_SIZE", "1"))),
    ]
    stores = [path for path, _ in recipe.data.stores]
    weights = [weight for _, weight in recipe.data.stores]
    manifests = []
    for index, path in enumerate(stores):
        where = f"data.mix[{index}].path" if recipe.data.mix else "data.path"
        manifest = _open_store(path, where, problems)
        if manifest is not None:
            _check_store(recipe, manifest, path, where, problems)
            manifests.append(manifest)
    if problems:
        if all_at_once:
            problems += [*_machine_problems(plan), *import_problems(plan)]
        raise RecipeError(
            file, list(dict.fromkeys(problems))
        )  # what is wrong with two stores alike is said once
    try:
        order = Order(manifests, weights, recipe.data.seq_len, recipe.seed)
    except StoreError as error:
        raise RecipeError(
            file, [("data.mix" if recipe.data.mix else "data.path", str(error))]
        ) from error
    problems = _machine_problems(plan)
    if problems:
        if all_at_once:
            problems += import_problems(plan)
        raise RecipeError(file, problems)
    return plan, order


def _machine_problems(plan: Plan) -> list[Problem]:
    """What the machine's devices and packages cannot do; torch is loaded for it."""
    from stackgrow.titan import device

    problems = list(device.problems(plan))
    if plan.recipe.eval:
        problems += tasks.problems(plan.recipe.eval)
    return problems


def import_problems(plan: Plan) -> list[Problem]:
    """What of a base model from elsewhere does not fit, unless the run has it already."""
    stage = plan.stages[0]
    run = RunFolder(Path(plan.recipe.folder).absolute())
    if not isinstance(stage, ImportStage) or run.stage(stage.name).is_done():
        return []
    from stackgrow.checkpoint import take_over

    return take_over.import_problems(stage)


def held_out_note(recipe: Recipe) -> str:
    """That the stores hold out fewer sequences than the recipe asks for; "" where they do not."""
    from stackgrow.data.loader import open_validation  # which needs torch

    asked = recipe.validation.sequences
    if not asked:
        return ""
    there = len(open_validation(recipe.data, asked, recipe.validation.take))
    if there == asked:
        return ""
    return (
        f"validation.sequences asks for {asked}, and the held-out text has {numbered(there, 'sequence')} of "
        f"{recipe.data.seq_len} tokens: the validation loss is of these; prepare the data with a larger --validation"
    )


def unchecked(plan: Plan) -> list[str]:
    """What ``check`` and claim.check_folder look at and a plan does not, for the reader of a plan."""
    recipe = plan.recipe
    stores = ", ".join(path for path, _ in recipe.data.stores)
    left = [
        f"the token stores ({stores}): their files, tokenizer, vocabulary, held-out text",
        "the number of ranks, and what [parallel] makes of it",
        f"the run folder {recipe.folder}: whether another recipe's run is in it",
    ]
    if recipe.base and recipe.base.from_:
        left.append(f"the base model in {recipe.base.from_}")
    for index, growth in enumerate(recipe.growth):
        if own.is_own(growth.operator) and not own.trusted():
            left.append(
                f'growth[{index}].operator = "{growth.operator}": the file that it is in, and what it makes of the '
                "weights; it is code, and is looked at with --trust alone"
            )
    if recipe.eval:
        left.append(f"the tasks of lm-eval: {', '.join(recipe.eval.tasks)}")
        if recipe.eval.include:
            left.append(f"the task files in {recipe.eval.include}")
    for name, plain in (("attention", "sdpa"), ("precision", "float8")):
        values = {getattr(stage.train, name) for stage in plan.train_stages}
        special = values - {plain} if name == "attention" else values & {plain}
        for value in sorted(special):
            left.append(
                f'train.{name} = "{value}": whether this machine has the GPU and the package for it'
            )
    return left


def _open_store(path: str, where: str, problems: list[Problem]) -> Manifest | None:
    """The manifest of a store whose shards are all there, in their size; else None, and a problem more."""
    try:
        return TokenStore.open(path).manifest
    except StoreError as error:
        problems.append((where, str(error)))
        return None


def _check_store(
    recipe: Recipe, manifest: Manifest, path: str, where: str, problems: list[Problem]
) -> None:
    """Adds to ``problems`` what of one of the recipe's stores does not fit the recipe."""
    seq_len = recipe.data.seq_len
    validation_tokens = manifest.splits["validation"].tokens
    if recipe.validation.sequences and validation_tokens > seq_len:
        try:
            TokenStore.open(path, "validation")
        except StoreError as error:
            problems.append((where, str(error)))
            return
    if recipe.data.tokenizer not in ("", manifest.tokenizer_sha256):
        problem = (
            f"{path} was made with the tokenizer {manifest.tokenizer_sha256}, not with data.tokenizer = "
            f"{recipe.data.tokenizer}; prepare the data with that one, or change data.tokenizer"
        )
        problems.append((where, problem))
    if not manifest.fits(recipe.model.vocab_size):
        problem = (
            f"{recipe.model.vocab_size} is not the vocabulary of the store {path}, {manifest.vocab_size}; use that, or "
            "the multiple of 64 above it, or prepare the data with another tokenizer"
        )
        problems.append(("model.vocab_size", problem))
    if manifest.splits["train"].tokens <= seq_len:
        problems.append(
            ("data.seq_len", f"{seq_len} is longer than all of the store {path}")
        )
    if recipe.validation.sequences and validation_tokens <= seq_len:
        problem = (
            f"{recipe.validation.sequences} cannot be taken from the store {path}, which holds out "
            f"{validation_tokens} tokens; set 0, or prepare it with a larger --validation"
        )
        problems.append(("validation.sequences", problem))
