"""One small valid recipe, and short ways to change it, load it and see what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from stackgrow.plan.resolve import make_plan
from stackgrow.plan.stages import Plan
from stackgrow.recipe.keys import Recipe
from stackgrow.recipe.load import RecipeError, load_recipe

REPOSITORY = Path(__file__).parents[1]
# The shipped ones; in results/ lie those of kept records, each as it was when its run was made.
RECIPE_FILES = sorted(
    path
    for path in (REPOSITORY / "recipes").rglob("*.toml")
    if "results" not in path.parts
)

RECIPE = """\
name = "tiny"
seed = 7

[budget]
tokens = "100K"

[data]
path = "data/tiny"
seq_len = 64

[model]
family = "llama2"
dim = 64
n_layers = 8
n_heads = 4
ffn_dim = 96
vocab_size = 256

[base]
n_layers = 2

[[growth]]
operator = "stack"
factor = 2
timing = "20K"

[[growth]]
operator = "stack"
factor = 2
timing = "40 steps"

[train]
global_batch_tokens = 1024
learning_rate = 1e-3
warmup = "4 steps"
"""


def edited(*changes: tuple[str, str], text: str = RECIPE) -> str:
    """``text`` with each old part, which must be there exactly once, replaced by the new one."""
    for old, new in changes:
        assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in the recipe"
        text = text.replace(old, new)
    return text


def written(folder: Path, content: str | bytes) -> Path:
    file = folder / "some_recipe.toml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def recipe_of(
    folder: Path, content: str | bytes = RECIPE, sets: Sequence[str] = ()
) -> Recipe:
    return load_recipe(written(folder, content), sets)


def plan_of(
    folder: Path, content: str | bytes = RECIPE, sets: Sequence[str] = ()
) -> Plan:
    file = written(folder, content)
    return make_plan(load_recipe(file, sets), file)


def problems_of(
    folder: Path, content: str | bytes, sets: Sequence[str] = ()
) -> dict[str, str]:
    """TOML path -> message of everything that is wrong, by way of the text that the user reads."""
    with pytest.raises(RecipeError) as caught:
        plan_of(folder, content, sets)
    message = str(caught.value)
    assert message.startswith(
        f"{folder / 'some_recipe.toml'}: {len(caught.value.problems)} problem"
    )
    for where, what in caught.value.problems:
        assert f"{where}: {what}" in message if where else what in message
    assert len(caught.value.problems) == len(dict(caught.value.problems)), message
    return dict(caught.value.problems)
