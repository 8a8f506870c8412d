"""Apply a growth to a checkpoint on disk: DCP in, DCP out, the tensors that the rules name.

An Alias moves no bytes: the grown metadata points at the source's byte ranges, in data files that are hard
links. A Compute is streamed tensor by tensor, and ranks share the tensors. Zeros are written once for each shape.
All happens in ``<target>.tmp``, which one rename makes the target; whatever stops it before, there is no target and
the source is as it was.

A hard link is the same file: saving over a grown checkpoint in place would truncate the source's data too.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint.metadata as meta
from torch.distributed.checkpoint.filesystem import _StorageInfo

from stackgrow.checkpoint.dcp import (
    METADATA,
    CheckpointError,
    is_model_key,
    places,
    read_metadata,
)
from stackgrow.checkpoint.direct import DirectFile
from stackgrow.checkpoint.verified import Reader
from stackgrow.growth.rules import Alias, Compute, Rule, Rules, Zeros
from stackgrow.process.ranks import wait_for
from stackgrow.process.signals import stop_if_asked
from stackgrow.seal.files import link, sync_folder
from stackgrow.seal.tensors import fingerprint

MOST_PROBLEMS = 8  # told in one message


def grow_checkpoint(source: Path, target: Path, rules: Rules) -> dict[str, Any]:
    """Grow the DCP checkpoint ``source`` into the new ``target``, in one process.

    Returns the record for growth.json: ``map`` {target tensor: source tensor or note}, ``dropped``,
    ``linked_files``, ``copied_files``, ``bytes_written`` and ``seconds``. Raises CheckpointError, before
    anything is written, when the source's model tensors are not exactly the rules' own, or ``target`` exists.

    Several ranks on one file system call instead: ``begin`` on rank 0; a barrier; ``write_part`` on every
    rank; a barrier; ``commit`` on rank 0, which returns the same record without seconds.
    """
    started = time.perf_counter()
    begin(source, target, rules)
    write_part(source, target, rules)
    record = commit(source, target, rules)
    record["seconds"] = time.perf_counter() - started
    return record


def begin(source: Path, target: Path, rules: Rules) -> None:
    """Check the source, and open an empty ``<target>.tmp`` in place of what an earlier attempt left."""
    _read_source(source, rules)
    if target.exists():
        raise CheckpointError(
            f"{target} exists already: remove it, or grow into another folder"
        )
    work = _work_folder(target)
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)


def write_part(
    source: Path,
    target: Path,
    rules: Rules,
    rank: int = 0,
    world_size: int = 1,
    fingerprints: Mapping[str, str] | None = None,
) -> None:
    """Compute and write this rank's share of the tensors, holding those of one rule and one result at a time.

    Raises CheckpointError when a result has not the shape of the target or the dtype of its sources, and when a
    tensor that is read has not its fingerprint in ``fingerprints``, where they are known.
    """
    wait_for(_work_folder(target))
    metadata = _read_source(source, rules)
    names = _share(metadata, rules, rank, world_size)
    if not names:
        return
    read = Reader(source, metadata, fingerprints)
    file = _work_folder(target) / _part_name(metadata, rank)
    written = _write_tensors(
        read, rules, names, file, task=f"growing {target.parent.name}"
    )
    # Last: the index vouches for the part.
    index = {name: dataclasses.asdict(tensor) for name, tensor in written.items()}
    _index_file(target, rank).write_text(json.dumps(index), encoding="utf-8")


@dataclass(frozen=True)
class WrittenTensor:
    """A tensor in a rank's data file: its bytes [offset, offset + length), its dtype's name, its fingerprint."""

    dtype: str
    offset: int
    length: int
    fingerprint: str


def _write_tensors(
    read: Reader, rules: Rules, names: Sequence[str], file: Path, *, task: str
) -> dict[str, WrittenTensor]:
    """Computes the tensors ``names`` and writes them into the new ``file``, in that order."""
    places_of: dict[str, Future[Place]] = {}
    fingerprints: dict[str, Future[str]] = {}
    with DirectFile(file) as stream, ThreadPoolExecutor(2) as threads:
        previous: str | None = None
        for name in names:
            stop_if_asked(task)
            # One tensor is written while the next is computed: the cores and the disk let each other work.
            tensor = _compute(read, rules, name)
            if previous is not None:
                places_of[previous].result()
                fingerprints[previous].result()
            places_of[name] = threads.submit(append, tensor, stream)
            fingerprints[name] = threads.submit(fingerprint, tensor)
            previous = name

        written = {}
        for name in names:
            place = places_of[name].result()
            written[name] = WrittenTensor(
                place.dtype, place.offset, place.length, fingerprints[name].result()
            )
        stream.finish()
    return written


def commit(
    source: Path, target: Path, rules: Rules, world_size: int = 1
) -> dict[str, Any]:
    """Join the ranks' parts, link the data files, write the metadata, and rename it all to ``target``."""
    old = _read_source(source, rules)
    work = _work_folder(target)
    new = dataclasses.replace(
        old,
        state_dict_metadata={},
        planner_data={name: (name,) for name in rules.targets},
        storage_data={},
        storage_meta=meta.StorageMeta(checkpoint_id=str(target)),
    )

    # Every target tensor is in one of three places: what the ranks wrote, the source's files, a tensor of zeros.
    fingerprints: dict[str, str] = {}
    for rank in range(world_size):
        fingerprints.update(_add_part(old, new, target, rules, rank, world_size))
    files = _add_aliases(old, new, rules)
    fingerprints.update(_add_zeros(old, new, rules, fingerprints))

    linked = []
    copied = []
    for name in files:
        if link(source / name, work / name):
            linked.append(name)
        else:
            copied.append(name)

    with (work / METADATA).open("wb") as stream:
        pickle.dump(new, stream)
        stream.flush()
        os.fsync(stream.fileno())
    bytes_written = sum(
        file.stat().st_size for file in work.iterdir() if file.name not in linked
    )
    sync_folder(work)
    work.rename(target)
    sync_folder(target.parent)

    return {
        "map": {
            name: _description(rule)
            for name, rule in rules.targets.items()
            if is_model_key(name)
        },
        "dropped": sorted(filter(is_model_key, rules.dropped)),
        "fingerprints": fingerprints,
        "linked_files": linked,
        "copied_files": copied,
        "bytes_written": bytes_written,
    }


