"""A tiny model of every family, tied and untied, with heads of a width of their own and with scaled frequencies."""

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
