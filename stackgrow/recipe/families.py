"""The families of models: what each is where [model] does not say otherwise.

All are one decoder: RMSNorm before attention and before a SwiGLU layer, rotary embeddings, grouped-query attention.
What tells them apart are the fields below, each of which is a key of [model] too. Mixtures of experts are none of them:
their routers would have to be grown, for which no operator here is defined.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    name: str
    models: str  # published ones
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    head_dim: int | None = None  # None: dim / n_heads
    tie_embeddings: bool = False
    qk_norm: bool = False
    attention_bias: bool = False  # of queries, keys and values


_TABLE = (
    Family(name="llama2", models="Llama 2, TinyLlama, Yi"),
    Family(name="llama3", models="Llama 3, 3.1, 3.2, 3.3", rope_theta=500000.0),
    Family(
        name="mistral",
        models="Mistral without a sliding window: 7B v0.2 and v0.3, Nemo",
        rope_theta=1000000.0,
    ),
    Family(
        name="qwen3",
        models="Qwen 3, dense",
        norm_eps=1e-6,
        rope_theta=1000000.0,
        head_dim=128,
        qk_norm=True,
    ),
    Family(
        name="smollm2",
        models="SmolLM 2",
        rope_theta=100000.0,
        tie_embeddings=True,
    ),
    Family(
        name="qwen2",
        models="Qwen 2, 2.5, dense",
        norm_eps=1e-6,
        rope_theta=1000000.0,
        attention_bias=True,
    ),
)
FAMILIES: Mapping[str, Family] = {family.name: family for family in _TABLE}
# The keys of [model] that a family gives, where they are not given there.
GIVEN = ("norm_eps", "rope_theta", "tie_embeddings", "qk_norm", "attention_bias")
# Of these, those that recipes had before there were families: a resolved recipe always states them.
ALWAYS_STATED = ("norm_eps", "rope_theta")
