"""Append-only logs of a stage (metrics.jsonl, validation.jsonl): one JSON object per line, each step once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

LONGEST = 1 << 20  # characters of a line; an audit may read a stranger's file


def read_records(path: Path) -> list[dict[str, Any]]:
    """All whole records; a line torn by a crash is left out."""
    return list(iter_records(path))


def iter_records(path: Path) -> Iterator[dict[str, Any]]:
    """The same, one at a time."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as stream:
        while True:
            line = stream.readline(LONGEST)
            if not line:
                return
            try:
                yield json.loads(line)
            except ValueError:
                return  # only the last line can be torn


class RecordWriter:
    """Appends records; opening it drops what a stopped session logged after the step that is resumed from."""

    def __init__(self, path: Path, resume_step: int):
        kept = ""
        for record in iter_records(path):
            if record["step"] <= resume_step:
                kept += _line(record)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(kept, encoding="utf-8")
        temporary.replace(path)
        self._stream = path.open("a", buffering=1, encoding="utf-8")
        self._bytes = len(kept)  # json.dumps writes ASCII
        self._digest = hashlib.sha256(kept.encode())

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record; it reaches the file at once."""
        line = _line(record)
        self._stream.write(line)
        self._bytes += len(line)
        self._digest.update(line.encode())

    def sealed(self) -> dict[str, Any]:
        """Size and SHA-256 of what is written so far, all of which is on disk then. A checkpoint's seal states them:
        records that were edited or lost afterwards do not agree with it."""
        os.fsync(self._stream.fileno())
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        self._stream.close()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"
