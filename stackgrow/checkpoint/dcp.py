"""The safe side of DCP: a checkpoint's metadata, tensors and byte items, read without running them.

DCP's ``.metadata`` is a pickle and so is every byte item; DCP loads both unrestricted, and follows whatever
file path the metadata names. The readers here accept DCP's own classes, plain data and tensors, nothing else.
"""

from __future__ import annotations

import io
import math
import pickle
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint.metadata as meta
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.utils import _create_file_view

from stackgrow.errors import DamagedError

METADATA = ".metadata"
# What torchtitan saves beside the model: nested states, which DCP flattens. Model tensors have no prefix.
STATE_PREFIXES = ("optimizer.", "lr_scheduler.", "dataloader.", "train_state.")


class CheckpointError(DamagedError):
    """A checkpoint that is unsafe, damaged, or not the one that was asked for."""


def _path(*parts: str) -> str:
    return str(PurePosixPath(*parts))


_TENSOR = (meta.TensorStorageMetadata, meta.TensorProperties, meta.ChunkStorageMetadata)
_RECORDS = (
    *_TENSOR,
    meta.Metadata,
    meta.MetadataIndex,
    meta.BytesStorageMetadata,
    meta.StorageMeta,
    _StorageInfo,
)
_ALLOWED: dict[tuple[str, str], Any] = {
    **{(cls.__module__, cls.__name__): cls for cls in (*_RECORDS, meta._MEM_FORMAT_ENCODING, torch.Size)},
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    ("torch.serialization", "_get_layout"): {"torch.strided": torch.strided}.__getitem__,
    ("pathlib", "PosixPath"): _path,
    ("pathlib._local", "PosixPath"): _path,  # as Python 3.13 writes it
}
# Not the unpickler in C: that has no hook for BUILD, and a state that is applied to an allowed class, rather
# than to an instance of it, changes that class for the whole process.
_PythonUnpickler: Any = pickle._Unpickler


class _Unpickler(_PythonUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise CheckpointError(f"it refers to {module}.{name}, which DCP's metadata never does")
        return _ALLOWED[module, name]

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], _RECORDS):
            raise CheckpointError("it sets the state of something that is no DCP record")
        super().load_build()

    dispatch = {**_PythonUnpickler.dispatch, pickle.BUILD[0]: load_build}  # noqa: RUF012


def read_metadata(folder: Path) -> meta.Metadata:
    """The ``.metadata`` of a DCP checkpoint, and proof that the files it names are there and long enough.

    Raises CheckpointError for a missing or damaged one, one that names anything but DCP's own classes, and
    one whose data lies elsewhere than in plain files in ``folder``.
    """
    file = folder / METADATA
    if not file.is_file():
        raise CheckpointError(f"{folder} is not a complete DCP checkpoint: it has no {METADATA}")
    try:
        with file.open("rb") as stream:
            metadata = _Unpickler(stream).load()
        if not isinstance(metadata, meta.Metadata):
            raise CheckpointError(f"it holds a {type(metadata).__name__}, not DCP's Metadata")
        _check_records(metadata)
        _check_files(folder, metadata)
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CheckpointError(f"{file} is not loaded: {type(error).__name__}: {error}") from error
    return metadata


def _check_records(metadata: meta.Metadata) -> None:
    """Unpickling fills DCP's records with whatever is there."""
    for fqn, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, meta.BytesStorageMetadata) and isinstance(fqn, str):
            continue
        shapes = [entry.size, *(shape for chunk in entry.chunks for shape in (chunk.offsets, chunk.sizes))]
        alike = all(isinstance(s, torch.Size) and len(s) == len(entry.size) and min(s, default=0) >= 0 for s in shapes)
        if not (alike and isinstance(fqn, str) and isinstance(entry.properties.dtype, torch.dtype)):
            raise CheckpointError(f"its record of {fqn!r} is not that of a tensor")
    for index, info in metadata.storage_data.items():
        known = isinstance(index, meta.MetadataIndex) and isinstance(info, _StorageInfo)
        numbers = (info.offset, info.length) if known else ()
        if not (known and isinstance(info.relative_path, str) and all(isinstance(n, int) and n >= 0 for n in numbers)):
            raise CheckpointError(f"its record of the place of {index!r} is damaged")


def _check_files(folder: Path, metadata: meta.Metadata) -> None:
    ends: dict[str, int] = {}
    for info in metadata.storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in ends.items():
        if name in ("", ".", "..") or set(name) & set("/\\\0"):
            raise CheckpointError(f"data file {name!r} is not a plain file name")
        file = (folder / name).resolve()
        if file.parent != folder.resolve():
            raise CheckpointError(f"data file {name} is a link out of the checkpoint, to {file}")
        if not file.is_file() or file.stat().st_size < end:
            raise CheckpointError(f"data file {name} is missing or truncated: it must have {end} bytes or more")


