"""The safe side of DCP: a checkpoint's metadata, tensors and byte items, read without running them.

DCP's ``.metadata`` is a pickle and so is every byte item; DCP loads both unrestricted, and follows whatever
file path the metadata names. The readers here accept DCP's own classes, plain data and tensors, nothing else.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import pickle
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint.metadata as meta
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
)
from torch.futures import Future

from stackgrow.checkpoint.save_planner import is_plain
from stackgrow.checkpoint.unpickle import (
    FileSlice,
    check_saved,
    load_metadata,
    load_saved,
)
from stackgrow.errors import DamagedError

METADATA = ".metadata"
# What torchtitan saves beside the model: nested states, which DCP flattens. Model tensors have no prefix.
STATE_PREFIXES = ("optimizer.", "lr_scheduler.", "dataloader.", "train_state.")


class CheckpointError(DamagedError):
    """A checkpoint that is unsafe, damaged, or not the one that was asked for."""


def read_metadata(folder: Path) -> meta.Metadata:
    """The ``.metadata`` of a DCP checkpoint, and proof that the files it names are there and long enough.

    Raises CheckpointError for a missing or damaged one, one that names anything but DCP's own classes, and
    one whose data lies elsewhere than in plain files in ``folder``.
    """
    file = folder / METADATA
    if not file.is_file():
        raise CheckpointError(
            f"{folder} is not a complete DCP checkpoint: it has no {METADATA}"
        )
    try:
        with file.open("rb") as stream:
            metadata = load_metadata(stream)
        _check_records(metadata)
        _check_files(folder, metadata.storage_data.values())
    except PermissionError:
        raise  # of a file that may not be read nothing is known
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CheckpointError(
            f"{file} is not loaded: {type(error).__name__}: {error}"
        ) from error
    return metadata


def _check_records(metadata: meta.Metadata) -> None:
    """Unpickling fills DCP's records with whatever is there."""
    checked: set[int] = set()  # tensors may share a record
    for fqn, entry in metadata.state_dict_metadata.items():
        if not isinstance(fqn, str):
            raise CheckpointError("it has a tensor whose name is no text")
        if (
            id(entry) not in checked
            and not isinstance(entry, meta.BytesStorageMetadata)
            and not _is_tensor(entry)
        ):
            raise CheckpointError(f"its record of {fqn:.200} is not that of a tensor")
        checked.add(id(entry))
    for index, info in metadata.storage_data.items():
        if not isinstance(index, meta.MetadataIndex):
            raise CheckpointError("it has the place of something that has no name")
        if not _is_place(info):
            raise CheckpointError(
                f"its record of the place of {index.fqn:.200} is damaged"
            )


def _is_tensor(entry: Any) -> bool:
    if not isinstance(entry, meta.TensorStorageMetadata) or not isinstance(
        entry.properties, meta.TensorProperties
    ):
        return False
    if not isinstance(entry.properties.dtype, torch.dtype) or not isinstance(
        entry.chunks, list
    ):
        return False
    shapes = [entry.size]
    for chunk in entry.chunks:
        if not isinstance(chunk, meta.ChunkStorageMetadata):
            return False
        shapes += [chunk.offsets, chunk.sizes]
    for shape in shapes:
        if (
            not isinstance(shape, torch.Size)
            or len(shape) != len(entry.size)
            or min(shape, default=0) < 0
        ):
            return False
    return True


def _is_place(info: Any) -> bool:
    if not isinstance(info, _StorageInfo) or not isinstance(info.relative_path, str):
        return False
    return all(
        isinstance(number, int) and number >= 0 for number in (info.offset, info.length)
    )


