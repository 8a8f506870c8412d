"""Reading a recipe: bytes -> TOML -> ``--set`` overrides -> Recipe, with every problem reported at once."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli

from stackgrow.errors import RunError, disk_error
from stackgrow.recipe.keys import Recipe, Run
from stackgrow.recipe.write import toml_name

MAX_BYTES = (
    1 << 17
)  # a recipe is a page of text: anything larger is a mistake or an attack
SET_SYNTAX = "write it as section.key=value, for example --set parallel.tensor=2 or --set growth[0].timing=10B"
Problem = tuple[str, str]


class RecipeError(RunError, ValueError):
    """Everything that is wrong with one recipe; ``problems`` holds (TOML path, message) pairs."""

    exit_code = 2

    def __init__(self, file: str | Path, problems: Sequence[Problem]):
        self.problems = list(problems)
        count = len(self.problems)
        lines = [
            f"{file}: {count} problem" if count == 1 else f"{file}: {count} problems"
        ]
        for where, message in self.problems:
            lines.append(f"  {where}: {message}" if where else f"  {message}")
        super().__init__("\n".join(lines))


def load_recipe(
    file: str | Path, sets: Sequence[str] = (), *, trusted: bool = False
) -> Recipe:
    """The recipe in ``file`` with ``sets`` ("train.compile=true") applied.

    ``trusted`` files, such as the recipe.toml that a run wrote itself, may name paths anywhere.

    Raises:
        RecipeError: no such file, bad TOML, unknown keys, wrong types or values; all of them at once.
        DiskError: the file may not be read.
    """
    # Every step adds its problems and goes on, so that all are told at once.
    raw = _read_toml(Path(file))
    problems: list[Problem] = []
    for assignment in sets:
        try:
            _apply_set(raw, assignment)
        except ValueError as error:
            problems.append((f"--set {assignment}", str(error)))
    if not trusted:
        problems += _path_problems(raw, _keys(sets))
        problems += _command_problems(raw, _keys(sets))
    recipe = _build(Recipe, raw, "", problems)
    if problems:
        raise RecipeError(file, problems)
    if recipe.eval and not recipe.eval.tasks:  # switched off, by --set or in the file
        return dataclasses.replace(recipe, eval=None)
    return recipe


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        raw = _parse_toml(_read_bytes(file))
    except ValueError as error:
        raise RecipeError(file, [("", str(error))]) from error
    return raw


def _read_bytes(file: Path) -> bytes:
    """The whole file. Raises ValueError with what is wrong with it."""
    try:
        if file.is_fifo():
            raise ValueError("a pipe, which would be waited for without end")
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except IsADirectoryError as error:
        raise ValueError("is a directory; name the recipe file in it") from error
    except PermissionError as error:  # nothing is wrong with the recipe
        raise disk_error(error) from error
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # a pipe, or a NUL byte in the name
        raise ValueError(f"cannot be read ({error})") from error
    if len(content) > MAX_BYTES:
        raise ValueError(
            f"is larger than {MAX_BYTES} bytes; a recipe is a page of text"
        )
    return content


def _parse_toml(content: bytes) -> dict[str, Any]:
    """The raw tables. Raises ValueError with what is wrong with the text."""
    try:
        raw = tomli.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error
    except RecursionError as error:
        raise ValueError("is not valid TOML: nested too deeply") from error
    except (
        ValueError
    ) as error:  # TOMLDecodeError is one; so is a number with too many digits
        raise ValueError(
            f"is not valid TOML: {error}{_remedy(content.decode('utf-8-sig'), str(error))}"
        ) from error
    if not raw:
        raise ValueError("is empty; copy recipes/quickstart.toml and edit it")
    return raw


def _remedy(text: str, error: str) -> str:
    """What to write instead, where the line that TOML does not read has a value that only lacks its quotes."""
    number = re.search(r"at line ([0-9]+)", error)
    lines = text.splitlines()
    if number and int(number[1]) <= len(lines):
        line = lines[int(number[1]) - 1]
    elif lines:
        line = lines[-1]
    match = re.fullmatch(
        r"\s*([A-Za-z0-9_.-]+)\s*=\s*([A-Za-z0-9][A-Za-z0-9 %._/-]{0,100}?)\s*(?:#.*)?",
        line,
    )
    if match is None:
        return ""
    key, value = match[1], match[2]
    if value in ("True", "False"):
        return f"; write {key} = {value.lower()}"
    return f'; put the value in quotes: {key} = "{value}"'


def _command_problems(
    raw: Mapping[str, Any], keys_set: Sequence[str]
) -> Iterator[Problem]:
    """A recipe can come from a stranger: what is run in a shell is the user's own words."""
    run = raw.get("run")
    if not isinstance(run, dict):
        return
    for spec in dataclasses.fields(Run):
        where = f"run.{spec.name}"
        if spec.metadata["typed_only"] and spec.name in run and where not in keys_set:
            yield (
                where,
                f"a recipe may not name a command; give it on the command line: --set {where}=...",
            )


