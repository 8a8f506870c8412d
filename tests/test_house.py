"""The order of the rooms, and how the code in them reads (house.py)."""

from __future__ import annotations

import ast

import pytest
from house import (
    MAY_SPELL,
    PACKAGE,
    REPOSITORY,
    ROOMS,
    TESTS,
    Import,
    circles,
    figures,
    imports,
    modules,
    spelled,
    upward,
    without_assertion,
)


def test_nothing_stands_outside_of_a_room() -> None:
    loose = {path.name for path in PACKAGE.glob("*.py")}
    assert loose == {"__init__.py", "text.py", "errors.py"}
    folders = {
        path.name
        for path in PACKAGE.iterdir()
        if path.is_dir() and path.name != "__pycache__"
    }
    assert folders == set(ROOMS) - {"text", "errors"}


def test_no_import_leads_upwards() -> None:
    found = list(imports())
    assert len(found) > 100
    assert [str(one) for one in found if upward(one)] == []


@pytest.mark.parametrize(
    "wrong",
    [
        ("growth.zero", "checkpoint.dcp"),
        ("data.order", "plan.stages"),
        ("seal.files", "recipe.keys"),
    ],
)
def test_an_import_upwards_is_noticed(wrong: tuple[str, str]) -> None:
    assert upward(Import(*wrong, line=1))


def test_no_module_needs_itself() -> None:
    assert circles() == []


@pytest.mark.parametrize(
    "room", [room for room in ROOMS if room not in ("text", "errors")]
)
def test_a_room_says_what_it_is_for(room: str) -> None:
    text = ast.get_docstring(ast.parse(modules()[room].read_text(encoding="utf-8")))
    assert text is not None
    assert "\nMay import: " in text
    assert "\nMust never know: " in text


def test_the_name_of_a_file_of_a_run_is_spelled_in_one_place() -> None:
    found = []
    for path in sorted([*PACKAGE.rglob("*.py"), *TESTS.rglob("*.py")]):
        where = path.relative_to(REPOSITORY).as_posix()
        if where not in MAY_SPELL:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found += [f"{where}:{line}: {name}" for line, name in spelled(tree)]
    assert found == [], "take it from stackgrow/run_folder/folder.py"


@pytest.mark.parametrize(
    "line",
    [
        "run / 'DONE'",
        "losses(run, 'metrics.jsonl')",
        "run / stage / 'checkpoint'",
        "stage / f'checkpoint/step-{step}'",
    ],
)
def test_a_name_that_is_spelled_again_is_noticed(line: str) -> None:
    assert list(spelled(ast.parse(line)))


def test_every_test_asserts_something() -> None:
    assert without_assertion() == []


def test_the_code_is_not_dense() -> None:
    """As torchtitan, mergekit and nanochat, which have 4.2 to 5.1 tokens per line, at their width of lines."""
    total = figures()
    assert total.tokens_per_line <= 5.8
    assert total.per_100_lines(total.nested_comprehensions) <= 0.1