def _check_files(folder: Path, infos: Iterable[_StorageInfo]) -> None:
    ends: dict[str, int] = {}
    for info in infos:
        end = info.offset + info.length
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), end)
    for name, end in ends.items():
        if name in ("", ".", "..") or set(name) & set("/\\\0"):
            raise CheckpointError(f"data file {name!r:.200} is not a plain file name")
        file = (folder / name).resolve()
        if file.parent != folder.resolve():
            raise CheckpointError(
                f"data file {name} is a link out of the checkpoint, to {file}"
            )
        if not file.is_file() or file.stat().st_size < end:
            raise CheckpointError(
                f"data file {name} is missing or truncated: it must have {end} bytes or more"
            )


class SafeReader(FileSystemReader):
    """DCP's file system reader over the ``read_metadata`` above. It has no per-rank metadata (saves without
    collectives), to which DCP would fall back when the metadata is refused."""

    def read_metadata(self) -> meta.Metadata:
        metadata = read_metadata(Path(self.path))
        stored = metadata.storage_meta or meta.StorageMeta()
        session = dataclasses.replace(stored, load_id=self.load_id)
        return dataclasses.replace(metadata, storage_meta=session)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        checked: set[bytes] = set()  # byte items: thousands, of a dozen values
        for item in plan.items:
            info = self.storage_data[item.storage_index]
            with _opened(Path(self.path), item.storage_index.fqn, info) as stream:
                if item.type != LoadItemType.BYTE_IO:
                    check_saved(stream, info.length)
                    continue
                saved = stream.read()
                if saved not in checked:
                    check_saved(io.BytesIO(saved), info.length)
                    checked.add(saved)
        return super().read_data(plan, planner)


class SafePlanner(DefaultLoadPlanner):
    """DCP's load planner, for which a byte item may hold plain data and tensors only. Equal plain values, as
    save_planner.py tells of, are unpickled once."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._loaded: dict[bytes, Any] = {}

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        fqn = read_item.dest_index.fqn
        saved = value.getvalue()
        if saved in self._loaded:
            loaded = self._loaded[saved]
        else:
            loaded = self._load(fqn, value)
            if is_plain(loaded):  # whoever gets it cannot change it for others
                self._loaded[saved] = loaded
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[fqn], loaded)
        else:
            self.state_dict[fqn] = loaded

    @staticmethod
    def _load(fqn: str, value: io.BytesIO) -> Any:
        try:
            return torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{fqn} is not loaded, it holds more than plain data: {error}"
            ) from error


def is_model_key(fqn: str) -> bool:
    """Whether an entry of a torchtitan checkpoint belongs to the model."""
    return not fqn.startswith(STATE_PREFIXES)


def tensor_shapes(
    metadata: meta.Metadata,
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """{fqn: (shape, dtype)} of every tensor in a checkpoint, the optimizer's included."""
    shapes = {}
    for fqn, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, meta.TensorStorageMetadata):
            shapes[fqn] = (tuple(entry.size), entry.properties.dtype)
    return shapes


def places(
    metadata: meta.Metadata, fqn: str
) -> list[tuple[meta.ChunkStorageMetadata, _StorageInfo]]:
    """The chunks of one tensor, each with its place on disk; CheckpointError where they do not fill it.

    Empty chunks, which ranks write that have no row of a small tensor, are left out."""
    entry = metadata.state_dict_metadata[fqn]
    if not isinstance(entry, meta.TensorStorageMetadata):
        raise CheckpointError(f"{fqn} is not a tensor")
    chunks = {chunk.offsets: chunk for chunk in entry.chunks if math.prod(chunk.sizes)}
    filled = []
    for offsets, chunk in chunks.items():
        info = metadata.storage_data.get(meta.MetadataIndex(fqn, offsets))
        if info is None:
            break
        filled.append((chunk, info))
    if len(filled) < len(chunks) or not _fill(chunks.values(), entry.size):
        raise CheckpointError(
            f"{fqn}: its {len(chunks)} stored chunks do not fill {tuple(entry.size)}"
        )
    for chunk, info in filled:
        if math.prod(chunk.sizes) * entry.properties.dtype.itemsize > info.length:
            raise CheckpointError(f"{fqn}: a chunk is larger than what is stored of it")
    return filled