def _description(rule: Rule) -> str:
    """What growth.json says of a target tensor."""
    if isinstance(rule, Alias):
        return rule.source
    if isinstance(rule, Zeros):
        return "zeros"
    return f"{rule.note}({', '.join(rule.sources)})"


def computed(source: Path, rules: Rules) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a growth that is no Alias, by name, one at a time; nothing is written."""
    read = Reader(source, _read_source(source, rules), fingerprints=None)
    for name, rule in rules.targets.items():
        if not isinstance(rule, Alias):
            yield name, _compute(read, rules, name)


# The source.


def _read_source(source: Path, rules: Rules) -> meta.Metadata:
    """The source's metadata, whose model tensors are exactly those that the rules take, all of one dtype; and whose
    optimizer has the state that they take."""
    metadata = read_metadata(source)
    entries = {}
    for name, entry in metadata.state_dict_metadata.items():
        if is_model_key(name) or name in rules.source_shapes:
            entries[name] = entry

    problems = [*_shape_problems(entries, rules), *_dtype_problems(entries)]
    if problems:
        told = "; ".join(problems[:MOST_PROBLEMS])
        if len(problems) > MOST_PROBLEMS:
            told += f"; and {len(problems) - MOST_PROBLEMS} more"
        raise CheckpointError(f"{source} is not the source model: {told}")
    for name in entries:
        places(metadata, name)  # that it is whole
    return metadata


def _shape_problems(entries: Mapping[str, Any], rules: Rules) -> Iterator[str]:
    wanted = rules.source_shapes
    for name in sorted({*entries, *wanted}):
        shape: Any = "missing"
        if name in entries:
            shape = tuple(getattr(entries[name], "size", ("bytes",)))
        if shape != wanted.get(name):
            yield f"{name} is {shape}, the source model has {wanted.get(name, 'no such tensor')}"


def _dtype_problems(entries: Mapping[str, Any]) -> Iterator[str]:
    dtypes = set()
    for name, entry in entries.items():
        if is_model_key(name) and isinstance(entry, meta.TensorStorageMetadata):
            dtypes.add(str(entry.properties.dtype))
    if len(dtypes) > 1:
        yield f"its tensors have several dtypes, {', '.join(sorted(dtypes))}"


# The new metadata, filled in by three functions.


def _add_aliases(old: meta.Metadata, new: meta.Metadata, rules: Rules) -> list[str]:
    """Enter every Alias into the new metadata; returns the data files that they lie in."""
    files: set[str] = set()
    for name, rule in rules.targets.items():
        if not isinstance(rule, Alias):
            continue
        chunks = []
        for chunk, info in places(old, rule.source):
            chunks.append(chunk)
            new.storage_data[meta.MetadataIndex(name, chunk.offsets)] = info
            files.add(info.relative_path)
        entry = old.state_dict_metadata[rule.source]
        new.state_dict_metadata[name] = dataclasses.replace(entry, chunks=chunks)
    return sorted(files)


def _add_zeros(
    old: meta.Metadata,
    new: meta.Metadata,
    rules: Rules,
    fingerprints: Mapping[str, str],
) -> dict[str, str]:
    """Enter the Zeros, each in the place where one of its shape was written; returns their fingerprints."""
    added = {}
    for name, written in _written_as(old, rules).items():
        if not isinstance(rules.targets[name], Zeros):
            continue
        entry = new.state_dict_metadata[written]
        offsets = entry.chunks[0].offsets
        new.state_dict_metadata[name] = entry
        new.storage_data[meta.MetadataIndex(name, offsets)] = new.storage_data[
            meta.MetadataIndex(written, offsets)
        ]
        added[name] = fingerprints[written]
    return added


def _add_part(
    old: meta.Metadata,
    new: meta.Metadata,
    target: Path,
    rules: Rules,
    rank: int,
    world_size: int,
) -> dict[str, str]:
    """Enter what one rank computed into the new metadata; returns the fingerprints."""
    index_file = _index_file(target, rank)
    index = {}
    if index_file.exists():
        index = json.loads(index_file.read_text(encoding="utf-8"))
    if set(index) != set(_share(old, rules, rank, world_size)):
        raise CheckpointError(
            f"rank {rank} of {world_size} has not written its part of {target}"
        )

    fingerprints = {}
    for name, fields in index.items():
        tensor = WrittenTensor(**fields)
        shape = torch.Size(rules.target_shapes[name])
        properties = meta.TensorProperties(dtype=getattr(torch, tensor.dtype))
        chunk = meta.ChunkStorageMetadata(
            offsets=torch.Size([0] * len(shape)), sizes=shape
        )
        info = _StorageInfo(_part_name(old, rank), tensor.offset, tensor.length)
        new.state_dict_metadata[name] = meta.TensorStorageMetadata(
            properties, shape, [chunk]
        )
        new.storage_data[meta.MetadataIndex(name, chunk.offsets)] = info
        fingerprints[name] = tensor.fingerprint
    index_file.unlink(missing_ok=True)
    return fingerprints


# Tensors.


def _compute(read: Reader, rules: Rules, name: str) -> torch.Tensor:
    """A target tensor that is no Alias."""
    rule = rules.targets[name]
    shape = rules.target_shapes[name]
    if isinstance(rule, Zeros):
        return torch.zeros(shape, dtype=_dtype(read.metadata, rule))
    assert isinstance(rule, Compute)
    sources = [read(source) for source in rule.sources]
    dtypes = {tensor.dtype for tensor in sources}
    tensor = rule.fn(*sources).detach().contiguous()
    if tuple(tensor.shape) != shape or not dtypes <= {tensor.dtype}:
        wanted = ", ".join(map(str, dtypes)) or "any"
        raise CheckpointError(
            f"{name} must be {shape} in the dtype of its sources, {wanted}: "
            f"{rule.note} gave {tuple(tensor.shape)} {tensor.dtype}"
        )
    if tensor.untyped_storage().nbytes() > tensor.nbytes:
        return (
            tensor.clone()
        )  # torch.save writes a whole storage, also what a view of it does not show
    return tensor


class Place(NamedTuple):
    """Where a tensor was written: its dtype's name, and its bytes [offset, offset + length)."""

    dtype: str
    offset: int
    length: int


