"""The recipe's keys for editors and readers: ``recipe.schema.json`` and the reference in recipes/README.md.

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
README_FILE = Path(__file__).parents[2] / "recipes" / "README.md"
BEGIN, END = "<!-- reference: written by `make schema` -->", "<!-- end of reference -->"


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe as parsed TOML: single keys; checks.py says how they fit."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "stackgrow recipe"}
    return {**head, **_object(Recipe)}


def _object(cls: type, partial: bool = False) -> dict[str, Any]:
    """The schema of one table; ``partial``: of a table that overrides single keys of it."""
    fields = dataclasses.fields(cls)
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {toml_name(f): _property(f, partial) for f in fields},
        "additionalProperties": False,
    }
    required = [f.name for f in fields if f.metadata.get("required")]
    return {**schema, "required": required} if required and not partial else schema


def _property(spec: dataclasses.Field[Any], partial: bool) -> dict[str, Any]:
    meta = spec.metadata
    described = {"description": meta["help"]}
    if "overrides" in meta:
        return {**described, **_object(meta["overrides"], partial=True)}
    if "table" in meta:
        inner = _object(meta["table"])
        return {**described, **({"type": "array", "items": inner} if meta["many"] else inner)}
    default, schema = _default(spec), meta["kind"].schema
    if meta["or_table"]:
        schema = {"anyOf": [schema, _object(meta["or_table"])]}
    return {
        **described,
        **schema,
        **({"default": default} if default is not None and not partial else {}),
    }


def _default(spec: dataclasses.Field[Any]) -> Any:
    """The default as written in TOML; None where there is none or "" stands for a computed one."""
    return None if spec.metadata["required"] or spec.default == "" else to_dict(spec.default)


def reference_markdown() -> str:
    """Every key of a recipe: its meaning, what it accepts, its default."""
    return "\n".join([BEGIN, "", *_section(Recipe, "Top level", ""), END])


def _section(cls: type, title: str, where: str) -> Iterator[str]:
    yield from (f"### {title}", "", "| key | meaning | value | default |", "|---|---|---|---|")
    for spec in dataclasses.fields(cls):
        if "kind" in spec.metadata:
            default = "required" if spec.metadata["required"] else ""
            if (given := _default(spec)) is not None:
                default = f"`{json.dumps(given)}`"
            yield f"| `{toml_name(spec)}` | {spec.metadata['help']} | {spec.metadata['kind'].rule} | {default} |"
        elif "overrides" in spec.metadata:
            yield f"| `[{where}.{spec.name}]` | {spec.metadata['help']} | a table | |"
    yield ""
    for spec in dataclasses.fields(cls):
        if "table" in spec.metadata:
            name = f"{where}.{spec.name}" if where else spec.name
            header = f"`[[{name}]]`" if spec.metadata["many"] else f"`[{name}]`"
            yield from _section(spec.metadata["table"], f"{header} {spec.metadata['help']}", name)
        elif cls_ := spec.metadata.get("or_table"):
            yield from _section(cls_, f"`[{where}.{spec.name}]` {(cls_.__doc__ or '').rstrip('.').lower()}", "")


def schema_text() -> str:
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


def with_reference(readme: str) -> str:
    """``readme`` with the part between the two markers renewed."""
    before, rest = readme.split(BEGIN)
    return before + reference_markdown() + rest.split(END)[1]


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema_text())
    README_FILE.write_text(with_reference(README_FILE.read_text()))
    print(f"wrote {SCHEMA_FILE} and the reference in {README_FILE}")
