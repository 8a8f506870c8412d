"""Apply a growth to a checkpoint on disk: DCP in, DCP out, the tensors that the rules name.

An Alias moves no bytes: the grown metadata points at the source's byte ranges, in data files that are hard
links. A Compute is streamed tensor by tensor, and ranks share the tensors. Zeros are written once for each shape.
All happens in ``<target>.tmp``, which one rename makes the target; whatever stops it before, there is no target and
the source is as it was.

A hard link is the same file: saving over a grown checkpoint in place would truncate the source's data too.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import pickle
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint.metadata as meta
from torch.distributed.checkpoint.filesystem import _StorageInfo

from stackgrow.checkpoint.dcp import METADATA, CheckpointError, is_model_key, places, read_metadata
from stackgrow.checkpoint.direct import DirectFile
from stackgrow.checkpoint.verified import Reader
from stackgrow.growth.rules import Alias, Compute, Rule, Rules, Zeros
from stackgrow.process.ranks import wait_for
from stackgrow.process.signals import stop_if_asked
from stackgrow.seal.files import sync_folder
from stackgrow.seal.tensors import fingerprint

# What file systems answer that cannot link, or not this file, or not once more.
CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


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
    return {**commit(source, target, rules), "seconds": time.perf_counter() - started}


def begin(source: Path, target: Path, rules: Rules) -> None:
    """Check the source, and open an empty ``<target>.tmp`` in place of what an earlier attempt left."""
    _read_source(source, rules)
    if target.exists():
        raise CheckpointError(f"{target} exists already: remove it, or grow into another folder")
    work = _work(target)
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)


def write_part(
    source: Path,
    target: Path,
    rules: Rules,
    rank: int = 0,
    world_size: int = 1,
    marks: Mapping[str, str] | None = None,
) -> None:
    """Compute and write this rank's share of the tensors, holding those of one rule and one result at a time.

    Raises CheckpointError when a result has not the shape of the target or the dtype of its sources, and when a
    tensor that is read has not its fingerprint in ``marks``, where they are known.
    """
    wait_for(_work(target))
    metadata = _read_source(source, rules)
    names = _share(metadata, rules, rank, world_size)
    if not names:
        return
    read = Reader(source, metadata, marks)
    jobs: dict[str, tuple[Future[Any], Future[str]]] = {}
    with DirectFile(_work(target) / _part(metadata, rank)) as stream, ThreadPoolExecutor(2) as threads:
        last: tuple[Future[Any], ...] = ()
        for name in names:
            stop_if_asked(f"growing {target.parent.name}")
            # One tensor is written while the next is computed: the cores and the disk let each other work.
            tensor = _compute(read, rules, name)
            for job in last:
                job.result()
            last = jobs[name] = threads.submit(append, tensor, stream), threads.submit(fingerprint, tensor)
        index = {name: (*place.result(), mark.result()) for name, (place, mark) in jobs.items()}
        stream.finish()
    _index(target, rank).write_text(json.dumps(index))  # last: it vouches for the part


def commit(source: Path, target: Path, rules: Rules, world_size: int = 1) -> dict[str, Any]:
    """Join the ranks' parts, link the data files, write the metadata, and rename it all to ``target``."""
    old, work = _read_source(source, rules), _work(target)
    new = dataclasses.replace(
        old,
        state_dict_metadata={},
        planner_data={name: (name,) for name in rules.targets},
        storage_data={},
        storage_meta=meta.StorageMeta(checkpoint_id=str(target)),
    )
    marks: dict[str, str] = {}
    for rank in range(world_size):
        marks |= _add_part(old, new, target, rules, rank, world_size)
    files = _add_aliases(old, new, rules)
    marks |= _add_zeros(old, new, rules, marks)
    linked = [name for name in files if _link(source / name, work / name)]
    with (work / METADATA).open("wb") as stream:
        pickle.dump(new, stream)
        stream.flush()
        os.fsync(stream.fileno())
    written = sum(file.stat().st_size for file in work.iterdir() if file.name not in linked)
    sync_folder(work)
    work.rename(target)
    sync_folder(target.parent)
    return {
        "map": {name: _told(rule) for name, rule in rules.targets.items() if is_model_key(name)},
        "dropped": sorted(filter(is_model_key, rules.dropped)),
        "fingerprints": marks,
        "linked_files": linked,
        "copied_files": [name for name in files if name not in linked],
        "bytes_written": written,
    }


