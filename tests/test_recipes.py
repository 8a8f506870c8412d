"""Every shipped recipe is found, opens with what a reader needs, and makes a plan; twins have equal FLOPs."""

import subprocess
from pathlib import Path

import pytest

from stackgrow.load import load_recipe
from stackgrow.plan import Plan, make_plan

RECIPES = Path(__file__).parent.parent / "recipes"
FILES = sorted(RECIPES.rglob("*.toml"))


def plan(name: str) -> Plan:
    return make_plan(load_recipe(RECIPES / name), name)


def test_all_recipes_are_found() -> None:
    listed = subprocess.run(["git", "ls-files", "*.toml"], cwd=RECIPES, capture_output=True, text=True, check=True)
    assert {str(f.relative_to(RECIPES)) for f in FILES} >= set(listed.stdout.split())
    assert len(FILES) >= 2


@pytest.mark.parametrize("file", FILES, ids=[str(f.relative_to(RECIPES)) for f in FILES])
def test_recipe(file: Path) -> None:
    recipe = load_recipe(file)
    made = make_plan(recipe, str(file))
    assert made.train_stages[-1].model == recipe.model
    assert 0 <= recipe.budget.tokens - made.tokens < recipe.train.global_batch_tokens
    assert recipe.name == file.stem
    head = file.read_text().split("\nname = ")[0]
    for word in ("torchrun", f"recipes/{file.relative_to(RECIPES)}", "needs ", "edit ", "status ", "OURS"):
        assert word in head, f"the opening comment lacks {word!r}"
    assert f"({file.relative_to(RECIPES)})" in (RECIPES / "README.md").read_text(), "recipes/README.md lists it"


def test_quickstart_and_its_twin_have_the_same_flops() -> None:
    grown, scratch = plan("quickstart.toml"), plan("quickstart_scratch.toml")
    step = scratch.train_stages[0].flops / scratch.train_stages[0].steps
    assert abs(grown.flops - scratch.flops) < step
    assert grown.recipe.train == scratch.recipe.train
    assert grown.recipe.model == scratch.recipe.model
    assert len(grown.stages) == 3
