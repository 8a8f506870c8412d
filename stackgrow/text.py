"""Small things made readable: amounts, times, tables in columns, paths, and what differs between two trees."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SUFFIXES = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "B": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}
WIDTH = 120  # of what is printed
Table = list[tuple[str, ...]]


def human(amount: float) -> str:
    """``750e9`` as ``750B``; three significant digits."""
    for suffix in ("T", "B", "M", "K"):
        if abs(amount) >= SUFFIXES[suffix] * 0.9995:
            return f"{amount / SUFFIXES[suffix]:.3g}{suffix}"
    return f"{amount:.3g}"


def printable(text: str) -> str:
    """What a stranger's file says must neither steer the terminal nor fill it."""
    return "".join(c if c.isprintable() else "?" for c in text[:2000])


def numbered(count: int, thing: str, things: str = "") -> str:
    """``1 session``, ``2 sessions``; ``things``: where it does not end in s."""
    if count == 1:
        return f"1 {thing}"
    return f"{count} {things or thing + 's'}"


def clock(seconds: float) -> str:
    """``3725`` seconds as ``1:02:05``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minute:02}:{second:02}"
    return f"{minute}:{second:02}"


def aligned(rows: Table) -> list[str]:
    """The first column to the left, numbers to the right, two spaces between."""
    widths = [0] * len(rows[0]) if rows else []
    for row in rows:
        widths = [
            max(width, len(cell)) for width, cell in zip(widths, row, strict=True)
        ]
    return [_aligned_row(row, widths) for row in rows]


def _aligned_row(row: tuple[str, ...], widths: Sequence[int]) -> str:
    cells = [row[0].ljust(widths[0])]
    for cell, width in zip(row[1:], widths[1:], strict=True):
        cells.append(cell.rjust(width))
    return "  ".join(cells).rstrip()


def wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def short(path: Path) -> str:
    """Relative to the working directory where the path lies in it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """``train.learning_rate: 0.001 -> 0.002`` for every leaf that differs between two trees of dictionaries, and of
    lists of these (``growth[0].factor``). What only one of them has differs, leaf by leaf, from None."""
    if _is_tree(old, new):
        for name in sorted((old or {}).keys() | (new or {}).keys()):
            inner = f"{where}.{name}" if where else name
            yield from differences((old or {}).get(name), (new or {}).get(name), inner)
    elif _is_list_of_trees(old, new):
        for index, (one, other) in enumerate(
            itertools.zip_longest(old or [], new or [])
        ):
            yield from differences(one, other, f"{where}[{index}]")
    elif old != new:
        yield f"{where}: {old} -> {new}"


def _is_tree(old: Any, new: Any) -> bool:
    return all(
        value is None or isinstance(value, dict) for value in (old, new)
    ) and bool(old or new)


def _is_list_of_trees(old: Any, new: Any) -> bool:
    if not all(value is None or isinstance(value, list) for value in (old, new)):
        return False
    entries = [*(old or []), *(new or [])]
    return bool(entries) and all(isinstance(entry, dict) for entry in entries)
