"""The generated schema and reference: fresh, and of one mind with the loader about single keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli
from jsonschema import Draft202012Validator
from recipes_for_tests import RECIPE_FILES as RECIPES
from recipes_for_tests import edited, problems_of, recipe_of

from stackgrow.recipe.schema import (
    REFERENCE_FILE,
    SCHEMA_FILE,
    recipe_schema,
    schema_text,
    with_reference,
)
from stackgrow.recipe.write import to_dict

VALIDATOR = Draft202012Validator(recipe_schema())


def errors(text: str) -> list[str]:
    return [error.json_path for error in VALIDATOR.iter_errors(tomli.loads(text))]


def test_the_schema_of_recipes_is_a_json_schema() -> None:
    Draft202012Validator.check_schema(recipe_schema())


def test_schema_and_reference_are_fresh() -> None:
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text(), "run `make schema`"
    assert REFERENCE_FILE.read_text(encoding="utf-8") == with_reference(
        REFERENCE_FILE.read_text(encoding="utf-8")
    ), "run `make schema`"


@pytest.mark.parametrize(
    "file", RECIPES, ids=[str(f.relative_to(REFERENCE_FILE.parent)) for f in RECIPES]
)
def test_shipped_recipes_are_valid(file: Path) -> None:
    assert errors(file.read_text(encoding="utf-8")) == []
    assert file.read_text(encoding="utf-8").startswith(
        "#:schema "
        + "../" * len(file.relative_to(REFERENCE_FILE.parents[1]).parents[:-1])
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("seed = 7", "seed = 0x7"),
        ('tokens = "100K"', "tokens = 100_000"),
        ('timing = "20K"', 'timing = "auto"'),
        ('factor = 2\ntiming = "20K"', 'layer_map = [0, 1, 0, 1]\ntiming = "20K"'),
        ("[base]", "[base.train]\nlearning_rate = 1\n[base]"),
        (
            'timing = "40 steps"',
            'timing = "40 steps"\n[growth.train]\nschedule = "wsd"',
        ),
        ('warmup = "4 steps"', "[parallel]\nshard = -1"),
    ],
)
def test_the_schema_accepts_what_the_loader_accepts(
    tmp_path: Path, old: str, new: str
) -> None:
    text = edited((old, new))
    assert errors(text) == []
    recipe_of(tmp_path, text)


def test_the_resolved_recipe_is_valid(tmp_path: Path) -> None:
    assert list(VALIDATOR.iter_errors(to_dict(recipe_of(tmp_path)))) == []


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("seed = 7", "", "$"),
        ("seed = 7", "seed = 7\nsed = 7", "$"),
        ("seed = 7", 'seed = "7"', "$.seed"),
        ("seed = 7", "seed = -1", "$.seed"),
        ("n_layers = 8", "n_layers = true", "$.model.n_layers"),
        ('tokens = "100K"', 'tokens = "100 GB"', "$.budget.tokens"),
        ('timing = "20K"', "timing = 20", "$.growth[0].timing"),
        ('timing = "20K"', 'timing = "__ steps"', "$.growth[0].timing"),
        ("[base]", "[base.train]\nlr = 1\n[base]", "$.base.train"),
        ("[base]", "[base.train]\nbeta1 = 1\n[base]", "$.base.train.beta1"),
        ("learning_rate = 1e-3", "learning_rate = 0", "$.train.learning_rate"),
        (
            "learning_rate = 1e-3",
            'learning_rate = 1\nschedule = "Cosine"',
            "$.train.schedule",
        ),
        ("[data]", "[[data]]", "$.data"),
    ],
)
def test_the_schema_refuses_what_the_loader_refuses(
    tmp_path: Path, old: str, new: str, where: str
) -> None:
    text = edited((old, new))
    assert errors(text) == [where]
    problems_of(tmp_path, text)


def test_every_key_shows_its_help_and_default() -> None:
    properties: dict[str, Any] = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))[
        "properties"
    ]
    assert properties["train"]["properties"]["beta2"]["default"] == 0.95
    assert properties["train"]["properties"]["beta2"]["description"]
    assert properties["train"]["required"] == ["global_batch_tokens", "learning_rate"]
    override = properties["growth"]["items"]["properties"]["train"]
    assert override["properties"].keys() == properties["train"]["properties"].keys()
    assert "required" not in override
    assert (
        "default" not in override["properties"]["beta2"]
    )  # what is not overridden comes from [train]
