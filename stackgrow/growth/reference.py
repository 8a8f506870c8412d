"""The table of operators in recipes/REFERENCE.md, from the one in operators.py: ``make schema`` writes it."""

from __future__ import annotations

from pathlib import Path

from stackgrow.growth.operators import OPERATORS, Operator

REFERENCE_FILE = Path(__file__).parents[2] / "recipes" / "REFERENCE.md"
BEGIN = "<!-- operators: written by `make schema` -->"
END = "<!-- end of operators -->"


def operators_markdown() -> str:
    lines = [
        BEGIN,
        "",
        "| operator | what it is | paper | grows | keeps the function | keys of its own | not with |",
        "|---|---|---|---|---|---|---|",
    ]
    for operator in OPERATORS.values():
        cells = [
            f'`"{operator.name}"`',
            operator.title,
            operator.paper,
            ", ".join(operator.directions),
            operator.preserves,
            _own_keys(operator),
            _forbidden(operator),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", END])


def _own_keys(operator: Operator) -> str:
    needed = [f"`{name}` (needed)" for name in operator.needs]
    optional = [f"`{name}`" for name in operator.options]
    return ", ".join(needed + optional)


def _forbidden(operator: Operator) -> str:
    """The keys that it refuses, and those of [train] and [parallel] that are limited while it is at work."""
    keys = [f"`{name}`" for name in operator.refuses]
    for limit in operator.forbids:
        name = limit.key.rpartition(".")[2]
        if name == "precision":
            keys.append("`float8`")
        elif limit.widthwise:
            keys.append(f"`{name}` parallelism in width")
        elif limit.key.startswith("parallel."):
            keys.append(f"`{name}` parallelism")
        else:
            keys.append(f"`{name}`")
    return ", ".join(keys)


def with_operators(readme: str) -> str:
    """``readme`` with the table between the two markers renewed."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return before + operators_markdown() + after


if __name__ == "__main__":
    REFERENCE_FILE.write_text(
        with_operators(REFERENCE_FILE.read_text(encoding="utf-8")), encoding="utf-8"
    )
    print(f"wrote the table of operators in {REFERENCE_FILE}")
