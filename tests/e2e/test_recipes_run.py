"""The shipped recipes, trained for a few steps at tiny widths: the smallest recipe of every way to grow and of every way
to train, and the two that are promised by name. Their growths, schedule and precision are as they are, and so are their
layers, but for models from elsewhere that are stacked whole.

Learning rates, weight decay and seed are the same for all, so that recipes which differ in these alone share a run.
"""

import functools
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from growth_for_tests import weights as tensors
from launch import REPOSITORY, VOCABULARY, Workplace, losses, weights
from recipes_for_tests import RECIPE_FILES as FILES

from stackgrow.checkpoint.hf import export_hf
from stackgrow.plan.resolve import make_plan
from stackgrow.plan.stages import GrowStage, ImportStage, Plan
from stackgrow.recipe.load import load_recipe
from stackgrow.recipe.write import to_dict
from stackgrow.run_folder.folder import RunFolder

RECIPES = REPOSITORY / "recipes"
BATCH, STEPS = 64, 2  # tokens per step, steps per stage
REDUCED = (
    "seed=1", "train.learning_rate=1e-3", "train.min_learning_rate=1e-4", "train.weight_decay=0.1",
    "data.path=store", "data.seq_len=16", f"model.vocab_size={VOCABULARY}",
    "model.dim=32", "model.n_heads=4", "model.ffn_dim=88", f"train.global_batch_tokens={BATCH}",
    "train.warmup=1 steps", "train.compile=false", "validation.sequences=4", "log.interval=1 steps",
    "log.tensorboard=false", "eval.tasks=[]",
)  # fmt: skip
SAME_IN_EVERY_STAGE = {
    "warmup": "1 steps",
    "learning_rate": "1e-3",
    "min_learning_rate": "1e-4",
}
NARROW = ("base.model.dim=16", "base.model.n_heads=2", "base.model.ffn_dim=44")
PROMISED = ("7b_gstack.toml", "quickstart.toml")


def reduced(file: Path) -> list[str]:
    recipe = load_recipe(file)
    learns = [i for i, growth in enumerate(recipe.growth) if growth.learn_steps]
    sets = [
        *REDUCED,
        f"budget.tokens={BATCH * (STEPS * (len(recipe.growth) + 1) + len(learns))}",
    ]
    sets += [
        f"growth[{i}].{key}=1 steps"
        for i in learns
        for key in ("learn_steps", "learn.warmup")
    ]
    sets += [
        f"growth[{i}].ramp=1 steps"
        for i, growth in enumerate(recipe.growth)
        if growth.ramp
    ]
    sets += [
        f"growth[{i}].freeze=1 steps"
        for i, growth in enumerate(recipe.growth)
        if growth.freeze
    ]
    sets += [
        f"growth[{i}].timing={STEPS * (i + 1)} steps"
        for i, growth in enumerate(recipe.growth)
        if growth.timing != "start"
    ]
    if recipe.base and recipe.base.model:
        sets += NARROW
    if recipe.base and recipe.base.from_ and recipe.growth[0].factor:
        # A model of 30 layers that is stacked whole is no other way to grow than one of two.
        sets += ["base.n_layers=2", f"model.n_layers={2 * recipe.growth[0].factor}"]
    own_tables = [
        (f"growth[{i}]", growth.train) for i, growth in enumerate(recipe.growth)
    ]
    if recipe.base:
        own_tables.append(("base", recipe.base.train))
    for table, train in own_tables:
        for key, value in SAME_IN_EVERY_STAGE.items():
            if key in train:
                sets.append(f"{table}.train.{key}={value}")
    if recipe.model.n_kv_heads:
        sets.append("model.n_kv_heads=2")
    return sets


def folder_of(plan: Plan) -> str:
    """Recipes that reduce to the same stages, such as those of a sweep over the timing, share one run."""
    return f"recipes/{plan.stage_hashes('')[plan.stages[-1].name][:16]}"


@functools.cache
def plan_of(file: Path) -> Plan:
    return make_plan(load_recipe(file, reduced(file)), file)