def _fill(chunks: Iterable[meta.ChunkStorageMetadata], size: torch.Size) -> bool:
    """Whether chunks cover every element of a tensor once, and nothing else.

    Each chunk is a box, which its corners determine when they have alternating signs: those of neighbours cancel, and
    what is left of all are the corners of the whole tensor if, and only if, the boxes add up to it. Unlike a
    comparison of each with each, that takes a time that is linear in their number.
    """
    corners: Counter[tuple[int, ...]] = Counter()
    for chunk in chunks:
        for corner, sign in _corners(chunk.offsets, chunk.sizes):
            corners[corner] += sign
    for corner, sign in _corners([0] * len(size), size):
        corners[corner] -= sign
    return not any(corners.values())


def _corners(
    offsets: Iterable[int], sizes: Iterable[int]
) -> Iterator[tuple[tuple[int, ...], int]]:
    ranges = [
        ((start, 1), (start + length, -1))
        for start, length in zip(offsets, sizes, strict=True)
    ]
    for ends in itertools.product(*ranges):
        yield tuple(place for place, _ in ends), math.prod(sign for _, sign in ends)


def read_tensor(folder: Path, metadata: meta.Metadata, fqn: str) -> torch.Tensor:
    """One whole tensor on the CPU, assembled from its chunks, of which one is held at a time beside it."""
    entry = metadata.state_dict_metadata[fqn]
    filled = places(metadata, fqn)
    dtype = entry.properties.dtype
    if len(filled) == 1:  # a chunk that fills the tensor alone
        chunk, info = filled[0]
        return _read_chunk(folder, fqn, chunk, info, dtype)
    tensor = torch.empty(entry.size, dtype=dtype)
    for chunk, info in filled:
        box = tuple(
            slice(start, start + n)
            for start, n in zip(chunk.offsets, chunk.sizes, strict=True)
        )
        tensor[box] = _read_chunk(folder, fqn, chunk, info, dtype)
    return tensor


def read_item(folder: Path, metadata: meta.Metadata, fqn: str) -> Any:
    """One entry that is no tensor, such as "train_state.step"; plain data and tensors only.

    Raises CheckpointError where there is none, or where it holds anything else."""
    info = metadata.storage_data.get(meta.MetadataIndex(fqn))
    if info is None:
        raise CheckpointError(f"{folder} has no item {fqn}")
    return _load(folder, fqn, info)


def _read_chunk(
    folder: Path,
    fqn: str,
    chunk: meta.ChunkStorageMetadata,
    info: _StorageInfo,
    dtype: torch.dtype,
) -> torch.Tensor:
    part = _load(folder, fqn, info)
    if (
        not isinstance(part, torch.Tensor)
        or part.dtype != dtype
        or part.shape != chunk.sizes
    ):
        raise CheckpointError(
            f"{fqn}: {folder / info.relative_path} holds another tensor at {info.offset}"
        )
    return part


def _load(folder: Path, fqn: str, info: _StorageInfo) -> Any:
    with _opened(folder, fqn, info) as stream:
        return load_saved(stream, info.length)


@contextmanager
def _opened(folder: Path, fqn: str, info: _StorageInfo) -> Iterator[Any]:
    """The bytes of one entry, or of a chunk of it. What is wrong with them becomes a CheckpointError."""
    if info.transform_descriptors:
        raise CheckpointError(
            f"{fqn} was written through {info.transform_descriptors!r:.100}: save it without"
        )
    file = folder / info.relative_path
    with file.open("rb") as stream:
        try:
            yield FileSlice(stream, info.offset, info.length)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{fqn} is not loaded, it holds more than plain data: {error}"
            ) from error
        except OSError:
            raise
        except Exception as error:  # a damaged zip or pickle can raise nearly anything
            where = f"{file} at {info.offset}"
            raise CheckpointError(
                f"{fqn}: {where} is not loaded: {type(error).__name__}: {error}"
            ) from error