def _told(rule: Rule) -> str:
    if isinstance(rule, Compute):
        return f"{rule.note}({', '.join(rule.sources)})"
    return rule.source if isinstance(rule, Alias) else "zeros"


def computed(source: Path, rules: Rules) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a growth that is no Alias, by name, one at a time; nothing is written."""
    read = Reader(source, _read_source(source, rules), None)
    for name, rule in rules.targets.items():
        if not isinstance(rule, Alias):
            yield name, _compute(read, rules, name)


def _read_source(source: Path, rules: Rules) -> meta.Metadata:
    """The source's metadata, whose model tensors are exactly those that the rules take, all of one dtype; and whose
    optimizer has the state that they take."""
    metadata, want = read_metadata(source), rules.source_shapes
    entries = {fqn: e for fqn, e in metadata.state_dict_metadata.items() if is_model_key(fqn) or fqn in want}
    have = {fqn: tuple(getattr(entry, "size", ("bytes",))) for fqn, entry in entries.items()}
    model = {fqn: entry for fqn, entry in entries.items() if is_model_key(fqn)}
    problems = [
        f"{fqn} is {have.get(fqn, 'missing')}, the source model has {want.get(fqn, 'no such tensor')}"
        for fqn in sorted({*have, *want})
        if have.get(fqn) != want.get(fqn)
    ]
    dtypes = {str(entry.properties.dtype) for entry in model.values() if hasattr(entry, "properties")}
    if len(dtypes) > 1:
        problems.append(f"its tensors have several dtypes, {', '.join(sorted(dtypes))}")
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"{source} is not the source model: {'; '.join(problems[:8])}{more}")
    for fqn in entries:
        places(metadata, fqn)
    return metadata


def _add_aliases(old: meta.Metadata, new: meta.Metadata, rules: Rules) -> list[str]:
    """Enter every Alias into the new metadata; returns the data files that they lie in."""
    files: set[str] = set()
    for name, rule in rules.targets.items():
        if isinstance(rule, Alias):
            filled = places(old, rule.source)
            entry = old.state_dict_metadata[rule.source]
            new.state_dict_metadata[name] = dataclasses.replace(entry, chunks=[chunk for chunk, _ in filled])
            for chunk, info in filled:
                new.storage_data[meta.MetadataIndex(name, chunk.offsets)] = info
                files.add(info.relative_path)
    return sorted(files)


def _add_zeros(old: meta.Metadata, new: meta.Metadata, rules: Rules, marks: Mapping[str, str]) -> dict[str, str]:
    """Enter the Zeros that are not written but as others of their shape; returns their fingerprints."""
    written = _written(old, rules)
    again = {name: written[name] for name, rule in rules.targets.items() if isinstance(rule, Zeros)}
    for name, other in again.items():
        entry = new.state_dict_metadata[name] = new.state_dict_metadata[other]
        offsets = entry.chunks[0].offsets
        new.storage_data[meta.MetadataIndex(name, offsets)] = new.storage_data[meta.MetadataIndex(other, offsets)]
    return {name: marks[other] for name, other in again.items()}


def _add_part(
    old: meta.Metadata, new: meta.Metadata, target: Path, rules: Rules, rank: int, world_size: int
) -> dict[str, str]:
    """Enter what one rank computed into the new metadata; returns the fingerprints."""
    file, names = _index(target, rank), _share(old, rules, rank, world_size)
    index = json.loads(file.read_text()) if file.exists() else {}
    if set(index) != set(names):
        raise CheckpointError(f"rank {rank} of {world_size} has not written its part of {target}")
    for name, (dtype, offset, length, _) in index.items():
        shape = torch.Size(rules.target_shapes[name])
        chunk = meta.ChunkStorageMetadata(torch.Size([0] * len(shape)), shape)
        properties = meta.TensorProperties(dtype=getattr(torch, dtype))
        new.state_dict_metadata[name] = meta.TensorStorageMetadata(properties, shape, [chunk])
        new.storage_data[meta.MetadataIndex(name, chunk.offsets)] = _StorageInfo(_part(old, rank), offset, length)
    file.unlink(missing_ok=True)
    return {name: mark for name, (*_, mark) in index.items()}


def _compute(read: Reader, rules: Rules, name: str) -> torch.Tensor:
    rule, shape = rules.targets[name], rules.target_shapes[name]
    if isinstance(rule, Zeros):
        return torch.zeros(shape, dtype=_dtype(read.metadata, rule))
    assert isinstance(rule, Compute)
    sources = [read(fqn) for fqn in rule.sources]
    dtypes = {tensor.dtype for tensor in sources}
    tensor = rule.fn(*sources).detach().contiguous()
    if tuple(tensor.shape) != shape or not dtypes <= {tensor.dtype}:
        raise CheckpointError(
            f"{name} must be {shape} in the dtype of its sources, {', '.join(map(str, dtypes)) or 'any'}: "
            f"{rule.note} gave {tuple(tensor.shape)} {tensor.dtype}"
        )
    # torch.save writes a whole storage, also what a view of it does not show.
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def append(tensor: torch.Tensor, stream: DirectFile) -> tuple[str, int, int]:
    """Writes a tensor; returns the dtype's name, and the place: offset and length."""
    offset, checked = stream.position, torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # torch never compares it, and the seal has a SHA-256
    try:
        torch.save(tensor, stream)
    except RuntimeError as error:  # torch's own, about the file that it could not finish, hides why
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    finally:
        torch.serialization.set_crc32_options(checked)
    return str(tensor.dtype).removeprefix("torch."), offset, stream.position - offset


