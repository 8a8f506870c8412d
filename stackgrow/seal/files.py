"""Sealed folders: files on disk that are either complete and verified, or ignored.

A checkpoint folder counts only once its ``MANIFEST.json`` stands in it: written last, atomically, with the size and
SHA-256 of every other file. Whatever a killed process leaves behind has no seal and is moved to ``quarantine/``.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stackgrow.errors import DamagedError, DiskError

MANIFEST = "MANIFEST.json"
QUARANTINE = "quarantine"
READ_AT_ONCE = 1 << 22  # bytes
# What file systems answer that cannot link, or not this file, or not once more.
CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}
_STEP = re.compile(r"step-([0-9]+)")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes ``value`` so that after a crash the file is either absent (or old) or complete."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` so that after a crash the file is either absent (or old) or complete."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as stream, named(path):
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def require_writable(*files: Path | None) -> None:
    """Before work that may be long: that each file, where one is named, can be written when it is done.

    Raises:
        DiskError: its folder is missing or closed, or it is a folder itself.
    """
    for file in files:
        if file is None:
            continue
        folder = file.absolute().parent
        if not folder.is_dir():
            raise DiskError(
                f"{file} cannot be written: {folder} is no folder; make it, or name another file"
            )
        if file.is_dir():
            raise DiskError(
                f"{file} cannot be written: it is a folder; name a file in it"
            )
        if not os.access(folder, os.W_OK | os.X_OK):
            raise DiskError(
                f"{file} cannot be written: nothing may be written into {folder}; name another file"
            )


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in ``path``; None if there is no such file.

    Raises:
        DamagedError: the file is there but is not a JSON object.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would never end
            raise DamagedError(
                f"{path} is no plain file; restore it or move its folder away"
            )
        with named(path):
            value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise DamagedError(
            f"{path} is damaged ({error}); restore it or move its folder away"
        ) from error
    if not isinstance(value, dict):
        raise DamagedError(
            f"{path} is damaged: not a JSON object; restore it or move its folder away"
        )
    return value


def sync_folder(folder: Path) -> None:
    """Makes renames in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (
            errno.EINVAL,
            errno.ENOTSUP,
        ):  # SMB and object stores sync no folders
            raise
    finally:
        os.close(descriptor)


def link(source: Path, target: Path) -> bool:
    """Hard link a data file; where the file system cannot, copy it and return False."""
    try:
        os.link(source.resolve(), target)
        return True
    except OSError as error:
        if error.errno not in CANNOT_LINK:
            raise
    copy(source, target)
    return False


def copy(source: Path, target: Path) -> None:
    """Copies a file so that its content outlives a power cut; its name is for the caller to sync."""
    shutil.copyfile(source, target)
    with target.open("rb") as stream:
        os.fsync(stream.fileno())


def contents(folder: Path) -> list[str]:
    """The names of all files that a seal covers, sorted."""
    names = {path.name for path in folder.iterdir()}
    return sorted(names - {MANIFEST, MANIFEST + ".tmp"})


