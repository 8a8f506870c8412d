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
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stackgrow.errors import DamagedError

MANIFEST = "MANIFEST.json"
_STEP = re.compile(r"step-([0-9]+)")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes ``value`` so that after a crash the file is either absent (or old) or complete."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` so that after a crash the file is either absent (or old) or complete."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in ``path``; None if there is no such file.

    Raises:
        DamagedError: the file is there but is not a JSON object.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged ({error}); restore it or move its folder away") from error
    if not isinstance(value, dict):
        raise DamagedError(f"{path} is damaged: not a JSON object; restore it or move its folder away")
    return value


def sync_folder(folder: Path) -> None:
    """Makes renames in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # SMB and object stores sync no folders
            raise
    finally:
        os.close(descriptor)


def contents(folder: Path) -> list[str]:
    """The names of all files that a seal covers, sorted."""
    return sorted(p.name for p in folder.iterdir() if p.name not in (MANIFEST, MANIFEST + ".tmp"))


def file_records(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of each named file."""
    records = {}
    for name in names:
        digest = hashlib.sha256()
        with (folder / name).open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
        records[name] = {"bytes": (folder / name).stat().st_size, "sha256": digest.hexdigest()}
    return records


def seal(folder: Path, files: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Seals ``folder``: ``files`` are the records of its contents, ``facts`` what else the manifest states."""
    write_json(folder / MANIFEST, {**facts, "files": dict(sorted(files.items()))})
    sync_folder(folder.parent)


def read_seal(folder: Path) -> dict[str, Any] | None:
    """The manifest of a sealed folder, or None. Raises DamagedError for one that no seal() wrote."""
    manifest = read_json(folder / MANIFEST)
    if manifest is None:
        return None
    files, tensors = manifest.get("files"), manifest.get("tensors", {})
    if not (isinstance(files, dict) and all(isinstance(record, dict) for record in files.values())):
        raise DamagedError(f"{folder / MANIFEST} is damaged: it has no records of files; move {folder} away")
    if not isinstance(tensors, dict):
        raise DamagedError(f"{folder / MANIFEST} is damaged: it has no fingerprints of tensors; move {folder} away")
    return manifest


def manifest_hash(folder: Path) -> str:
    """SHA-256 of a sealed folder's manifest, and so of all that it states."""
    return str(file_records(folder, [MANIFEST])[MANIFEST]["sha256"])


def damage(
    folder: Path, manifest: Mapping[str, Any], part: int = 0, parts: int = 1, *, hashes: int | None = None
) -> list[str]:
    """What is wrong with a sealed folder; each of ``parts`` ranks checks the files of its ``part``: the size of all,
    and the SHA-256 of all or of as many as ``hashes``, drawn at random."""
    expected = dict(manifest["files"])
    faults = [f"{n} is not in the manifest" for n in (contents(folder) if part == 0 else ()) if n not in expected]
    mine = sorted(expected)[part::parts]
    hashed = mine if hashes is None else random.sample(mine, min(hashes, len(mine)))
    for name in mine:
        if not os.path.lexists(folder / name):
            faults.append(f"{name} is missing")
        elif (folder / name).is_symlink() or not (folder / name).is_file():
            faults.append(f"{name} is no plain file")  # a pipe would never end
        elif (folder / name).stat().st_size != expected[name].get("bytes"):
            faults.append(f"{name} has the wrong size")
        elif name in hashed and file_records(folder, [name])[name] != expected[name]:
            faults.append(f"{name} is damaged (SHA-256 differs)")
    return faults


def lack_of_space(folder: Path, needed: int) -> str | None:
    """``needs 2.1 GB, 0.3 GB are free in <folder>``, or None where ``needed`` bytes are free."""
    free = shutil.disk_usage(folder).free
    return None if free >= needed else f"needs {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free in {folder}"


def step_name(step: int) -> str:
    """The folder of a checkpoint saved after ``step``: ``step-100``."""
    return f"step-{step}"


def sealed_steps(folder: Path) -> list[int]:
    """The steps of all sealed ``step-N`` folders in ``folder``, ascending."""
    if not folder.is_dir():
        return []
    found = [(m, p) for p in folder.iterdir() if (m := _STEP.fullmatch(p.name))]
    return sorted(int(m[1]) for m, p in found if (p / MANIFEST).is_file())


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
            raise DamagedError(f"{path} is a symbolic link; checkpoints must be real folders: remove it")
        if not (_STEP.fullmatch(path.name) and (path / MANIFEST).is_file()):
            moved.append(move_to_quarantine(path))
    return moved


def move_to_quarantine(path: Path) -> Path:
    """Moves a damaged or torn folder aside, under a name that is still free; nothing is deleted."""
    quarantine = path.parent.parent / "quarantine"
    quarantine.mkdir(exist_ok=True)
    number = 0
    while (target := quarantine / f"{path.name}.{number}").exists():
        number += 1
    path.rename(target)
    return target


def purge(folder: Path, keep: int, always: Iterable[int] = ()) -> None:
    """Deletes all but the ``keep`` newest sealed steps that are whole by size and those in ``always``; the seal goes
    first, so that a half-deleted checkpoint is never mistaken for a whole one."""
    steps = [step for step in sealed_steps(folder) if _whole_by_size(folder / step_name(step))]
    for step in steps[:-keep]:
        if step not in always:
            (folder / step_name(step) / MANIFEST).unlink()
            shutil.rmtree(folder / step_name(step))


def _whole_by_size(folder: Path) -> bool:
    manifest = read_seal(folder)
    return manifest is not None and not damage(folder, manifest, hashes=0)
