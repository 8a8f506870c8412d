"""Differences between trees are told leaf by leaf, never as whole dictionaries."""

from __future__ import annotations

import pytest

from stackgrow.text import differences


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ({"a": {"b": 1}}, {"a": {"b": 2}}, ["a.b: 1 -> 2"]),
        (
            {"growth": [{"factor": 2}]},
            {"growth": [{"factor": 4}]},
            ["growth[0].factor: 2 -> 4"],
        ),
        ({"growth": [{"factor": 2}]}, {"growth": []}, ["growth[0].factor: 2 -> None"]),
        (
            {},
            {"eval": {"tasks": ["x"], "batch": 8}},
            ["eval.batch: None -> 8", "eval.tasks: None -> ['x']"],
        ),
        ({"map": [0, 1]}, {"map": [0, 0]}, ["map: [0, 1] -> [0, 0]"]),
        ({"a": {}}, {"a": {}}, []),
        ({"a": 1}, {"a": {"b": 1}}, ["a: 1 -> {'b': 1}"]),
    ],
)
def test_every_leaf_that_differs_is_named(
    old: dict, new: dict, lines: list[str]
) -> None:
    assert list(differences(old, new)) == lines
