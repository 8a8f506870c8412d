"""Append-only logs of a stage (metrics.jsonl, validation.jsonl): one JSON object per line, each step once.

A session that goes on from a checkpoint cuts them to the length that the checkpoint's seal states, after the hash of
what is left was compared with the seal's: what was edited or lost in the meantime is never sealed again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stackgrow.errors import DamagedError
from stackgrow.seal import named, sync_folder

LONGEST = 1 << 20  # bytes of a line; an audit may read a stranger's file
READ_AT_ONCE = 1 << 22  # bytes


def read_records(path: Path) -> list[dict[str, Any]]:
    """All whole records; a line torn by a crash, the last one, is left out.

    Raises:
        DamagedError: a line is no record.
    """
    return list(iter_records(path))


def iter_records(path: Path) -> Iterator[dict[str, Any]]:
    """The same, one at a time."""
    if not path.is_file():
        return
    number = 0
    with path.open("rb") as stream, named(path):
        while True:
            line = stream.readline(LONGEST)
            number += 1
            if len(line) == LONGEST:
                raise DamagedError(
                    f"{path}:{number} is longer than {LONGEST} bytes and so no record; restore the file"
                )
            if not line.endswith(b"\n"):
                return  # the end, or a line that a crash has torn
            yield _record(line, f"{path}:{number}")


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedError(
            f"{where} is no record: {str(error)[:100]}; restore the file"
        ) from error
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise DamagedError(
            f"{where}: {str(record)[:40]!r} is no record of a step; restore the file"
        )
    return record


def prefix_hash(file: Path, size: int) -> str:
    """The SHA-256 of a file's first ``size`` bytes, or of all where it has fewer."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        left = size
        while left > 0:
            block = stream.read(min(left, READ_AT_ONCE))
            if not block:
                break
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


class RecordWriter:
    """Appends records; opening it drops what a stopped session logged after the checkpoint that is resumed from.

    ``sealed``: what that checkpoint's seal states of the file, see ``sealed()``; None where no checkpoint of this
    stage is gone on from, and the file begins empty.

    Raises:
        DamagedError: the file does not begin with what was sealed.
    """

    def __init__(self, path: Path, sealed: Mapping[str, Any] | None = None):
        self.path = path
        self._bytes = 0
        self._digest = hashlib.sha256()
        if path.exists() and not path.is_file():
            raise self._damaged("it is no plain file")
        if sealed is not None:
            self._read_sealed(sealed)
        with named(path):
            self._stream = path.open("a", buffering=1, encoding="utf-8", newline="\n")
            self._stream.truncate(self._bytes)
            os.fsync(self._stream.fileno())
        sync_folder(path.parent)  # the file itself may be new

    def _read_sealed(self, sealed: Mapping[str, Any]) -> None:
        wanted = sealed.get("bytes")
        if type(wanted) is not int:
            raise self._damaged("the checkpoint's seal does not state its size")
        if wanted == 0:
            return
        if not self.path.is_file():
            raise self._damaged("it is missing")
        with self.path.open("rb") as stream, named(self.path):
            while self._bytes < wanted:
                block = stream.read(min(wanted - self._bytes, READ_AT_ONCE))
                if not block:
                    raise self._damaged(
                        f"it has {self._bytes} bytes, {wanted} were sealed"
                    )
                self._bytes += len(block)
                self._digest.update(block)
        if self._digest.hexdigest() != sealed.get("sha256"):
            raise self._damaged(f"its first {wanted} bytes were changed")

    def _damaged(self, what: str) -> DamagedError:
        return DamagedError(
            f"{self.path} is not what it was when the checkpoint was sealed that training goes on from: {what}. "
            f"Restore it, or move {self.path.parent} away to train the stage again"
        )

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record; it reaches the file at once."""
        line = json.dumps(record) + "\n"
        with named(self.path):
            self._stream.write(line)
        self._bytes += len(line)  # json.dumps writes ASCII
        self._digest.update(line.encode())

    def sealed(self) -> dict[str, Any]:
        """Size and SHA-256 of what is written so far, all of which is on disk then. A checkpoint's seal states them:
        records that were edited or lost afterwards do not agree with it."""
        with named(self.path):
            os.fsync(self._stream.fileno())
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        self._stream.close()
