"""Depthwise growth: every target layer is a copy of a source layer, named by a layer map."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from stackgrow.growth.rules import Alias, GrowthError, Rules

if TYPE_CHECKING:
    from stackgrow.recipe.keys import Model

# What a copied layer computes depends on all of these, and equal tensor shapes do not imply them.
GEOMETRY = (
    "family",
    "dim",
    "n_heads",
    "kv_heads",
    "ffn_dim",
    "vocab_size",
    "norm_eps",
    "rope_theta",
    "rope_scaling",
    "head_dim",
    "tie_embeddings",
    "qk_norm",
    "attention_bias",
)


def stack_map(n_source: int, n_target: int) -> list[int]:
    """G_stack, Algorithm 1 of arXiv 2405.15319: layer i is source layer i mod n_source (0 1 2 0 1 2)."""
    _check_counts(n_source, n_target)
    return [i % n_source for i in range(n_target)]


def interleave_map(n_source: int, n_target: int) -> list[int]:
    """Every source layer is repeated in place (0 0 1 1 2 2); n_target must be a multiple of n_source."""
    _check_counts(n_source, n_target)
    if n_target % n_source:
        below = n_target // n_source * n_source
        raise GrowthError(
            f"interleaving repeats all {n_source} layers equally often, and {n_target} is not a multiple: "
            f"use {below} or {below + n_source} target layers"
        )
    return [i * n_source // n_target for i in range(n_target)]


def kept_connections(layer_map: Sequence[int]) -> int:
    """How many neighbours in the target follow each other in the source too: Con_r of the connection rate
    R_c = Con_r / (L - 1) (appendix H.2, eq. 51; Table 5)."""
    kept = 0
    for lower, upper in pairwise(layer_map):
        if upper == lower + 1:
            kept += 1
    return kept


def depth_rules(layer_map: Sequence[int], source: Model, target: Model) -> Rules:
    """Target layer i is source layer ``layer_map[i]``; embeddings, final norm and head are kept.

    Any map is allowed, also one that omits source layers: their tensors are recorded as dropped. Raises
    GrowthError where the map does not fit the layer counts, or the models differ in more than depth.
    """
    _check_layer_map(layer_map, source, target)
    _check_same_geometry(source, target)
    targets = {name: Alias(_source_name(name, layer_map)) for name in target.tensors()}
    dropped = set()
    for name in source.tensors():
        layer = _layer_of(name)
        if layer is not None and layer not in layer_map:
            dropped.add(name)
    return Rules(targets, source.tensors(), target.tensors(), frozenset(dropped))


def _check_counts(n_source: int, n_target: int) -> None:
    if not 1 <= n_source <= n_target:
        raise GrowthError(
            f"depth growth needs 1 <= source layers <= target layers, not {n_source} -> {n_target}"
        )


def _check_layer_map(layer_map: Sequence[int], source: Model, target: Model) -> None:
    if len(layer_map) != target.n_layers:
        raise GrowthError(
            f"the layer map has {len(layer_map)} entries and the target model {target.n_layers} layers: "
            "name one source layer for each target layer"
        )
    wrong = sorted({i for i in layer_map if not 0 <= i < source.n_layers})
    if wrong:
        raise GrowthError(
            f"the layer map names layers {wrong}; the source model has 0 to {source.n_layers - 1}"
        )


def _check_same_geometry(source: Model, target: Model) -> None:
    changes = []
    for key in GEOMETRY:
        before, after = getattr(source, key), getattr(target, key)
        if before != after:
            changes.append(f"{key} {before!r} -> {after!r}")
    if changes:
        raise GrowthError(
            f"depth growth changes n_layers alone, but the models differ in {', '.join(changes)}"
        )


def _layer_of(name: str) -> int | None:
    """``layers.3.ffn_norm.weight`` -> 3; None for a tensor outside of the layers."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "layers" else None


def _source_name(name: str, layer_map: Sequence[int]) -> str:
    layer = _layer_of(name)
    if layer is None:
        return name
    return name.replace(f"layers.{layer}.", f"layers.{layer_map[layer]}.", 1)
