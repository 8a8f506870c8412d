"""A Recipe as plain values, as TOML that reads back to it, and as a hash that does not depend on how it was written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import tomli_w

from stackgrow.recipe.keys import Model, Recipe
from stackgrow.recipe.values import Duration, Phase, Share


def toml_name(spec: dataclasses.Field[Any]) -> str:
    """A field's key; ``from_`` is ``from``, a word that Python keeps to itself."""
    return spec.name.rstrip("_")


def to_dict(value: Any) -> Any:
    """A recipe as plain TOML values: amounts with their unit, defaults filled in, absent tables left out, and
    what a model's family says."""
    if isinstance(value, (Duration, Share, Phase)):
        return str(value)
    if isinstance(value, dict):
        return {name: to_dict(entry) for name, entry in value.items()}
    if isinstance(value, tuple):
        return [to_dict(entry) for entry in value]
    if not dataclasses.is_dataclass(value):
        return value
    tree = {}
    implied = value.implied if isinstance(value, Model) else ()
    for spec in dataclasses.fields(value):
        entry = getattr(value, spec.name)
        is_absent = entry in (None, "", (), {}) or spec.name in implied
        if not is_absent and not spec.metadata.get("typed_only"):
            tree[toml_name(spec)] = to_dict(entry)
    return tree


def to_toml(recipe: Recipe) -> str:
    """The resolved recipe as TOML that ``load_recipe(..., trusted=True)`` reads back to an equal Recipe."""
    return tomli_w.dumps(to_dict(recipe))


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 over the resolved recipe; equal for equal recipes however they were written."""
    return canonical_hash(to_dict(recipe))


def canonical_hash(value: Any) -> str:
    """SHA-256 of a tree of plain values, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
