"""The kinds of value that a recipe key can hold: how each is written in TOML, checked and described.

A kind parses one TOML value and raises ``ValueError`` with the rule that the value broke. It also has the
key's JSON Schema, so that an editor and the loader know the same rules.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

from stackgrow.text import SUFFIXES

MAX_INT = 2**63 - 1  # TOML's largest
MAX_DIGITS = 40  # in the text of an amount: enough for any, and too few to choke on
WHOLE_NUMBER = r"[0-9]+(?:_[0-9]+)*"
TOKENS = rf"({WHOLE_NUMBER}(?:\.[0-9]+)?) ?(K|M|B|T|Ki|Mi|Gi|Ti)?(?: ?tokens?)?"
STEPS = rf"({WHOLE_NUMBER}) ?steps?"
BARE_NUMBER = rf"{WHOLE_NUMBER}(?:\.[0-9]+)?"  # of tokens or of steps?
# A length in tokens says that it is one, unless it is 0 of either.
LENGTH_IN_TOKENS = (
    rf"{BARE_NUMBER} ?(?:(?:K|M|B|T|Ki|Mi|Gi|Ti)(?: ?tokens?)?|tokens?)|0"
)
SHARE = r"([0-9]+(?:\.[0-9]+)?) ?%"


@dataclass(frozen=True)
class Kind:
    """One kind of value: the rule in words, the parser, and the JSON Schema of what it accepts.

    ``is_text``: its values are words, which need no quotes on a command line even where TOML would read them as a date.
    """

    rule: str
    parse: Callable[[Any], Any]
    schema: dict[str, Any]
    is_text: bool = False


@dataclass(frozen=True)
class Duration:
    """A length of training, in tokens or in optimizer steps; a bare number has no meaning."""

    amount: int
    unit: str  # "tokens" or "steps"

    def __str__(self) -> str:
        return f"{self.amount} {self.unit}"

    def steps(self, tokens_per_step: int) -> int:
        """The nearest whole number of steps; at least 1 unless the amount is 0."""
        if self.unit == "steps" or self.amount == 0:
            return self.amount
        return max(1, nearest(self.amount, tokens_per_step))


@dataclass(frozen=True)
class Share:
    """A part of the token budget, in percent."""

    percent: Decimal

    def __str__(self) -> str:
        return f"{self.percent.normalize():f}%"

    def of(self, tokens: int) -> int:
        """That part of ``tokens``, to the nearest token."""
        return round(Fraction(self.percent) * tokens / 100)


@dataclass(frozen=True)
class Phase:
    """A length of training with a batch of its own."""

    batch: int  # tokens in one optimizer step
    length: Duration

    def __str__(self) -> str:
        return f"{self.batch} tokens for {self.length}"


@dataclass(frozen=True)
class Rewarm:
    """The learning rate rises from ``ratio`` times what it would be to that in ``rewarm_steps``."""

    rewarm_steps: int
    ratio: float


def nearest(amount: int, unit: int) -> int:
    """``amount / unit`` to the nearest whole number, halves up; exact where floats are not."""
    return (2 * amount + unit) // (2 * unit)


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise ValueError(rule)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _quoted(words: tuple[int | str, ...]) -> list[str]:
    """The words as TOML spells them."""
    return [json.dumps(word) for word in words]


def integer(
    low: int = 1, high: int = MAX_INT, also: tuple[int | str, ...] = ()
) -> Kind:
    """A whole number in [low, high], or one of ``also`` (such as -1 for "what is left", or a word)."""
    rule = f"a whole number of at least {low}"
    if high < MAX_INT:
        rule += f" and at most {high}"
    for word in _quoted(also):
        rule += f", or {word}"

    def parse(value: Any) -> int | str:
        if isinstance(value, str) and value in also:
            return value
        _require(_is_integer(value), rule)
        _require(low <= value <= high or value in also, rule)
        return value

    schema: dict[str, Any] = {"type": "integer", "minimum": low, "maximum": high}
    if also:
        schema = {"anyOf": [schema, {"enum": list(also)}]}
    return Kind(rule, parse, schema)


def number(
    low: float = 0.0,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
) -> Kind:
    """A finite number in [low, high]; ``above`` leaves ``low`` itself out, ``below`` leaves ``high`` out."""
    rule = f"a number above {low:g}" if above else f"a number of at least {low:g}"
    schema: dict[str, Any] = {"type": "number"}
    schema["exclusiveMinimum" if above else "minimum"] = low
    if high < math.inf:
        rule += f" and below {high:g}" if below else f" and at most {high:g}"
        schema["exclusiveMaximum" if below else "maximum"] = high

    def parse(value: Any) -> float:
        _require(_is_integer(value) or isinstance(value, float), rule)
        # Refuses NaN, infinity, and whole numbers that no float holds.
        _require(abs(value) <= sys.float_info.max, rule)
        _require(value > low if above else value >= low, rule)
        _require(value < high if below else value <= high, rule)
        return float(value) + 0.0  # -0.0 is 0.0

    return Kind(rule, parse, schema)


def boolean() -> Kind:
    rule = "true or false"

    def parse(value: Any) -> bool:
        _require(isinstance(value, bool), rule)
        return value

    return Kind(rule, parse, {"type": "boolean"})


def choice(*words: str) -> Kind:
    rule = f"one of {', '.join(_quoted(words))}"

    def parse(value: Any) -> str:
        _require(isinstance(value, str) and value in words, rule)
        return value

    return Kind(rule, parse, {"enum": list(words)}, is_text=True)


def operator(*names: str) -> Kind:
    """A growth operator by its name, or a function of the user's own, of which nothing is imported here."""
    quoted = ", ".join(f'"{name}"' for name in names)
    rule = f'one of {quoted}, or a function of your own, "my_package.my_module:rules"'
    identifier = r"[A-Za-z_][A-Za-z0-9_]{0,63}"
    pattern = rf"{identifier}(\.{identifier}){{0,15}}:{identifier}"

    def parse(value: Any) -> str:
        _require(isinstance(value, str), rule)
        _require(value in names or re.fullmatch(pattern, value) is not None, rule)
        return value

    schema = {
        "anyOf": [{"enum": list(names)}, {"type": "string", "pattern": f"^{pattern}$"}]
    }
    return Kind(rule, parse, schema)


