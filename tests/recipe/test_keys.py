"""Writing a recipe back, its hash, and the geometry of the models of the paper."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from recipes_for_tests import RECIPE, edited, recipe_of, written

from stackgrow.recipe.keys import Model, Recipe
from stackgrow.recipe.load import load_recipe
from stackgrow.recipe.write import recipe_hash, to_dict, to_toml

FULL = """
[parallel]
tensor = 2
[validation]
interval = "64K"
sequences = 0
[run]
folder = "runs/elsewhere"
"""


def with_overrides() -> str:
    text = edited(
        (
            "n_layers = 2",
            'n_layers = 2\n[base.train]\nlearning_rate = 1\nwarmup = "2K"\ncompile = true',
        ),
        (
            'factor = 2\ntiming = "40 steps"',
            'layer_map = [0, 1, 2, 3, 0, 1, 2, 3]\ntiming = "auto"',
        ),
    )
    return text + FULL


@pytest.mark.parametrize(
    "text", [RECIPE, with_overrides(), edited(("[base]\nn_layers = 2", "[base]"))]
)
def test_to_toml_reads_back_equal(tmp_path: Path, text: str) -> None:
    recipe = recipe_of(tmp_path, text)
    resolved = to_toml(recipe)
    assert recipe_of(tmp_path, resolved) == recipe
    assert to_toml(recipe_of(tmp_path, resolved)) == resolved


def test_to_toml_states_every_default(tmp_path: Path) -> None:
    resolved = to_toml(recipe_of(tmp_path, RECIPE))
    for line in (
        "n_kv_heads = 4",
        'horizon = "stage"',
        "tensor = 1",
        'warmup = "4 steps"',
        "tokens = 100000",
    ):
        assert line in resolved.splitlines()


def test_a_runs_own_recipe_may_name_any_path(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, RECIPE, ["data.path=/mnt/data"])
    assert load_recipe(written(tmp_path, to_toml(recipe)), trusted=True) == recipe


def test_recipe_hash_is_the_meanings_not_the_spellings(tmp_path: Path) -> None:
    lines = RECIPE.splitlines(keepends=True)
    spelled = edited(
        ('tokens = "100K"', 'tokens = "0.1M"'), ("seed = 7", "# seven\nseed = 0x7")
    )
    moved = "".join([lines[1], lines[0], *lines[2:]])
    stated = edited(("ffn_dim = 96", "ffn_dim = 96\nn_kv_heads = 4"))
    hashes = {
        recipe_hash(recipe_of(tmp_path, text))
        for text in (RECIPE, spelled, moved, stated)
    }
    assert len(hashes) == 1
    assert len(hashes.pop()) == 64


def test_recipe_hash_changes_with_every_value(tmp_path: Path) -> None:
    original = recipe_hash(recipe_of(tmp_path, RECIPE))
    changed = {
        assignment: recipe_hash(recipe_of(tmp_path, RECIPE, [assignment]))
        for assignment in (
            "name=x",
            "seed=8",
            "log.tensorboard=false",
            "growth[1].order=interleave",
            "base.n_layers=1",
        )
    }
    assert len({original, *changed.values()}) == 6


def test_to_dict_leaves_out_what_is_absent(tmp_path: Path) -> None:
    tree = to_dict(recipe_of(tmp_path, RECIPE))
    assert "layer_map" not in tree["growth"][0]
    assert "train" not in tree["base"]
    assert tree["run"] == {
        "init_timeout": 300,
        "train_timeout": 100,
        "stall_seconds": 600,
        "accept_versions": False,
    }


def test_the_run_folder_is_named_after_the_recipe_or_by_it(tmp_path: Path) -> None:
    assert recipe_of(tmp_path, RECIPE).folder == "runs/tiny"
    assert recipe_of(tmp_path, RECIPE, ["run.folder=x"]).folder == "x"


def test_recipes_are_immutable(tmp_path: Path) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe_of(tmp_path, RECIPE).seed = 8  # type: ignore[misc]


def test_every_key_is_described() -> None:
    def fields(cls: type) -> None:
        for spec in dataclasses.fields(cls):
            assert spec.metadata["help"], f"{cls.__name__}.{spec.name}"
            if "table" in spec.metadata:
                fields(spec.metadata["table"])

    fields(Recipe)


LLAMA = {"family": "llama2", "vocab_size": 32000}
PAPER = [  # paper_facts: total and non-embedding parameters in millions
    ("410M", {"n_layers": 24, "dim": 1024, "n_heads": 16, "ffn_dim": 2816}, 374, 308),
    ("1.1B", {"n_layers": 24, "dim": 2048, "n_heads": 32, "ffn_dim": 5632}, 1364, 1233),
    (
        "3B",
        {"n_layers": 32, "dim": 2560, "n_heads": 20, "n_kv_heads": 4, "ffn_dim": 7040},
        2397,
        2234,
    ),
    (
        "7B",
        {"n_layers": 32, "dim": 4096, "n_heads": 32, "n_kv_heads": 8, "ffn_dim": 11008},
        5933,
        5671,
    ),
]
BASES = [("1.1B", 6, 439), ("3B", 8, 722), ("7B", 8, 1680)]


@pytest.mark.parametrize(
    ("name", "shape", "total", "non_embedding"), PAPER, ids=[p[0] for p in PAPER]
)
def test_parameters_of_the_papers_targets(
    name: str, shape: dict[str, int], total: int, non_embedding: int
) -> None:
    model = Model(**LLAMA, **shape)  # type: ignore[arg-type]
    assert round(model.parameters() / 1e6) == total
    assert round(model.non_embedding_parameters() / 1e6) == non_embedding
    assert model.parameters() == sum(
        math.prod(tensor) for tensor in model.tensors().values()
    )


@pytest.mark.parametrize(("name", "n_layers", "total"), BASES)
def test_parameters_of_the_papers_bases(name: str, n_layers: int, total: int) -> None:
    shape = next(p[1] for p in PAPER if p[0] == name) | {"n_layers": n_layers}
    assert round(Model(**LLAMA, **shape).parameters() / 1e6) == total  # type: ignore[arg-type]


def test_tensors_of_a_grouped_query_model() -> None:
    model = Model(**LLAMA, dim=64, n_layers=3, n_heads=8, n_kv_heads=2, ffn_dim=96)  # type: ignore[arg-type]
    tensors = model.tensors()
    assert (model.head_dim, model.kv_heads) == (8, 2)
    assert tensors["layers.2.attention.wk.weight"] == (16, 64)
    assert tensors["layers.0.attention.wq.weight"] == (64, 64)
    assert tensors["layers.0.feed_forward.w2.weight"] == (64, 96)
    assert tensors["output.weight"] == (32000, 64)
    assert len(tensors) == 3 * 9 + 3
