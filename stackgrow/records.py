"""Append-only logs of a stage (metrics.jsonl, validation.jsonl): one JSON object per line, each step once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_records(path: Path) -> list[dict[str, Any]]:
    """All whole records; a line torn by a crash is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break  # only the last line can be torn
    return records


class RecordWriter:
    """Appends records; opening it drops what a stopped session logged after the step that is resumed from."""

    def __init__(self, path: Path, resume_step: int):
        kept = [r for r in read_records(path) if r["step"] <= resume_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in kept))
        temporary.replace(path)
        self._stream = path.open("a", buffering=1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record; it reaches the file at once."""
        self._stream.write(json.dumps(record) + "\n")

    def close(self) -> None:
        self._stream.close()