def name() -> Kind:
    """An identifier that is also a safe file name: no separators, no control or bidirectional characters."""
    rule = "1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit"
    pattern = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"

    def parse(value: Any) -> str:
        _require(
            isinstance(value, str) and re.fullmatch(pattern, value) is not None, rule
        )
        return value

    return Kind(
        rule, parse, {"type": "string", "pattern": f"^{pattern}$"}, is_text=True
    )


def sha256() -> Kind:
    rule = "the 64 hexadecimal digits of a SHA-256"
    pattern = "[0-9a-fA-F]{64}"

    def parse(value: Any) -> str:
        _require(
            isinstance(value, str) and re.fullmatch(pattern, value) is not None, rule
        )
        return value.lower()

    return Kind(
        rule, parse, {"type": "string", "pattern": f"^{pattern}$"}, is_text=True
    )


def names() -> Kind:
    """Names of things that another program knows, such as lm-eval's tasks."""
    rule = "a list of names without blanks, or [] for none"

    def parse(value: Any) -> tuple[str, ...]:
        _require(isinstance(value, list), rule)
        for entry in value:
            _require(
                isinstance(entry, str)
                and entry.isprintable()
                and len(entry.split()) == 1,
                rule,
            )
        return tuple(value)

    return Kind(
        rule,
        parse,
        {
            "type": "array",
            "items": {"type": "string", "pattern": r"^\S+$"},
        },
    )


def path() -> Kind:
    """A path that can be printed; load.py keeps those of a recipe file below the working directory."""
    return text("a path without control or invisible characters")


def text(rule: str = "a line of text without control or invisible characters") -> Kind:
    def parse(value: Any) -> str:
        _require(isinstance(value, str) and 0 < len(value) < 4096, rule)
        _require(value.isprintable(), rule)
        return value

    return Kind(rule, parse, {"type": "string", "minLength": 1}, is_text=True)


def tokens() -> Kind:
    """An amount of tokens: ``"750B"``, ``"2Mi"`` (2 x 2^20), ``"1.5M tokens"`` or a whole number."""
    rule = 'an amount of tokens of at least 1, such as "750B", "2Mi" (= 2 x 2^20) or 2097152'

    def parse(value: Any) -> int:
        amount = _token_amount(value, rule) if isinstance(value, str) else value
        _require(_is_integer(amount), rule)
        _require(1 <= amount <= MAX_INT, rule)
        return amount

    as_text = {"type": "string", "pattern": f"^{TOKENS}$"}
    return Kind(rule, parse, {"anyOf": [as_text, {"type": "integer", "minimum": 1}]})


def _matched(pattern: str, given: str) -> re.Match[str] | None:
    """The whole text by the pattern of an amount; None where it is not one, or longer than any amount."""
    return re.fullmatch(pattern, given) if len(given) <= MAX_DIGITS else None


def _token_amount(given: str, rule: str) -> int:
    match = _matched(TOKENS, given)
    if match is None:
        raise ValueError(rule)
    digits = match[1].replace("_", "")
    suffix = match[2] or ""
    amount = (
        Fraction(digits) * SUFFIXES[suffix]
    )  # exact, where a float would lose tokens
    _require(amount.denominator == 1, rule)
    return int(amount)