def file_records(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of each named file."""
    records = {}
    for name in names:
        path = folder / name
        records[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return records


@contextmanager
def named(path: Path) -> Iterator[None]:
    """An error in reading or writing an open file does not say which: now it does."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream, named(path):
        while block := stream.read(READ_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def seal(folder: Path, files: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Seals ``folder``: ``files`` are the records of its contents, ``facts`` what else the manifest states."""
    sync_folder(
        folder
    )  # a seal that outlives a power cut must find the files that it names
    write_json(folder / MANIFEST, {**facts, "files": dict(sorted(files.items()))})
    sync_folder(folder.parent)


def read_seal(folder: Path) -> dict[str, Any] | None:
    """The manifest of a sealed folder, or None. Raises DamagedError for one that no seal() wrote."""
    manifest = read_json(folder / MANIFEST)
    if manifest is None:
        return None
    files = manifest.get("files")
    tensors = manifest.get("tensors", {})
    has_records = isinstance(files, dict) and all(
        isinstance(record, dict) for record in files.values()
    )
    if not has_records:
        raise DamagedError(
            f"{folder / MANIFEST} is damaged: it has no records of files; move {folder} away"
        )
    if not isinstance(tensors, dict):
        raise DamagedError(
            f"{folder / MANIFEST} is damaged: it has no fingerprints of tensors; move {folder} away"
        )
    return manifest


def manifest_hash(folder: Path) -> str:
    """SHA-256 of a sealed folder's manifest, and so of all that it states."""
    return sha256(folder / MANIFEST)


def damage(
    folder: Path,
    manifest: Mapping[str, Any],
    part: int = 0,
    parts: int = 1,
    *,
    hashes: int | None = None,
) -> list[str]:
    """What is wrong with a sealed folder; each of ``parts`` ranks checks the files of its ``part``: the size of all,
    and the SHA-256 of all or of as many as ``hashes``, drawn at random. Raises PermissionError for a file that may not
    be read."""
    expected = manifest["files"]
    faults = []
    if part == 0:
        for name in contents(folder):
            if name not in expected:
                faults.append(f"{name} is not in the manifest")
    names = sorted(expected)[part::parts]
    hashed = set(names)
    if hashes is not None:
        hashed = set(random.sample(names, min(hashes, len(names))))
    for name in names:
        fault = _fault_of_file(folder / name, expected[name], hashed=name in hashed)
        if fault is not None:
            faults.append(f"{name} {fault}")
    return faults


def _fault_of_file(path: Path, expected: Mapping[str, Any], hashed: bool) -> str | None:
    """What is wrong with a file whose record is ``expected``; its content is looked at only where it is ``hashed``."""
    if not os.path.lexists(path):
        return "is missing"
    if path.is_symlink() or not path.is_file():
        return "is no plain file"  # a pipe would never end
    if path.stat().st_size != expected.get("bytes"):
        return "has the wrong size"
    if not hashed:
        return None
    try:
        is_same = file_records(path.parent, [path.name])[path.name] == expected
    except PermissionError:
        raise  # who may not read it cannot say that it is damaged
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return None if is_same else "is damaged (SHA-256 differs)"


def lack_of_space(folder: Path, needed: int) -> str | None:
    """``needs 2.1 GB, 0.3 GB are free in <folder>``, or None where ``needed`` bytes are free."""
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return None
    return f"needs {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free in {folder}"


def step_name(step: int) -> str:
    """The folder of a checkpoint saved after ``step``: ``step-100``."""
    return f"step-{step}"


def step_of(folder: Path) -> int:
    """The step of a checkpoint folder named by ``step_name``."""
    match = _STEP.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def sealed_steps(folder: Path) -> list[int]:
    """The steps of all sealed ``step-N`` folders in ``folder``, ascending."""
    if not folder.is_dir():
        return []
    steps = []
    for path in folder.iterdir():
        match = _STEP.fullmatch(path.name)
        if match is not None and (path / MANIFEST).is_file():
            steps.append(int(match[1]))
    return sorted(steps)


def quarantine_unsealed(folder: Path) -> list[Path]:
    """Moves everything in ``folder`` that is not a sealed ``step-N`` into ``quarantine`` beside it.

    Raises:
        DamagedError: a link stands where a checkpoint should be; following it could overwrite another run's files.
    """
    if not folder.is_dir():
        return []
    moved = []
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            raise DamagedError(
                f"{path} is a symbolic link; checkpoints must be real folders: remove it"
            )
        is_sealed_step = _STEP.fullmatch(path.name) and (path / MANIFEST).is_file()
        if not is_sealed_step:
            moved.append(move_to_quarantine(path))
    return moved


def move_to_quarantine(path: Path) -> Path:
    """Moves a damaged or torn folder aside, under a name that is still free; nothing is deleted."""
    quarantine = path.parent.parent / QUARANTINE
    quarantine.mkdir(exist_ok=True)
    number = 0
    target = quarantine / f"{path.name}.{number}"
    while target.exists():
        number += 1
        target = quarantine / f"{path.name}.{number}"
    path.rename(target)
    sync_folder(quarantine)
    sync_folder(path.parent)
    return target


def purge(folder: Path, keep: int, always: Iterable[int] = ()) -> None:
    """Deletes all but the ``keep`` newest sealed steps that are whole by size and those in ``always``; the seal goes
    first, so that a half-deleted checkpoint is never mistaken for a whole one."""
    whole = []
    for step in sealed_steps(folder):
        if _whole_by_size(folder / step_name(step)):
            whole.append(step)
    for step in whole[:-keep]:
        if step not in always:
            checkpoint = folder / step_name(step)
            (checkpoint / MANIFEST).unlink()
            shutil.rmtree(checkpoint)


def _whole_by_size(folder: Path) -> bool:
    manifest = read_seal(folder)
    return manifest is not None and not damage(folder, manifest, hashes=0)
