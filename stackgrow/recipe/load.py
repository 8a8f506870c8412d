"""Reading a recipe: bytes -> TOML -> ``--set`` overrides -> Recipe, with every problem reported at once."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli

from stackgrow.errors import RunError
from stackgrow.recipe.keys import Recipe
from stackgrow.recipe.write import _join, toml_name

MAX_BYTES = 1 << 17  # a recipe is a page of text: anything larger is a mistake or an attack
Problem = tuple[str, str]


class RecipeError(RunError, ValueError):
    """Everything that is wrong with one recipe; ``problems`` holds (TOML path, message) pairs."""

    exit_code = 2

    def __init__(self, file: str | Path, problems: Sequence[Problem]):
        self.problems = list(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        lines = [f"  {where}: {what}" if where else f"  {what}" for where, what in self.problems]
        super().__init__("\n".join([f"{file}: {count}", *lines]))


def load_recipe(file: str | Path, sets: Sequence[str] = (), *, trusted: bool = False) -> Recipe:
    """The recipe in ``file`` with ``sets`` ("train.compile=true") applied.

    ``trusted`` files, such as the recipe.toml that a run wrote itself, may name paths anywhere.

    Raises:
        RecipeError: unreadable file, bad TOML, unknown keys, wrong types or values; all of them at once.
    """
    raw = _read_toml(Path(file))
    problems: list[Problem] = []
    for assignment in sets:
        try:
            _apply_set(raw, assignment)
        except ValueError as error:
            problems.append((f"--set {assignment}", str(error)))
    if not trusted:
        problems += _path_problems(raw, [assignment.partition("=")[0].strip() for assignment in sets])
    recipe = _build(Recipe, raw, "", problems)
    if problems:
        raise RecipeError(file, problems)
    return recipe


def _read_toml(file: Path) -> dict[str, Any]:
    def fail(message: str) -> RecipeError:
        return RecipeError(file, [("", message)])

    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except IsADirectoryError as error:
        raise fail("is a directory; name the recipe file in it") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise fail(f"cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if len(content) > MAX_BYTES:
        raise fail(f"is larger than {MAX_BYTES} bytes; a recipe is a page of text")
    try:
        raw = tomli.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise fail(f"is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except RecursionError as error:
        raise fail("is not valid TOML: nested too deeply") from error
    except ValueError as error:  # TOMLDecodeError is one; so is a number with too many digits
        raise fail(f"is not valid TOML: {error}") from error
    if not raw:
        raise fail("is empty; copy recipes/quickstart.toml and edit it")
    return raw


def _path_problems(raw: Mapping[str, Any], typed: Sequence[str]) -> Iterator[Problem]:
    """A recipe can come from a stranger, so its own paths stay below the working directory. Keys in ``typed``
    were set by the user on the command line, and may name any path."""
    for where, value in _paths(raw):
        if not isinstance(value, str) or any(where.startswith((f"{key}.", f"{key}[")) or where == key for key in typed):
            continue
        if value.startswith(("/", "~")) or ".." in Path(value).parts:
            yield (
                where,
                f"{_show(value)} leaves the working directory; write a relative path here, "
                f"or give this one on the command line: --set {where}=...",
            )


def _paths(raw: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    names = ("data", "base", "run", "eval")
    data, base, run, evaluate = (raw[name] if isinstance(raw.get(name), dict) else {} for name in names)
    yield from (("data.path", data.get("path")), ("base.from", base.get("from")), ("run.folder", run.get("folder")))
    yield "eval.include", evaluate.get("include")
    for i, row in enumerate(data["mix"] if isinstance(data.get("mix"), list) else []):
        yield f"data.mix[{i}].path", row.get("path") if isinstance(row, dict) else None


def _apply_set(raw: dict[str, Any], assignment: str) -> None:
    """Writes ``growth[0].timing=10B`` into the raw tables; the value is TOML, or else a plain string."""
    where, equals, text = assignment.partition("=")
    steps: list[str | int] = []
    for part in where.strip().split("."):
        match = re.fullmatch(r"([A-Za-z0-9_-]+)((?:\[[0-9]{1,6}\])*)", part)
        if not match or not equals:
            raise ValueError("write it as section.key=value, for example --set parallel.tensor=2")
        steps += [match[1], *(int(i) for i in re.findall(r"[0-9]+", match[2]))]
    try:
        value = tomli.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text.strip()
    node: Any = raw
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        if isinstance(step, int) and not (isinstance(node, list) and step < len(node)):
            entries = len(node) if isinstance(node, list) else 0
            raise ValueError(f"there is no entry [{step}]: the recipe has {entries} there, counted from 0")
        if isinstance(step, str) and not isinstance(node, dict):
            raise ValueError(f'"{step}" cannot be set: what holds it is not a table')
        if following is None:
            node[step] = value
        elif isinstance(step, str):
            node = node.setdefault(step, {}) if isinstance(following, str) else node.get(step)
        else:
            node = node[step]


def _build(cls: Any, raw: Any, where: str, problems: list[Problem], *, partial: bool = False) -> Any:
    """An instance of dataclass ``cls`` from a raw table; ``partial``: a dict of the keys that are given."""
    if not isinstance(raw, dict):
        header = f"[[{where.partition('[')[0]}]]" if where.endswith("]") else f"[{where}]"
        problems.append((where, f"{_show(raw)} must be a table {header}"))
        return None
    fields = {toml_name(f): f for f in dataclasses.fields(cls)}
    for name in raw:
        if name not in fields:
            problems.append((_join(where, name), _unknown(name, list(fields), where)))
    values: dict[str, Any] = {}
    for name, spec in fields.items():
        inner = _join(where, name)
        if partial and name not in raw:
            continue
        if "kind" in spec.metadata:
            values[spec.name] = _value(spec, raw, inner, problems)
        elif "overrides" in spec.metadata:
            values[spec.name] = _build(spec.metadata["overrides"], raw.get(name, {}), inner, problems, partial=True)
        else:
            values[spec.name] = _table(spec, raw, inner, problems)
    return values if partial else cls(**values)


def _value(spec: dataclasses.Field[Any], raw: Mapping[str, Any], where: str, problems: list[Problem]) -> Any:
    kind, name = spec.metadata["kind"], toml_name(spec)
    if name not in raw:
        if spec.metadata["required"]:
            problems.append((where, f"is missing; it must be {kind.rule} ({spec.metadata['help']})"))
        return spec.default
    if isinstance(raw[name], dict) and (cls := spec.metadata["or_table"]):
        return _build(cls, raw[name], where, problems)
    try:
        return kind.parse(raw[name])
    except ValueError:
        problems.append((where, f"{_show(raw[name])} must be {kind.rule}"))
        return spec.default


def _table(spec: dataclasses.Field[Any], raw: Mapping[str, Any], where: str, problems: list[Problem]) -> Any:
    meta = spec.metadata
    if meta["many"]:
        rows = raw.get(spec.name, [])
        if not isinstance(rows, list):
            problems.append(
                (where, f"{_show(rows)} must be an array of tables: write [[{where}]] with double brackets")
            )
            return ()
        return tuple(_build(meta["table"], row, f"{where}[{i}]", problems) for i, row in enumerate(rows))
    if spec.name not in raw:
        if meta["required"]:
            problems.append((where, f"is missing; add a table [{where}] ({meta['help']})"))
            return None
        if meta["optional"]:
            return None
    return _build(meta["table"], raw.get(spec.name, {}), where, problems)


def _unknown(name: str, known: list[str], where: str) -> str:
    close = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=1)
    if close:
        return f"unknown key; did you mean {_join(where, close[0])}?"
    return f"unknown key; known here: {', '.join(known)}"


def _show(value: Any) -> str:
    """A given value in one short line of printable ASCII."""
    try:
        text = str(value) if isinstance(value, float) else json.dumps(value, default=str)
    except (ValueError, RecursionError):  # a number too long to print, tables too deep
        text = f"this {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