def _dtype(metadata: meta.Metadata, rule: Zeros) -> torch.dtype:
    dtype = metadata.state_dict_metadata[rule.like].properties.dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def _written(source: meta.Metadata, rules: Rules) -> dict[str, str]:
    """{name: the name under which it is written} for every tensor that is no Alias: its own, or, for Zeros, that of
    the first of their shape and dtype."""
    first: dict[tuple[Any, ...], str] = {}
    written = {}
    for name, rule in rules.targets.items():
        if isinstance(rule, Compute):
            written[name] = name
        elif isinstance(rule, Zeros):
            written[name] = first.setdefault((rules.target_shapes[name], _dtype(source, rule)), name)
    return written


def _share(source: meta.Metadata, rules: Rules, rank: int, world_size: int) -> list[str]:
    """One rank's tensors to write: from the largest down, each goes to the rank with the least so far."""
    computed = {name: rules.targets[name] for name in dict.fromkeys(_written(source, rules).values())}
    costs = {name: math.prod(rules.target_shapes[name]) for name in computed}
    for name, rule in computed.items():
        costs[name] += sum(math.prod(rules.source_shapes[fqn]) for fqn in rule.sources)
    loads, mine = [0] * world_size, []
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        least = loads.index(min(loads))
        loads[least] += costs[name]
        if least == rank:
            mine.append(name)
    # Those of one size follow each other, in memory that they can reuse; the two largest are far apart, as one of them
    # is still written when the next is computed.
    return mine[::2] + mine[1::2][::-1]


def _part(source: meta.Metadata, rank: int) -> str:
    """A rank's data file: a name that the source does not use, which may be a grown checkpoint itself."""
    taken = {info.relative_path for info in source.storage_data.values()}
    return next(name for i in range(len(taken) + 1) if (name := f"__grown{i}_{rank}.distcp") not in taken)


def _work(target: Path) -> Path:
    return target.with_name(target.name + ".tmp")


def _index(target: Path, rank: int) -> Path:
    return _work(target) / f"__grown_{rank}.json"


def _link(source: Path, target: Path) -> bool:
    """Hard link a data file; where the file system cannot, copy it and return False."""
    try:
        os.link(source.resolve(), target)
        return True
    except OSError as error:
        if error.errno not in CANNOT_LINK:
            raise
    shutil.copyfile(source, target)
    with target.open("rb") as stream:
        os.fsync(stream.fileno())
    return False
