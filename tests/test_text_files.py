"""Every text file is opened as UTF-8, whatever the locale: under a Latin-1 one, "größere" would make a run unreadable."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FILES = sorted(
    path
    for room in ("stackgrow", "tools")
    for path in (REPOSITORY / room).rglob("*.py")
)
TEXT_METHODS = {
    "read_text": 0,
    "write_text": 1,
}  # name -> the place of ``encoding`` among its arguments


def calls_without_encoding(source: str) -> Iterator[int]:
    """Lines of calls that open a file as text and do not say how it is encoded."""
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Call)
            and _opens_text(node)
            and not _names_encoding(node)
        ):
            yield node.lineno


def _opens_text(call: ast.Call) -> bool:
    function = call.func
    if isinstance(function, ast.Attribute) and function.attr in TEXT_METHODS:
        return len(call.args) <= TEXT_METHODS[function.attr]
    if isinstance(function, ast.Name) and function.id == "open":
        return "b" not in _mode(call, 1)
    if isinstance(function, ast.Attribute) and function.attr == "open":
        # Other things have an ``open``, too: a file's has no argument, or a mode.
        if not call.args and not call.keywords:
            return True
        mode = _mode(call, 0)
        return mode != "" and set(mode) <= set("rwxa+t")
    return False


def _mode(call: ast.Call, place: int) -> str:
    given = [
        keyword.value for keyword in call.keywords if keyword.arg == "mode"
    ] + call.args[place : place + 1]
    for value in given:
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            return value.value
    return ""


def _names_encoding(call: ast.Call) -> bool:
    return any(keyword.arg == "encoding" for keyword in call.keywords)


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("path.read_text()", 1),
        ("path.write_text(text)", 1),
        ("open(path)", 1),
        ("open(path, 'w')", 1),
        ("path.open()", 1),
        ("path.open('a')", 1),
        ("path.read_text(encoding='utf-8')", 0),
        ("path.open('w', encoding='utf-8')", 0),
        ("open(path, 'rb')", 0),
        ("path.open('wb')", 0),
        ("TokenStore.open(folder)", 0),
        ("read_text(archive, name, 1)", 0),
    ],
)
def test_calls_without_an_encoding_are_found(line: str, count: int) -> None:
    assert len(list(calls_without_encoding(line))) == count


def test_every_text_file_says_utf_8() -> None:
    found = []
    for path in FILES:
        for line in calls_without_encoding(path.read_text(encoding="utf-8")):
            found.append(f"{path.relative_to(REPOSITORY)}:{line}")
    assert not found, "say encoding='utf-8'"
