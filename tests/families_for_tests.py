"""A tiny model of every family, tied and untied, with heads of a width of their own and with scaled frequencies; and the
families as recipes name them. README's table of families has a cell for what is tested over these."""

from __future__ import annotations

from stackgrow.recipe.keys import Model, RopeScaling

SIZES = {"dim": 48, "n_layers": 2, "n_heads": 4, "ffn_dim": 88, "vocab_size": 97}
# Wavelengths of tiny heads: some are left alone, some scaled in part, some in full.
SCALING = RopeScaling(factor=8.0, original_length=64)


def tiny(family: str, **more: object) -> Model:
    return Model(**{"family": family, **SIZES, "n_kv_heads": 2, **more})  # type: ignore[arg-type]


TINY = {
    "llama2": tiny("llama2"),
    "llama3": tiny("llama3", rope_scaling=SCALING),
    "llama3, tied": tiny("llama3", rope_scaling=SCALING, tie_embeddings=True),
    "mistral": tiny("mistral"),
    "mistral, own head_dim": tiny("mistral", head_dim_=16),
    "qwen3": tiny("qwen3", head_dim_=16),
    "qwen3, tied": tiny("qwen3", head_dim_=16, tie_embeddings=True),
    "smollm2": tiny("smollm2"),
    "qwen2": tiny("qwen2"),
    "qwen2, tied": tiny("qwen2", tie_embeddings=True),
}
# Those whose layers are compiled in each run of the tests.
COMPILED = ("llama2", "llama3", "mistral, own head_dim", "qwen3", "smollm2", "qwen2")
# What tests/e2e/test_family_runs.py sets in its recipe, whose family is llama2: that one is trained by all of tests/e2e.
RUNS = {
    "qwen3, tied": [
        "model.family=qwen3",
        "model.head_dim=32",
        "model.tie_embeddings=true",
    ],
    "smollm2": ["model.family=smollm2"],
    "llama3, scaled": [
        "model.family=llama3",
        "model.rope_scaling.factor=8.0",
        "model.rope_scaling.original_length=128",
    ],
    "mistral": ["model.family=mistral"],
    "qwen2": ["model.family=qwen2"],
}