def ways(plan: Plan) -> set[str]:
    """How the model is made and grown, and how each stage trains, whatever the numbers: recipes that differ in sizes,
    amounts and rates alone have the same ways."""
    recipe = to_dict(plan.recipe)
    growths = recipe.get("growth", [])
    base = recipe.get("base", {})
    if "from" in base:
        base["from"] = "a folder"
    trains = [recipe["train"]]
    for table in (base, *growths):
        for name in ("train", "learn"):
            if name in table:
                trains.append(_words(table.pop(name)))
    every = [[recipe["model"], base, growths], *trains]
    return {json.dumps(_without_numbers(way)) for way in every}


def _words(table: dict[str, object]) -> dict[str, object]:
    """What a stage's own table says beside numbers and amounts: a rate of its own is no other way to train."""
    words = {}
    for key, value in table.items():
        if _without_numbers(value) != "a number":
            words[key] = value
    return words


def _without_numbers(value: object) -> object:
    """A recipe's value in which a number, and an amount such as "5 steps", is only that."""
    if isinstance(value, dict):
        return {key: _without_numbers(entry) for key, entry in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], int):
        return "numbers"
    if isinstance(value, list):
        return [_without_numbers(entry) for entry in value]
    text = str(value)
    return "a number" if text[:1].isdigit() else text


def chosen() -> list[Path]:
    """From the smallest on, each recipe that has a way which none before it has."""
    plans = {file: plan_of(file) for file in FILES}

    def layers(file: Path) -> int:
        return sum(stage.output_model.n_layers for stage in plans[file].stages)

    found: list[Path] = []
    seen: set[str] = set()
    for file in sorted(FILES, key=layers):
        its_ways = ways(plans[file])
        if not its_ways <= seen or file.name in PROMISED:
            found.append(file)
            seen |= its_ways
    return found


CHOSEN = chosen()


def make_base(workplace: Workplace, plan: Plan) -> None:
    """The model that a recipe begins with, with random weights, in the folder where the recipe looks for it."""
    for stage in plan.stages:
        if isinstance(stage, ImportStage):
            checkpoint = workplace.folder / "models" / f"{plan.recipe.name}-dcp"
            dcp.save(tensors(stage.source), checkpoint_id=checkpoint, no_dist=True)
            export_hf(checkpoint, workplace.folder / stage.folder, stage.source)


@pytest.fixture(scope="module")
def output(workplace: Workplace) -> str:
    folders = {folder_of(plan_of(file)): file for file in CHOSEN}
    for file in CHOSEN:
        make_base(workplace, plan_of(file))
    jobs: list = [
        (str(file), [*reduced(file), f"run.folder={folder}"])
        for folder, file in folders.items()
    ]

    with ThreadPoolExecutor() as pool:
        return "".join(pool.map(workplace.run_all, (jobs[0::2], jobs[1::2])))


@pytest.mark.parametrize(
    "file", CHOSEN, ids=[str(f.relative_to(RECIPES)) for f in CHOSEN]
)
def test_recipe_trains_end_to_end(
    workplace: Workplace, output: str, file: Path
) -> None:
    plan = plan_of(file)
    run = RunFolder(workplace.folder / folder_of(plan))
    unfinished = [s.name for s in plan.stages if not run.stage(s.name).is_done()]
    assert unfinished == [], output
    seen = losses(run.path)
    assert list(seen) == [
        (s.name, step) for s in plan.train_stages for step in range(1, s.steps + 1)
    ]
    assert all(math.isfinite(loss) for loss in seen.values())
    ledger = json.loads(run.ledger_file.read_text(encoding="utf-8"))
    assert ledger["total"]["tokens"] == plan.recipe.budget.tokens

    last = plan.train_stages[-1]
    assert (
        weights(run.stage(last.name).checkpoint(last.steps)).keys()
        >= last.model.tensors().keys()
    )
    for stage in plan.stages:
        if isinstance(stage, GrowStage) and stage.layer_map is not None:
            file = run.stage(stage.name).growth_file
            growth = json.loads(file.read_text(encoding="utf-8"))
            assert growth["layer_map"] == list(stage.layer_map)