class SafeReader(FileSystemReader):
    """DCP's file system reader over the ``read_metadata`` above. It has no per-rank metadata (saves without
    collectives), to which DCP would fall back when the metadata is refused."""

    def read_metadata(self) -> meta.Metadata:
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or meta.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class SafePlanner(DefaultLoadPlanner):
    """DCP's load planner, for which a byte item may hold plain data and tensors only."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        fqn = read_item.dest_index.fqn
        try:
            loaded = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{fqn} is not loaded, it holds more than plain data: {error}") from error
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[fqn], loaded)
        else:
            self.state_dict[fqn] = loaded


def is_model_key(fqn: str) -> bool:
    """Whether an entry of a torchtitan checkpoint belongs to the model."""
    return not fqn.startswith(STATE_PREFIXES)


def tensor_shapes(metadata: meta.Metadata) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """{fqn: (shape, dtype)} of every tensor in a checkpoint, the optimizer's included."""
    entries = metadata.state_dict_metadata.items()
    tensors = {fqn: entry for fqn, entry in entries if isinstance(entry, meta.TensorStorageMetadata)}
    return {fqn: (tuple(entry.size), entry.properties.dtype) for fqn, entry in tensors.items()}


def places(metadata: meta.Metadata, fqn: str) -> list[tuple[meta.ChunkStorageMetadata, _StorageInfo]]:
    """The chunks of one tensor, each with its place on disk; CheckpointError where they do not fill it.

    Empty chunks, which ranks write that have no row of a small tensor, are left out."""
    entry = metadata.state_dict_metadata[fqn]
    if not isinstance(entry, meta.TensorStorageMetadata):
        raise CheckpointError(f"{fqn} is not a tensor")
    chunks = {chunk.offsets: chunk for chunk in entry.chunks if math.prod(chunk.sizes)}
    infos = [metadata.storage_data.get(meta.MetadataIndex(fqn, offsets)) for offsets in chunks]
    if None in infos or not _fill(list(chunks.values()), entry.size):
        raise CheckpointError(f"{fqn}: its {len(chunks)} stored chunks do not fill {tuple(entry.size)}")
    filled = list(zip(chunks.values(), infos, strict=True))
    if any(math.prod(chunk.sizes) * entry.properties.dtype.itemsize > info.length for chunk, info in filled):
        raise CheckpointError(f"{fqn}: a chunk is larger than what is stored of it")
    return filled


def _fill(chunks: list[meta.ChunkStorageMetadata], size: torch.Size) -> bool:
    """Whether chunks lie inside of a tensor, apart from each other, and leave no gap."""
    boxes = sorted((c.offsets, [o + n for o, n in zip(c.offsets, c.sizes, strict=True)]) for c in chunks)
    for i, (low, high) in enumerate(boxes):
        if any(end > n for end, n in zip(high, size, strict=True)):
            return False
        for other_low, other_high in islice(boxes, i + 1, None):
            if high and other_low[0] >= high[0]:
                break  # it begins below this chunk's last row, and so do all after it
            if all(a < d and c < b for a, b, c, d in zip(low, high, other_low, other_high, strict=True)):
                return False
    return sum(math.prod(chunk.sizes) for chunk in chunks) == math.prod(size)


def read_tensor(folder: Path, metadata: meta.Metadata, fqn: str) -> torch.Tensor:
    """One whole tensor on the CPU, assembled from its chunks, of which one is held at a time beside it."""
    entry, filled = metadata.state_dict_metadata[fqn], places(metadata, fqn)
    if len(filled) == 1 and filled[0][0].sizes == entry.size:
        return _read_chunk(folder, fqn, *filled[0], entry.properties.dtype)
    tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
    for chunk, info in filled:
        box = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
        tensor[box] = _read_chunk(folder, fqn, chunk, info, tensor.dtype)
    return tensor


def read_item(folder: Path, metadata: meta.Metadata, fqn: str) -> Any:
    """One entry that is no tensor, such as "train_state.step"; plain data and tensors only."""
    info = metadata.storage_data[meta.MetadataIndex(fqn)]
    with (folder / info.relative_path).open("rb") as stream:
        return torch.load(_create_file_view(stream, info.offset, info.length), weights_only=True)


def _read_chunk(
    folder: Path, fqn: str, chunk: meta.ChunkStorageMetadata, info: _StorageInfo, dtype: torch.dtype
) -> torch.Tensor:
    if info.transform_descriptors:
        raise CheckpointError(f"{fqn} was written through {info.transform_descriptors}: save it without")
    with (folder / info.relative_path).open("rb") as stream:
        view = _create_file_view(stream, info.offset, info.length)
        try:
            part = torch.load(view, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged zip or pickle can raise nearly anything
            place = f"{folder / info.relative_path} at {info.offset}"
            raise CheckpointError(f"{fqn}: {place} is not loaded: {type(error).__name__}: {error}") from error
    if not isinstance(part, torch.Tensor) or part.dtype != dtype or part.shape != chunk.sizes:
        raise CheckpointError(f"{fqn}: {folder / info.relative_path} holds another tensor at {info.offset}")
    return part
