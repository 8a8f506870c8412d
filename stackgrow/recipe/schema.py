"""The recipe's keys for editors and readers: ``recipe.schema.json`` and the reference in recipes/REFERENCE.md.

``python -m stackgrow.recipe.schema`` writes both from the dataclasses in keys.py.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stackgrow.recipe.keys import Recipe
from stackgrow.recipe.write import to_dict, toml_name

SCHEMA_FILE = Path(__file__).parents[1] / "recipe.schema.json"
REFERENCE_FILE = Path(__file__).parents[2] / "recipes" / "REFERENCE.md"
BEGIN, END = "<!-- reference: written by `make schema` -->", "<!-- end of reference -->"


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe as parsed TOML: single keys; checks.py says how they fit."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "stackgrow recipe",
        **_object(Recipe),
    }


def _object(cls: type, partial: bool = False) -> dict[str, Any]:
    """The schema of one table; ``partial``: of a table that overrides single keys of it."""
    fields = [
        spec for spec in dataclasses.fields(cls) if not spec.metadata.get("typed_only")
    ]
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {toml_name(spec): _property(spec, partial) for spec in fields},
        "additionalProperties": False,
    }
    required = [spec.name for spec in fields if spec.metadata.get("required")]
    if required and not partial:
        schema["required"] = required
    return schema


def _property(spec: dataclasses.Field[Any], partial: bool) -> dict[str, Any]:
    meta = spec.metadata
    described = {"description": meta["help"]}
    if "overrides" in meta:
        return described | _object(meta["overrides"], partial=True)
    if "table" in meta:
        table = _object(meta["table"])
        return described | (
            {"type": "array", "items": table} if meta["many"] else table
        )
    schema = meta["kind"].schema
    if meta["or_table"]:
        schema = {"anyOf": [schema, _object(meta["or_table"])]}
    default = _default(spec)
    if default is not None and not partial:
        schema = schema | {"default": default}
    return described | schema


def _default(spec: dataclasses.Field[Any]) -> Any:
    """The default as written in TOML; None where there is none or "" stands for a computed one."""
    if spec.metadata["required"] or spec.default == "":
        return None
    return to_dict(spec.default)


def reference_markdown() -> str:
    """Every key of a recipe: its meaning, what it accepts, its default."""
    return "\n".join([BEGIN, "", *_section(Recipe, "Top level", ""), END])


def _section(cls: type, title: str, where: str) -> Iterator[str]:
    """The table of one class' keys, and after it the sections of the tables in it."""
    fields = dataclasses.fields(cls)
    yield f"### {title}"
    yield ""
    yield "| key | meaning | value | default |"
    yield "|---|---|---|---|"
    for spec in fields:
        meta = spec.metadata
        if "kind" in meta:
            yield f"| `{toml_name(spec)}` | {meta['help']} | {meta['kind'].rule} | {_default_cell(spec)} |"
        elif "overrides" in meta:
            yield f"| `[{where}.{spec.name}]` | {meta['help']} | a table | |"
    yield ""
    for spec in fields:
        meta = spec.metadata
        name = f"{where}.{spec.name}" if where else spec.name
        if "table" in meta:
            header = f"`[[{name}]]`" if meta["many"] else f"`[{name}]`"
            yield from _section(meta["table"], f"{header} {meta['help']}", name)
        elif meta.get("or_table"):
            help = (meta["or_table"].__doc__ or "").rstrip(".").lower()
            yield from _section(meta["or_table"], f"`[{name}]` {help}", "")


def _default_cell(spec: dataclasses.Field[Any]) -> str:
    default = _default(spec)
    if default is not None:
        return f"`{json.dumps(default)}`"
    return "required" if spec.metadata["required"] else ""


def schema_text() -> str:
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


def with_reference(readme: str) -> str:
    """``readme`` with the part between the two markers renewed."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return before + reference_markdown() + after


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
    REFERENCE_FILE.write_text(
        with_reference(REFERENCE_FILE.read_text(encoding="utf-8")), encoding="utf-8"
    )
    print(f"wrote {SCHEMA_FILE} and the reference in {REFERENCE_FILE}")