def _length(given: str, rule: str) -> Duration:
    match = _matched(STEPS, given)
    if match is not None:
        return Duration(int(match[1]), "steps")
    if given != "0" and _matched(BARE_NUMBER, given) is not None:
        raise ValueError(
            f'an amount with its unit: "{given} tokens", "{given} steps", or a suffix as in "10B" (tokens)'
        )
    return Duration(_token_amount(given, rule), "tokens")


def _share(given: str, rule: str) -> Share | None:
    """A percentage; None for anything else."""
    match = _matched(SHARE, given)
    if match is None:
        return None
    percent = Decimal(match[1])
    _require(0 < percent < 100, rule)
    return Share(percent)


def duration(low: int = 0, words: tuple[str, ...] = (), *, share: bool = False) -> Kind:
    """A length of training with its unit, ``"10B"`` tokens or ``"3000 steps"``, or one of ``words``; with ``share``
    also ``"5%"`` of the token budget."""
    rule = f'an amount of at least {low} with its unit, "10B" (tokens) or "3000 steps"'
    pattern = f"{LENGTH_IN_TOKENS}|{STEPS}"
    if share:
        rule += ' or "5%" (of budget.tokens)'
        pattern += f"|{SHARE}"
    for word in _quoted(words):
        rule += f", or {word}"

    def parse(value: Any) -> Duration | Share | str:
        _require(isinstance(value, str), rule)
        if value in words:
            return value
        part = _share(value, rule) if share else None
        if part is not None:
            return part
        length = _length(value, rule)
        _require(low <= length.amount <= MAX_INT, rule)
        return length

    schema: dict[str, Any] = {"type": "string", "pattern": f"^({pattern})$"}
    if words:
        schema = {"anyOf": [schema, {"enum": list(words)}]}
    return Kind(rule, parse, schema)


def phases() -> Kind:
    """Batches that grow: ``["512Ki for 5B", "1Mi for 10B"]``."""
    rule = 'a list of a batch and how long it is used, such as ["512Ki for 5B", "1Mi for 2000 steps"]'

    def parse_phase(value: Any) -> Phase:
        _require(isinstance(value, str) and value.count(" for ") == 1, rule)
        batch, length = value.split(" for ")
        phase = Phase(_token_amount(batch, rule), _length(length, rule))
        _require(1 <= phase.batch <= MAX_INT, rule)
        _require(1 <= phase.length.amount <= MAX_INT, rule)
        return phase

    def parse(value: Any) -> tuple[Phase, ...]:
        _require(isinstance(value, list), rule)
        return tuple(parse_phase(entry) for entry in value)

    pattern = f"^({TOKENS}) for ({LENGTH_IN_TOKENS}|{STEPS})$"
    return Kind(
        rule, parse, {"type": "array", "items": {"type": "string", "pattern": pattern}}
    )


def rewarm(*words: str, highest: float = 1) -> Kind:
    """One of ``words``, or a table ``{ rewarm_steps = 100, ratio = 0.1 }``, whose ratio is at most ``highest``."""
    parts = {"rewarm_steps": integer(), "ratio": number(0, highest, above=True)}
    example = "{ rewarm_steps = 100, ratio = 0.1 }"
    if highest > 1:
        example = "{ rewarm_steps = 250, ratio = 1.3 }"
    rule = f"one of {', '.join(_quoted(words))}, or {example}" if words else example
    rule += ": " + ", ".join(f"{key} {part.rule}" for key, part in parts.items())

    def parse(value: Any) -> str | Rewarm:
        if isinstance(value, str):
            _require(value in words, rule)
            return value
        _require(isinstance(value, dict) and value.keys() == parts.keys(), rule)
        return Rewarm(
            rewarm_steps=parts["rewarm_steps"].parse(value["rewarm_steps"]),
            ratio=parts["ratio"].parse(value["ratio"]),
        )

    table = {
        "type": "object",
        "properties": {key: part.schema for key, part in parts.items()},
        "required": list(parts),
        "additionalProperties": False,
    }
    if not words:
        return Kind(rule, parse, table)
    return Kind(rule, parse, {"anyOf": [{"enum": list(words)}, table]})


def layer_list() -> Kind:
    """A layer map: for each target layer, the index of the source layer that it copies."""
    rule = "a list of at least one layer index (whole numbers from 0)"

    def parse(value: Any) -> tuple[int, ...]:
        _require(isinstance(value, list) and len(value) > 0, rule)
        for index in value:
            _require(_is_integer(index) and 0 <= index < 10**6, rule)
        return tuple(value)

    schema = {
        "type": "array",
        "minItems": 1,
        "items": {"type": "integer", "minimum": 0},
    }
    return Kind(rule, parse, schema)
