"""TODO"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from stackgrow.recipe.keys import Recipe
from stackgrow.recipe.values import Duration, Phase, Share


def toml_name(spec: dataclasses.Field[Any]) -> str:
    """A field's key; ``from_`` is ``from``, a word that Python keeps to itself."""
    return spec.name.rstrip("_")


def _join(where: str, name: str) -> str:
    name = name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)
    return f"{where}.{name}" if where else name


def to_dict(value: Any) -> Any:
    """A recipe as plain TOML values: amounts with their unit, defaults filled in, absent tables left out."""
    if isinstance(value, (Duration, Share, Phase)):
        return str(value)
    if dataclasses.is_dataclass(value):
        fields = {toml_name(f): getattr(value, f.name) for f in dataclasses.fields(value)}
        return {name: to_dict(v) for name, v in fields.items() if v not in (None, "", (), {})}
    if isinstance(value, dict):
        return {name: to_dict(v) for name, v in value.items()}
    return [to_dict(v) for v in value] if isinstance(value, tuple) else value


def to_toml(recipe: Recipe) -> str:
    """The resolved recipe as TOML that ``load_recipe(..., trusted=True)`` reads back to an equal Recipe."""
    return "\n".join(_toml_lines(to_dict(recipe), "")).lstrip("\n") + "\n"


def _toml_lines(tree: Mapping[str, Any], where: str) -> Iterator[str]:
    def is_tables(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and isinstance(value[0], dict)

    for name, value in tree.items():
        if not isinstance(value, dict) and not is_tables(value):
            yield f"{name} = {_toml_value(value)}"
    for name, value in tree.items():
        inner = _join(where, name)
        if isinstance(value, dict):
            yield from ("", f"[{inner}]", *_toml_lines(value, inner))
        elif is_tables(value):
            for row in value:
                yield from ("", f"[[{inner}]]", *_toml_lines(row, inner))


def _toml_value(value: Any) -> str:
    # JSON's strings, booleans, integers and lists are TOML's; only floats such as 1e-05 need a look, and TOML
    # reads Python's shortest form of them.
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 over the resolved recipe; equal for equal recipes however they were written."""
    return canonical_hash(to_dict(recipe))


def canonical_hash(value: Any) -> str:
    """SHA-256 of a tree of plain values, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
