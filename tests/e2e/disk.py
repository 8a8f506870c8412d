"""What a run does to files and their names, in order, and what of it a power cut at the worst moment would leave.

A file is on disk once it was synced after it was last written; a name, once its folder was synced after it was made.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stackgrow.run_folder.folder import DONE, LEDGER, METRICS, VALIDATION
from stackgrow.run_folder.lines import RecordWriter
from stackgrow.seal import MANIFEST

WRITES = os.O_WRONLY | os.O_RDWR


def watch(log: Path) -> None:
    """From now on this process and its forks write down what they do: [what, path, new path], a line each."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(*event: object) -> None:
        os.write(
            descriptor, (json.dumps([str(part) for part in event]) + "\n").encode()
        )

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if (
            name == "open"
            and isinstance(arguments[0], (str, Path))
            and arguments[2] & WRITES
        ):
            note("write", Path(arguments[0]).absolute())
        elif name in ("os.mkdir", "os.remove"):
            note(name.removeprefix("os."), Path(arguments[0]).absolute())
        elif name in ("os.rename", "os.link"):
            note(
                name.removeprefix("os."),
                Path(arguments[0]).absolute(),
                Path(arguments[1]).absolute(),
            )

    sys.addaudithook(hook)
    sync, write_record = os.fsync, RecordWriter.write

    @functools.wraps(sync)
    def fsync(file: Any) -> None:
        number = file if isinstance(file, int) else file.fileno()
        sync(file)
        note("sync", Path(f"/proc/self/fd/{number}").readlink())

    @functools.wraps(write_record)
    def write(writer: RecordWriter, record: Any) -> None:
        note("write", writer.path.absolute())
        write_record(writer, record)

    os.fsync = fsync
    RecordWriter.write = write  # type: ignore[method-assign]


@dataclass
class Disk:
    """Of the files in the folder ``run``: what a power cut would take, given the events so far."""

    run: Path
    written: set[Path] = field(default_factory=set)  # and not synced since
    named: set[Path] = field(
        default_factory=set
    )  # made, and the folder not synced since
    sealed: set[Path] = field(default_factory=set)  # manifests
    faults: list[str] = field(default_factory=list)
    relied_upon: int = 0

    def take(self, what: str, path: Path, new: Path | None = None) -> None:
        if what == "sync":
            self.written.discard(path)
            self.named -= {name for name in self.named if name.parent == path}
        elif what == "write":
            self.written.add(path)
            self.named.add(path)
        elif what == "mkdir":
            self.named.add(path)
        elif what == "remove":
            self.written.discard(path)
            self.named.discard(path)
            if (
                path.name == MANIFEST
            ):  # of an older checkpoint: those that stay are relied upon
                self.sealed.discard(path)
                self._rely_on_all(f"{path} is deleted")
        elif what == "link":
            assert new is not None
            self.named.add(new)
        elif what == "rename":
            assert new is not None
            self._rename(path, new)

    def _rename(self, path: Path, new: Path) -> None:
        if path in self.written:
            self.faults.append(f"{path} is renamed, and was not synced")
        for known in (self.written, self.named, self.sealed):
            moved = {name for name in known if name.is_relative_to(path)}
            known -= moved
            known |= {new / name.relative_to(path) for name in moved}
        self.named.add(new)
        if new.name == MANIFEST:
            self.sealed.add(new)
            for name in (METRICS, VALIDATION):
                records = new.parents[2] / name
                if records in self.written:
                    self.faults.append(
                        f"{records} is named by {new}, and was not synced"
                    )
            self._rely_on_files_beside(new)
        elif new.name in (DONE, LEDGER):
            self._rely_on_all(f"{new} is written")

    def _rely_on_files_beside(self, manifest: Path) -> None:
        for path in self.written | self.named:
            if path.parent == manifest.parent and path != manifest:
                self.faults.append(f"{path} is named by {manifest}, and was not synced")

    def _rely_on_all(self, why: str) -> None:
        """All sealed checkpoints, and every folder on the way to them."""
        self.relied_upon += len(self.sealed)
        for manifest in self.sealed:
            for path in (manifest, *manifest.parents):
                if path.is_relative_to(self.run) and path in self.named:
                    self.faults.append(f"{path} may be lost when {why}")


def events(log: Path) -> Iterator[tuple[str, list[Path]]]:
    for line in log.read_text(encoding="utf-8").splitlines():
        what, *paths = json.loads(line)
        yield what, [Path(path) for path in paths]


def faults(log: Path, run: Path) -> list[str]:
    """What a run relied upon that was not on disk."""
    disk = Disk(run)
    for what, paths in events(log):
        if any(path.is_relative_to(run) or path == run.parent for path in paths):
            disk.take(what, *paths)
    assert disk.relied_upon > 10, "nothing was looked at"
    return disk.faults