def _path_problems(
    raw: Mapping[str, Any], keys_set: Sequence[str]
) -> Iterator[Problem]:
    """A recipe can come from a stranger, so its own paths stay below the working directory. Keys in ``keys_set``
    were set by the user on the command line, and may name any path."""
    for where, value in _paths(raw):
        if not isinstance(value, str) or _is_within(where, keys_set):
            continue
        if value.startswith(("/", "~")) or ".." in Path(value).parts:
            message = (
                f"{_show(value)} leaves the working directory; write a relative path here, "
                f"or give this one on the command line: --set {where}=..."
            )
            yield where, message


def is_set(where: str, sets: Sequence[str]) -> bool:
    """Whether the user has given a key on the command line, alone or with the table that it is in."""
    return _is_within(where, _keys(sets))


def _keys(sets: Sequence[str]) -> list[str]:
    return [assignment.partition("=")[0].strip() for assignment in sets]


def _is_within(where: str, keys: Sequence[str]) -> bool:
    """Whether a key is one of ``keys`` or lies in one: data.mix[0].path in data, data.mix and data.mix[0]."""
    return any(where == key or where.startswith((f"{key}.", f"{key}[")) for key in keys)


def _paths(raw: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every key that holds a path, and what the recipe gives there, whatever it is."""
    for name in ("data.path", "base.from", "run.folder", "eval.include"):
        table, _, key = name.partition(".")
        yield name, _get(raw.get(table), key)
    mix = _get(raw.get("data"), "mix")
    if isinstance(mix, list):
        for index, row in enumerate(mix):
            yield f"data.mix[{index}].path", _get(row, "path")


def _get(table: Any, key: str) -> Any:
    return table.get(key) if isinstance(table, dict) else None


def _apply_set(raw: dict[str, Any], assignment: str) -> None:
    """Writes ``growth[0].timing=10B`` into the raw tables; the value is TOML, or else a plain string."""
    where, equals, text = assignment.partition("=")
    if not equals:
        raise ValueError(SET_SYNTAX)
    steps = _steps(where)
    node: Any = raw
    for step, following in itertools.pairwise(steps):
        _require_step(node, step)
        if isinstance(step, str) and isinstance(following, str):
            node = node.setdefault(step, {})
        elif isinstance(step, str):
            node = node.get(step)  # a list, or None, in which nothing is found
        else:
            node = node[step]
    _require_step(node, steps[-1])
    node[steps[-1]] = _set_value(steps, text)


def _steps(where: str) -> list[str | int]:
    """``growth[0].timing`` as ["growth", 0, "timing"]."""
    steps: list[str | int] = []
    for part in where.strip().split("."):
        match = re.fullmatch(r"([A-Za-z0-9_-]+)((?:\[[0-9]{1,6}\])*)", part)
        if not match:
            raise ValueError(SET_SYNTAX)
        steps.append(match[1])
        for index in re.findall(r"[0-9]+", match[2]):
            steps.append(int(index))
    return steps


def _require_step(node: Any, step: str | int) -> None:
    """Raises ValueError where ``step`` leads nowhere from ``node``."""
    if isinstance(step, str) and isinstance(node, list):
        rule = f"name one of its entries, counted from 0, as in growth[0].{step}"
        raise ValueError(
            f'"{step}" cannot be set: what holds it is not a table but a list; {rule}'
        )
    if isinstance(step, str) and not isinstance(node, dict):
        raise ValueError(f'"{step}" cannot be set: what holds it is not a table')
    if isinstance(step, int):
        entries = len(node) if isinstance(node, list) else 0
        if step >= entries:
            raise ValueError(
                f"there is no entry [{step}]: the recipe has {entries} there, counted from 0"
            )


def _set_value(steps: Sequence[str | int], text: str) -> Any:
    """The value of a ``--set``: TOML, or else words as they stand. A name may look like a date, and is none."""
    words = text.strip()
    try:
        value = tomli.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return words
    if _is_text(steps) and not isinstance(value, str):
        return words
    return value


def _is_text(steps: Sequence[str | int]) -> bool:
    """Whether the key holds a name, a path or a word."""
    spec = None
    table: type | None = Recipe
    for step in steps:
        if isinstance(step, int):
            continue
        spec = _fields(table).get(step) if table else None
        if spec is None:
            return False
        table = _table_of(spec)
    return (
        spec is not None and "kind" in spec.metadata and spec.metadata["kind"].is_text
    )


@functools.cache
def _fields(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """The keys of a table, as TOML spells them."""
    return {toml_name(spec): spec for spec in dataclasses.fields(cls)}


def _table_of(spec: dataclasses.Field[Any]) -> type | None:
    """The class that describes the table under a key; None where it is no table."""
    meta = spec.metadata
    return meta.get("table") or meta.get("overrides") or meta.get("or_table")


def _build(
    cls: Any, raw: Any, where: str, problems: list[Problem], *, partial: bool = False
) -> Any:
    """An instance of dataclass ``cls`` from a raw table; ``partial``: a dict of the keys that are given."""
    if not isinstance(raw, dict):
        problems.append((where, f"{_show(raw)} must be a table {_header(where)}"))
        return None
    fields = _fields(cls)
    for name in raw:
        if name not in fields:
            problems.append((_join(where, name), _unknown(name, cls, where)))
    values: dict[str, Any] = {}
    for name, spec in fields.items():
        if name in raw or not partial:
            values[spec.name] = _build_key(spec, raw, _join(where, name), problems)
    return values if partial else cls(**values)


def _header(where: str) -> str:
    """How a table is opened: [train], and [[growth]] for growth[0]."""
    array, bracket, _ = where.partition("[")
    return f"[[{array}]]" if bracket else f"[{where}]"


def _build_key(
    spec: dataclasses.Field[Any],
    raw: Mapping[str, Any],
    where: str,
    problems: list[Problem],
) -> Any:
    """The value of one key, which is given or not: a single value, a table of overrides, a table, or several."""
    meta = spec.metadata
    if "kind" in meta:
        return _value(spec, raw, where, problems)
    given = raw.get(spec.name)
    if "overrides" in meta:
        table = {} if given is None else given
        return _build(meta["overrides"], table, where, problems, partial=True)
    if meta["many"]:
        return _tables(meta["table"], given, where, problems)
    if given is None and meta["required"]:
        problems.append((where, f"is missing; add a table [{where}] ({meta['help']})"))
        return None
    if given is None and meta["optional"]:
        return None
    return _build(meta["table"], {} if given is None else given, where, problems)


def _value(
    spec: dataclasses.Field[Any],
    raw: Mapping[str, Any],
    where: str,
    problems: list[Problem],
) -> Any:
    kind = spec.metadata["kind"]
    name = toml_name(spec)
    if name not in raw:
        if spec.metadata["required"]:
            problems.append(
                (where, f"is missing; it must be {kind.rule} ({spec.metadata['help']})")
            )
        return spec.default
    given = raw[name]
    if isinstance(given, dict) and spec.metadata["or_table"]:
        return _build(spec.metadata["or_table"], given, where, problems)
    try:
        return kind.parse(given)
    except ValueError:
        problems.append((where, f"{_show(given)} must be {kind.rule}"))
        return spec.default


def _tables(
    cls: type, rows: Any, where: str, problems: list[Problem]
) -> tuple[Any, ...]:
    """One instance of ``cls`` for each table of an array."""
    if rows is None:
        return ()
    if not isinstance(rows, list):
        message = f"{_show(rows)} must be an array of tables: write [[{where}]] with double brackets"
        problems.append((where, message))
        return ()
    tables = []
    for index, row in enumerate(rows):
        tables.append(_build(cls, row, f"{where}[{index}]", problems))
    return tuple(tables)


def _join(where: str, name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        name = json.dumps(name)
    return f"{where}.{name}" if where else name


def _unknown(name: str, cls: type, where: str) -> str:
    """What is wrong with a key that table ``where`` does not have."""
    below, _, _ = where.partition("[")
    # A right key in the wrong table is more likely than a key that happens to look like it.
    homes = [
        header for header, table in _tables_in(cls, below) if name in _fields(table)
    ]
    if homes:
        return f"unknown key; it belongs in {' or '.join(homes)}"
    known = list(_fields(cls))
    close = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=1)
    if close:
        return f"unknown key; did you mean {_join(where, close[0])}?"
    return f"unknown key; known here: {', '.join(known)}"


@functools.cache
def _tables_in(cls: type, where: str) -> list[tuple[str, type]]:
    """The headers of the tables in table ``where``, those in them too, and the class of each."""
    tables: list[tuple[str, type]] = []
    for name, spec in _fields(cls).items():
        table = _table_of(spec)
        if table is not None:
            inner = _join(where, name)
            header = f"[[{inner}]]" if spec.metadata.get("many") else f"[{inner}]"
            tables.append((header, table))
            tables += _tables_in(table, inner)
    return tables


def _show(value: Any) -> str:
    """A given value in one short line of printable ASCII."""
    try:
        text = (
            str(value) if isinstance(value, float) else json.dumps(value, default=str)
        )
    except (ValueError, RecursionError):  # a number too long to print, tables too deep
        text = f"this {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