def append(tensor: torch.Tensor, stream: DirectFile) -> Place:
    """Writes a tensor as DCP does, at the end of ``stream``."""
    offset = stream.position
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(
        False
    )  # torch never compares it, and the seal has a SHA-256
    try:
        torch.save(tensor, stream)
    except (
        RuntimeError
    ) as error:  # torch's own, about the file that it could not finish, hides why
        cause = error.__context__
        raise (cause if isinstance(cause, OSError) else error) from None
    finally:
        torch.serialization.set_crc32_options(checksums)
    return Place(
        str(tensor.dtype).removeprefix("torch."), offset, stream.position - offset
    )


def _dtype(metadata: meta.Metadata, rule: Zeros) -> torch.dtype:
    dtype = metadata.state_dict_metadata[rule.like].properties.dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


# Which rank writes what, and where.


def _written_as(source: meta.Metadata, rules: Rules) -> dict[str, str]:
    """{name: the name under which it is written} for every tensor that is no Alias: its own, or, for Zeros, that of
    the first of their shape and dtype."""
    first_zeros: dict[tuple[tuple[int, ...], torch.dtype], str] = {}
    written_as = {}
    for name, rule in rules.targets.items():
        if isinstance(rule, Compute):
            written_as[name] = name
        elif isinstance(rule, Zeros):
            kind = rules.target_shapes[name], _dtype(source, rule)
            written_as[name] = first_zeros.setdefault(kind, name)
    return written_as


