"""Documents for tasks of the kinds that the paper's benchmarks are of, from Python's own source."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from datasets import Dataset

LINES = [
    line
    for line in Path(json.__file__).with_name("decoder.py").read_text().split("\n")
    if len(line) > 30
]


def choices(**_: Any) -> dict[str, Dataset]:
    """How a line goes on: its own end among those of three others. Draws from Python's generator, as some tasks do."""
    rows = []
    for i, line in enumerate(LINES[:30]):
        ends = [LINES[(i + k) % len(LINES)][15:] for k in range(4)]
        rows.append(
            {
                "question": line[:15],
                "choices": ends,
                "answer": 0,
                "unused": random.random(),
            }
        )
    return {"test": Dataset.from_list(rows)}


def texts(**_: Any) -> dict[str, Dataset]:
    """Texts of one line to many, the last longer than any context here."""
    rows = [
        {"text": " ".join(LINES[i : i + n])}
        for i, n in enumerate([1, 2, 1, 3, 1, 8, 1, 60])
    ]
    return {"test": Dataset.from_list(rows)}


def absent(**_: Any) -> dict[str, Dataset]:
    raise FileNotFoundError("texts.jsonl")
