"""A family's defaults, what of them a resolved recipe states, and what no family can be."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipes_for_tests import RECIPE, edited, plan_of, problems_of, recipe_of

from stackgrow.recipe.families import FAMILIES
from stackgrow.recipe.keys import RopeScaling
from stackgrow.recipe.write import to_dict, to_toml

KEYS = ("norm_eps", "rope_theta", "tie_embeddings", "qk_norm", "attention_bias")
SCALED = ("model.rope_scaling.factor=8.0", "model.rope_scaling.original_length=1024")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_gives_the_defaults(tmp_path: Path, name: str) -> None:
    model = recipe_of(tmp_path, sets=[f"model.family={name}"]).model
    for key in KEYS:
        assert getattr(model, key) == getattr(FAMILIES[name], key)
    assert model.head_dim == (128 if name == "qwen3" else 16)
    changed = ["model.tie_embeddings=false", "model.head_dim=8", "model.rope_theta=7"]
    model = recipe_of(tmp_path, sets=[f"model.family={name}", *changed]).model
    assert (model.tie_embeddings, model.head_dim, model.rope_theta) == (False, 8, 7)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tied", ["true", "false"])
def test_a_resolved_recipe_reads_back_to_the_same_model(
    tmp_path: Path, name: str, tied: str
) -> None:
    sets = [f"model.family={name}", f"model.tie_embeddings={tied}", *SCALED]
    recipe = recipe_of(tmp_path, sets=[*sets, "model.head_dim=32"])
    assert recipe_of(tmp_path, to_toml(recipe)) == recipe
    assert recipe.model.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 1024)


def test_what_the_family_says_is_not_stated(tmp_path: Path) -> None:
    """The stage hashes of recipes that are older than families depend on it."""
    stated = to_dict(recipe_of(tmp_path).model)
    assert stated.keys() == {
        "family", "dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size", "norm_eps", "rope_theta", "init",
    }  # fmt: skip
    said = recipe_of(tmp_path, sets=["model.qk_norm=false"])
    assert to_dict(said.model) == stated


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_matrix_counts_once_and_multiplies_once(
    tmp_path: Path, tied: bool
) -> None:
    sets = [f"model.tie_embeddings={str(tied).lower()}"]
    (*_, last) = plan_of(tmp_path, sets=sets).train_stages
    model = last.model
    matrix = model.vocab_size * model.dim
    layers = model.non_embedding_parameters()
    assert model.parameters() == layers + (1 if tied else 2) * matrix
    assert last.flops_per_token == 6 * (layers + matrix)
    assert last.checkpoint_bytes == 12 * model.parameters()


def test_attention_is_as_wide_as_its_heads(tmp_path: Path) -> None:
    (*_, narrow) = plan_of(tmp_path).train_stages
    (*_, wide) = plan_of(tmp_path, sets=["model.head_dim=32"]).train_stages
    assert wide.attention_flops == 2 * narrow.attention_flops


REFUSED = {
    "odd heads": (["model.head_dim=15"], "model.head_dim", "15 must be even"),
    "bias and norm": (
        ["model.family=qwen2", "model.qk_norm=true"],
        "model.attention_bias",
        "no family in transformers has both",
    ),
    "freezing a tied matrix": (
        ["model.family=smollm2", "growth[1].freeze=4 steps"],
        "growth[1].freeze",
        "it freezes the embedding and trains the head, which are one matrix",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_defined_is_refused(tmp_path: Path, case: str) -> None:
    sets, where, message = REFUSED[case]
    assert message in problems_of(tmp_path, RECIPE, sets)[where]


def test_heads_of_their_own_width_need_not_divide_the_stream(tmp_path: Path) -> None:
    text = edited(("n_heads = 4", "n_heads = 3"))
    assert "model.n_heads" in problems_of(tmp_path, text)
    plan_of(tmp_path, text, ["model.head_dim=16"])


def test_random_does_not_widen_a_tied_model(tmp_path: Path) -> None:
    text = edited(("n_layers = 2\n", "model = { dim = 32, n_heads = 2 }\n"))
    text = text[: text.index("[[growth]]")] + text[text.index("[train]") :]
    growth = '[[growth]]\noperator = "random"\ntiming = "20K"\nramp = "4 steps"\n'
    plan_of(tmp_path, text + growth)
    problems = problems_of(tmp_path, text + growth, ["model.tie_embeddings=true"])
    assert any("the same numbers" in message for message in problems.values())
