"""What each kind of value accepts and refuses, and that its JSON Schema says the same."""

from __future__ import annotations

import math
from typing import Any

import jsonschema
import pytest

from stackgrow.recipe import values
from stackgrow.recipe.values import Duration, Kind, nearest
from stackgrow.text import human

ACCEPTED: list[tuple[Kind, Any, Any]] = [
    (values.integer(), 1, 1),
    (values.integer(), 2**63 - 1, 2**63 - 1),
    (values.integer(also=(-1,)), -1, -1),
    (values.number(), 0, 0.0),
    (values.number(), 3, 3.0),
    (values.number(above=True), 5e-324, 5e-324),
    (values.boolean(), True, True),
    (values.choice("a", "b"), "b", "b"),
    (values.name(), "7b_gstack-2.1", "7b_gstack-2.1"),
    (values.path(), "data/a b/ü", "data/a b/ü"),
    (values.names(), ["arc_easy", "mmlu/x"], ("arc_easy", "mmlu/x")),
    (values.names(), [], ()),
    (values.tokens(), "750B", 750 * 10**9),
    (values.tokens(), "2Mi", 2 * 2**20),
    (values.tokens(), "1.005K", 1005),  # 1.005 * 1000 is 1004.9999999999999 in floats
    (values.tokens(), "1_000.5 K tokens", 1_000_500),
    (values.tokens(), 2_097_152, 2_097_152),
    (values.tokens(), "1 token", 1),
    (values.duration(), "0 steps", Duration(0, "steps")),
    (values.duration(), "3_000 steps", Duration(3000, "steps")),
    (values.duration(), "1 step", Duration(1, "steps")),
    (values.duration(), "10B", Duration(10**10, "tokens")),
    (values.duration(), "80000 tokens", Duration(80000, "tokens")),
    (values.duration(), "0", Duration(0, "tokens")),
    (values.duration(words=("auto",)), "auto", "auto"),
    (values.layer_list(), [0, 1, 0], (0, 1, 0)),
]

REFUSED: list[tuple[Kind, Any]] = [
    *(
        (values.integer(), v)
        for v in (0, -5, 2**63, 10.0, 1e3, True, "10", [1], {}, None)
    ),
    (values.integer(also=(-1,)), -2),
    (values.integer(0, 5), 6),
    *(
        (values.number(), v)
        for v in (-1e-9, math.nan, math.inf, 10**400, True, "1e-3", [1.0])
    ),
    (values.number(above=True), 0.0),
    (values.number(0, 1, below=True), 1.0),
    (values.number(0, 1), 1.1),
    *((values.boolean(), v) for v in (0, 1, "true", None)),
    *((values.choice("a", "b"), v) for v in ("A", "", 1, ["a"])),
    *(
        (values.name(), v)
        for v in (
            "",
            "a/b",
            "..",
            ".a",
            "a b",
            "a\u202eb",
            "a\u200bb",
            "a" * 65,
            "a\n",
            "ä",
            7,
        )
    ),
    *(
        (values.path(), v)
        for v in ("", "a\0b", "a\nb", "a\u202eb", "a\u200bb", "a" * 4096, 7)
    ),
    *((values.names(), v) for v in ("arc_easy", ["a b"], [""], [1], ["a\n"], None)),
    *(
        (values.tokens(), v)
        for v in (
            0,
            -1,
            1.5,
            True,
            "",
            "B",
            "1.5",
            "0.0001K",
            "1e9",
            "-1B",
            "1b",
            "1 GB",
        )
    ),
    *(
        (values.tokens(), v)
        for v in (
            "10 steps",
            "9" * 400 + ".0",
            "9" * 5000,
            2**63,
            "9999999T",
            "1\n",
            " 1B",
        )
    ),
    *(
        (values.duration(), v)
        for v in (3000, "3000.5 steps", "3 epochs", "-1 steps", "_ steps", "", True, [])
    ),
    (values.duration(1), "0 steps"),
    (values.duration(1), "0B"),
    (values.duration(words=("auto",)), "Auto"),
    (values.duration(), "9" * 5000 + " steps"),
    *(
        (values.layer_list(), v)
        for v in ([], [-1], [0.0], [True], ["0"], 0, "0 1", [10**6])
    ),
]


@pytest.mark.parametrize(
    ("kind", "given", "parsed"), ACCEPTED, ids=range(len(ACCEPTED))
)
def test_a_value_is_read_as_meant(kind: Kind, given: Any, parsed: Any) -> None:
    value = kind.parse(given)
    assert value == parsed
    assert type(value) is type(parsed)
    jsonschema.validate(
        given, kind.schema
    )  # an editor must not mark what the loader takes


@pytest.mark.parametrize(("kind", "given"), REFUSED, ids=range(len(REFUSED)))
def test_refused_with_the_rule(kind: Kind, given: Any) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        kind.parse(given)
    assert str(caught.value) == kind.rule


def test_negative_zero_is_zero() -> None:
    assert math.copysign(1, values.number().parse(-0.0)) == 1


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        (Duration(7, "steps"), 7),
        (Duration(0, "tokens"), 0),
        (Duration(1, "tokens"), 1),
        (Duration(1499, "tokens"), 1),
        (Duration(1500, "tokens"), 2),
        (Duration(10**18 + 10**3 - 1, "tokens"), 10**15 + 1),
    ],
)
def test_duration_in_steps_of_1000_tokens(duration: Duration, steps: int) -> None:
    assert duration.steps(1000) == steps


def test_nearest_is_exact_beyond_floats() -> None:
    assert nearest(2**62 + 1, 1) == 2**62 + 1
    assert nearest(-5, 10) == 0


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (750e9, "750B"),
        (999_600, "1M"),
        (999_424, "999K"),
        (1_881_147_392, "1.88B"),
        (12, "12"),
        (2.5e12, "2.5T"),
    ],
)
def test_amounts_have_three_digits_and_a_suffix(amount: float, text: str) -> None:
    assert human(amount) == text


@pytest.mark.parametrize(
    ("kind", "given", "number"),
    [
        (values.duration(share=True), "80000", "80000"),
        (values.duration(), "1_000.5", "1_000.5"),
        (values.phases(), ["512Ki for 3000"], "3000"),
    ],
)
def test_a_length_without_its_unit_is_refused_with_what_may_be_meant(
    kind: Kind, given: Any, number: str
) -> None:
    """80000 tokens and 80000 steps are different runs."""
    with pytest.raises(ValueError, match=f'"{number} tokens", "{number} steps"'):
        kind.parse(given)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(given, kind.schema)