def _share(
    source: meta.Metadata, rules: Rules, rank: int, world_size: int
) -> list[str]:
    """One rank's tensors to write: from the largest down, each goes to the rank with the least so far."""
    costs: dict[str, int] = {}  # elements read and written
    for name in _written_as(source, rules).values():
        costs[name] = math.prod(rules.target_shapes[name])
        for source_name in rules.targets[name].sources:
            costs[name] += math.prod(rules.source_shapes[source_name])

    loads = [0] * world_size
    mine = []
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        least = loads.index(min(loads))
        loads[least] += costs[name]
        if least == rank:
            mine.append(name)

    # Those of one size follow each other, in memory that they can reuse; the two largest are far apart, as one of them
    # is still written when the next is computed: the first, third, fifth ..., then back ..., the fourth, the second.
    down = mine[::2]
    up = mine[1::2]
    up.reverse()
    return down + up


def _part_name(source: meta.Metadata, rank: int) -> str:
    """A rank's data file: a name that the source does not use, which may be a grown checkpoint itself."""
    taken = {info.relative_path for info in source.storage_data.values()}
    number = 0
    while f"__grown{number}_{rank}.distcp" in taken:
        number += 1
    return f"__grown{number}_{rank}.distcp"


def _work_folder(target: Path) -> Path:
    return target.with_name(target.name + ".tmp")


def _index_file(target: Path, rank: int) -> Path:
    """What a rank has written into its data file: {name: WrittenTensor}. Gone in the target."""
    return _work_folder(target) / f"__grown_{rank}.json"
