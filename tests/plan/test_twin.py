"""The scratch twin of a recipe: as many FLOPs, to the step, all else equal; and it reads back as a recipe."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from recipes_for_tests import RECIPE, RECIPE_FILES, edited, plan_of

from stackgrow.cli.twin import main
from stackgrow.plan.resolve import make_plan
from stackgrow.plan.stages import Plan
from stackgrow.plan.twin import scratch_twin
from stackgrow.recipe.load import RecipeError, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
GROWN = [file for file in RECIPE_FILES if load_recipe(file).growth]


def shipped(name: str) -> Plan:
    file = RECIPES / name
    return make_plan(load_recipe(file), file)


@pytest.mark.parametrize("file", GROWN, ids=[file.stem for file in GROWN])
def test_every_shipped_recipe_has_a_twin_of_its_flops_to_the_step(file: Path) -> None:
    plan = make_plan(load_recipe(file), file)
    twin = scratch_twin(plan)
    (stage,) = twin.train_stages
    assert (
        abs(twin.flops - plan.flops)
        <= stage.flops_per_token * stage.train.global_batch_tokens / 2
    )
    assert stage.model == plan.recipe.model
    assert twin.tokens == twin.recipe.budget.tokens
    for key in ("seed", "data", "model", "validation", "eval", "checkpoint"):
        assert getattr(twin.recipe, key) == getattr(plan.recipe, key)


@pytest.mark.parametrize(
    ("grown", "scratch"),
    [
        ("quickstart.toml", "quickstart_scratch.toml"),
        ("operators/1.1b_gradual.toml", "operators/1.1b_scratch.toml"),
        ("operators/small_noise.toml", "operators/small_scratch.toml"),
    ],
)
def test_it_is_the_twin_that_was_made_by_hand(grown: str, scratch: str) -> None:
    twin, by_hand = scratch_twin(shipped(grown)), shipped(scratch)
    assert abs(twin.train_stages[0].steps - by_hand.train_stages[0].steps) <= 1
    assert twin.recipe.train == by_hand.recipe.train


def test_the_last_stage_s_own_settings_are_the_twin_s(tmp_path: Path) -> None:
    text = edited(
        (
            "[train]\n",
            "[growth.train]\nlearning_rate = 2e-3\n[growth.parallel]\nshard = 2\n\n[train]\n",
        )
    )
    twin = scratch_twin(plan_of(tmp_path, text))
    assert twin.recipe.train.learning_rate == 2e-3
    assert twin.recipe.parallel.shard == 2


def test_a_recipe_without_growth_has_none() -> None:
    with pytest.raises(RecipeError, match="its own scratch twin"):
        scratch_twin(shipped("quickstart_scratch.toml"))


def test_the_tool_writes_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(RECIPE, encoding="utf-8")
    assert main([str(file), "--set", "seed=11"]) == 0
    assert "97,280 tokens" not in capsys.readouterr().out, "fewer than the grown run's"
    written = tmp_path / "mine_scratch.toml"
    twin = make_plan(load_recipe(written), written)
    assert twin.recipe.seed == 11
    assert twin.recipe.name == "tiny_scratch"
    assert twin.recipe.folder == "runs/tiny_scratch"
    grown = make_plan(load_recipe(file), file)
    assert abs(twin.flops - grown.flops) <= twin.flops / twin.train_stages[0].steps / 2
    assert "Compare the two at equal FLOPs" in written.read_text(encoding="utf-8")
    before = written.read_bytes()
    assert main([str(file)]) == 2, "nothing is written over"
    assert "name another file with --out" in capsys.readouterr().err
    assert written.read_bytes() == before


def test_a_run_whose_growth_the_loss_decided_has_the_twin_of_what_it_did(
    tmp_path: Path,
) -> None:
    text = edited(
        ('timing = "20K"', 'timing = { loss_slope = 0.5, min = "10K", max = "30K" }')
    )
    latest = plan_of(tmp_path, text)
    found = make_plan(latest.recipe, found={"stage-0-train-2L": 12})
    assert scratch_twin(found).tokens > scratch_twin(latest).tokens, (
        "a smaller base leaves more to the target"
    )


def test_the_pilot_of_the_launch_checklist_is_planned(tmp_path: Path) -> None:
    page = (RECIPES.parent / "tools" / "cluster" / "README.md").read_text("utf-8")
    (twin,) = re.findall(r"stackgrow twin (\S+) --out pilot.toml", page)
    (launch,) = re.findall(r"slurm.sbatch pilot.toml (.*\n.*)\n", page)
    words = shlex.split(launch.replace("\\\n", " "))
    pilot = tmp_path / "pilot.toml"
    assert main([str(RECIPES.parent / twin), "--out", str(pilot)]) == 0
    (stage,) = make_plan(load_recipe(pilot, words[1::2]), pilot).train_stages
    assert set(words[0::2]) == {"--set"}
    assert stage.steps == 100
    assert stage.model == shipped("7b_gstack.toml").train_stages[-1].model
