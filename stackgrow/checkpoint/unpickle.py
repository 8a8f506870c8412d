"""Pickles from strangers: DCP's ``.metadata``, and what torch.save wrote of a tensor or of plain data.

A pickle is a program. That it names no function but ours is not enough: 495 bytes that nest tuples and use them as a
key take longer than the universe to hash, 437 that join a path to itself make gigabytes. Here every instruction takes
a time and a memory that its own length bounds, so that a whole pickle costs no more than its length:

- only the instructions that Pickler writes for such data are known;
- a key is text or a number, or one of DCP's records of these; a shape has few dimensions, a path a bounded length;
- what was built before may be referred to again only where it is a record, a scalar or a short tuple of scalars.

The last makes what was read a tree, which can be compared and printed in linear time, too.
"""

from __future__ import annotations

import functools
import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any

import torch
import torch.distributed.checkpoint.metadata as meta
from torch.distributed.checkpoint.filesystem import _StorageInfo

MOST_DIMENSIONS = 8
PROPERTIES = 5  # scalars of a tensor's properties; torch 2.15 adds strides
MOST_PATH = 4096  # characters, as Linux has it
MOST_SHARED = 64  # items of a tuple that is referred to again
MOST_METADATA = (
    1 << 28
)  # bytes of a ``.metadata``: some hundred for each chunk of a tensor

SCALARS = (
    str,
    int,
    float,
    bool,
    bytes,
    type(None),
    torch.dtype,
    torch.layout,
    meta._MEM_FORMAT_ENCODING,
)
RECORDS = (
    meta.Metadata,
    meta.MetadataIndex,
    meta.TensorStorageMetadata,
    meta.TensorProperties,
    meta.ChunkStorageMetadata,
    meta.BytesStorageMetadata,
    meta.StorageMeta,
    _StorageInfo,
)
DTYPES = {
    name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}


class UnsafePickleError(pickle.UnpicklingError):
    """A pickle that is not what DCP or torch.save writes."""


@dataclass(frozen=True)
class Function:
    """What a pickle may call; ``call`` checks its arguments."""

    name: str
    call: Callable[..., Any]


@dataclass(frozen=True)
class Storage:
    """A storage of ``elements`` elements of ``itemsize`` bytes, all of which are in the file."""

    elements: int
    itemsize: int


@dataclass(frozen=True)
class SavedTensor:
    """Stands for a tensor that torch.load will make."""

    shape: torch.Size


class _Instructions(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> Any:
        raise UnsafePickleError(
            f"it has the instruction {bytes([code])!r}, which is never written"
        )


# Not the unpickler in C: that has no hook for single instructions.
_PythonUnpickler: Any = pickle._Unpickler
_WRITTEN = (
    # protocol, end, and the stack
    pickle.PROTO + pickle.FRAME + pickle.STOP + pickle.MARK
    # scalars
    + pickle.NONE + pickle.NEWTRUE + pickle.NEWFALSE + pickle.BININT + pickle.BININT1 + pickle.BININT2
    + pickle.LONG1 + pickle.BINFLOAT + pickle.BINUNICODE + pickle.SHORT_BINUNICODE
    + pickle.BINBYTES + pickle.SHORT_BINBYTES
    # containers
    + pickle.EMPTY_TUPLE + pickle.TUPLE + pickle.TUPLE1 + pickle.TUPLE2 + pickle.TUPLE3
    + pickle.EMPTY_LIST + pickle.APPEND + pickle.APPENDS + pickle.EMPTY_DICT + pickle.SETITEM + pickle.SETITEMS
    # what was built before
    + pickle.BINPUT + pickle.LONG_BINPUT + pickle.MEMOIZE + pickle.BINGET + pickle.LONG_BINGET
    # objects
    + pickle.GLOBAL + pickle.STACK_GLOBAL + pickle.REDUCE + pickle.NEWOBJ + pickle.BUILD
)  # fmt: skip


class StrictUnpickler(_PythonUnpickler):
    """Knows ``names``, {(module, name): class, Function or scalar}, and nothing else."""

    names: Mapping[tuple[str, str], Any]
    what: str  # that the pickles are of, for messages
    dispatch = _Instructions(
        {code: _PythonUnpickler.dispatch[code] for code in _WRITTEN}
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.names:
            raise UnsafePickleError(
                f"it refers to {module}.{name}, which {self.what} never does"
            )
        return self.names[module, name]

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack.pop()
        if not isinstance(function, Function) or type(arguments) is not tuple:
            raise UnsafePickleError(
                "it calls something that is no function of its kind"
            )
        self.append(function.call(*arguments))

    def load_newobj(self) -> None:
        arguments = self.stack.pop()
        cls = self.stack.pop()
        if not any(cls is record for record in RECORDS) or arguments != ():
            raise UnsafePickleError("it makes something that is no DCP record")
        self.append(cls.__new__(cls))

    def load_build(self) -> None:
        record, state = self.stack[-2:]
        if not isinstance(record, RECORDS):
            raise UnsafePickleError(
                "it sets the state of something that is no DCP record"
            )
        if isinstance(record, meta.TensorProperties):
            self.stack[-1] = _properties(state)
        elif type(state) is not dict or not all(type(name) is str for name in state):
            raise UnsafePickleError("it sets the state of a record to what is none")
        super().load_build()

    def load_appends(self) -> None:
        items = self.pop_mark()
        self._list().extend(items)

    def load_append(self) -> None:
        item = self.stack.pop()
        self._list().append(item)

    def _list(self) -> list[Any]:
        if type(self.stack[-1]) is not list:
            raise UnsafePickleError("it appends to what is no list")
        return self.stack[-1]

    def load_setitems(self) -> None:
        items = self.pop_mark()
        for i in range(0, len(items), 2):
            self._set(items[i], items[i + 1])

    def load_setitem(self) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        self._set(key, value)

    def _set(self, key: Any, value: Any) -> None:
        if type(self.stack[-1]) is not dict:
            raise UnsafePickleError("it sets items of what is no dictionary")
        if isinstance(key, meta.MetadataIndex):
            _check_index(key)
        elif not isinstance(key, (str, int, float, type(None))):
            raise UnsafePickleError(f"it has a {type(key).__name__} as a key")
        self.stack[-1][key] = value

    def load_binget(self) -> None:
        super().load_binget()
        _check_shared(self.stack[-1])

    def load_long_binget(self) -> None:
        super().load_long_binget()
        _check_shared(self.stack[-1])

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.APPEND[0]] = load_append
    dispatch[pickle.APPENDS[0]] = load_appends
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.BINGET[0]] = load_binget
    dispatch[pickle.LONG_BINGET[0]] = load_long_binget


def _check_index(index: meta.MetadataIndex) -> None:
    """That it can be hashed in no time."""
    fqn, offset = vars(index).get("fqn"), index.offset
    if type(fqn) is not str or not (offset is None or type(offset) is torch.Size):
        raise UnsafePickleError(
            "it has the place of something that has no name or no offsets"
        )


def _check_shared(value: Any) -> None:
    if isinstance(
        value, (*SCALARS, *RECORDS, type, torch.Size, Function, Storage, SavedTensor)
    ):
        return
    is_short = type(value) is tuple and len(value) <= MOST_SHARED
    if not is_short or not all(isinstance(item, SCALARS) for item in value):
        raise UnsafePickleError(
            f"it refers to one {type(value).__name__} from several places"
        )


def _properties(state: Any) -> tuple[Any, ...]:
    """The state of a tensor's properties, as the torch that runs takes it: torch 2.15 writes strides after five
    scalars, which say how the tensor lay in memory when it was saved, and nothing of the file."""
    if type(state) is not tuple or len(state) not in (PROPERTIES, PROPERTIES + 1):
        raise UnsafePickleError("it has tensor properties of another form")
    scalars, strides = state[:PROPERTIES], state[PROPERTIES:]
    if not all(isinstance(value, SCALARS) for value in scalars):
        raise UnsafePickleError("it has tensor properties that are no scalars")
    for lengths in strides:
        if lengths is not None and not _are_lengths(lengths):
            raise UnsafePickleError("it has strides that are no numbers")
    if "strides" in meta.TensorProperties.__dataclass_fields__:
        return state
    return scalars


def _are_lengths(value: Any) -> bool:
    """Whether it is one number for each dimension."""
    if type(value) is not tuple or len(value) > MOST_DIMENSIONS:
        return False
    return all(type(length) is int for length in value)


# The functions that such pickles call.


def _size(dimensions: Any) -> torch.Size:
    if type(dimensions) is not tuple or len(dimensions) > MOST_DIMENSIONS:
        raise UnsafePickleError(
            f"it has a shape that is no tuple of up to {MOST_DIMENSIONS} numbers"
        )
    return torch.Size(dimensions)


def _layout(name: Any) -> torch.layout:
    if not isinstance(name, str) or name != "torch.strided":
        raise UnsafePickleError("it has a tensor that is not strided")
    return torch.strided


def _memory_format(value: Any) -> meta._MEM_FORMAT_ENCODING:
    for encoding in meta._MEM_FORMAT_ENCODING:
        if type(value) is int and encoding.value == value:
            return encoding
    raise UnsafePickleError("it has an unknown memory format")


def _attribute(owner: Any, name: Any) -> meta._MEM_FORMAT_ENCODING:
    """``getattr``: so do Python 3.11.0 to 3.11.3 write the member of an enum, instead of calling it with its value."""
    if owner is MEMORY_FORMAT and type(name) is str:
        for encoding in meta._MEM_FORMAT_ENCODING:
            if encoding.name == name:
                return encoding
    raise UnsafePickleError(
        "it takes an attribute of something that is no memory format"
    )


def _path(*parts: Any) -> str:
    if (
        not all(type(part) is str for part in parts)
        or sum(len(part) + 1 for part in parts) > MOST_PATH
    ):
        raise UnsafePickleError(
            f"it has a path that is not of text, or longer than {MOST_PATH} characters"
        )
    return str(PurePosixPath(*parts))


MEMORY_FORMAT = Function("_MEM_FORMAT_ENCODING", _memory_format)
PATH = Function("PosixPath", _path)
SIZE = Function("Size", _size)


class MetadataUnpickler(StrictUnpickler):
    """Of DCP's ``.metadata``."""

    what = "DCP's metadata"
    names = {  # noqa: RUF012
        **{(record.__module__, record.__name__): record for record in RECORDS},
        **{("torch", name): dtype for name, dtype in DTYPES.items()},
        ("torch", "Size"): SIZE,
        ("torch.serialization", "_get_layout"): Function("_get_layout", _layout),
        (
            meta._MEM_FORMAT_ENCODING.__module__,
            meta._MEM_FORMAT_ENCODING.__name__,
        ): MEMORY_FORMAT,
        ("builtins", "getattr"): Function("getattr", _attribute),
        ("pathlib", "PosixPath"): PATH,
        ("pathlib._local", "PosixPath"): PATH,  # as Python 3.13 writes it
    }


def load_metadata(stream: IO[bytes]) -> meta.Metadata:
    """The pickle in a ``.metadata``, whose records may hold anything yet. A damaged one raises nearly anything.

    Who reads the same bytes again may get the same object: nobody changes it.
    """
    pickled = stream.read(MOST_METADATA + 1)
    if len(pickled) > MOST_METADATA:
        raise UnsafePickleError(f"it is larger than {MOST_METADATA} bytes")
    return _metadata_in(pickled)


@functools.lru_cache(maxsize=2)  # a growth reads its source's some times over
def _metadata_in(pickled: bytes) -> meta.Metadata:
    metadata = MetadataUnpickler(io.BytesIO(pickled)).load()
    if not isinstance(metadata, meta.Metadata):
        raise UnsafePickleError(
            f"it holds a {type(metadata).__name__}, not DCP's Metadata"
        )
    return metadata


# torch.save: a zip of a pickle, data.pkl, and of the storages that it refers to, data/0 and so on.

# {name of a storage class: bytes of an element}
_STORAGES = {
    name: dtype.itemsize
    for dtype, name in torch.storage._dtype_to_storage_type_map().items()
}


class SavedUnpickler(StrictUnpickler):
    """Of the data.pkl in what torch.save wrote: makes the plain data in it, with a SavedTensor for each tensor."""

    what = "plain data"

    def __init__(self, pickled: bytes, storage_bytes: Mapping[str, int]):
        super().__init__(io.BytesIO(pickled))
        self.storage_bytes = storage_bytes
        self.encoded = 0
        self.most_encoded = len(pickled)
        self.names = {
            ("torch._utils", "_rebuild_tensor_v2"): Function(
                "_rebuild_tensor_v2", self._tensor
            ),
            ("torch._utils", "_rebuild_tensor_v3"): Function(
                "_rebuild_tensor_v3", self._tensor
            ),
            ("collections", "OrderedDict"): Function(
                "OrderedDict", dict[Any, Any]().copy
            ),
            ("_codecs", "encode"): Function("encode", self._bytes),
            ("torch", "Size"): SIZE,
            **{("torch", name): dtype for name, dtype in DTYPES.items()},
            **{
                ("torch", name): Storage(0, itemsize)
                for name, itemsize in _STORAGES.items()
            },
            ("torch.storage", "UntypedStorage"): Storage(0, 1),
        }

    def persistent_load(self, reference: Any) -> Storage:
        if (
            type(reference) is not tuple
            or len(reference) != 5
            or reference[0] != "storage"
        ):
            raise UnsafePickleError("it refers to something else than a storage")
        _, kind, key, _location, elements = reference
        if (
            not isinstance(kind, Storage)
            or type(key) is not str
            or type(elements) is not int
        ):
            raise UnsafePickleError("it has a reference to a storage that is none")
        if not 0 <= elements * kind.itemsize <= self.storage_bytes.get(key, -1):
            raise UnsafePickleError(f"its storage {key!r:.20} is not in the file whole")
        return Storage(elements, kind.itemsize)

    def _tensor(
        self, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any
    ) -> SavedTensor:
        shape, strides = _size(shape), _size(strides)
        if (
            not isinstance(storage, Storage)
            or type(offset) is not int
            or len(shape) != len(strides)
        ):
            raise UnsafePickleError("it has a tensor that is none")
        itemsize = storage.itemsize
        if rest and isinstance(
            rest[-1], torch.dtype
        ):  # of _rebuild_tensor_v3, whose storage is one of bytes
            itemsize = rest[-1].itemsize
        last = offset + sum(
            (n - 1) * stride for n, stride in zip(shape, strides, strict=True)
        )
        inside = (
            offset >= 0
            and min(strides, default=0) >= 0
            and (last + 1) * itemsize <= storage.elements * storage.itemsize
        )
        if 0 not in shape and not inside:
            raise UnsafePickleError("it has a tensor that reaches beyond its storage")
        return SavedTensor(shape)

    def _bytes(self, text: Any, encoding: Any) -> bytes:
        if type(text) is not str or encoding != "latin1":
            raise UnsafePickleError("it encodes something else than bytes")
        self.encoded += len(text)
        if self.encoded > self.most_encoded:
            raise UnsafePickleError("it makes more bytes than it holds")
        return text.encode("latin1")

    dispatch = _Instructions(StrictUnpickler.dispatch)
    dispatch[pickle.BINPERSID[0]] = _PythonUnpickler.dispatch[pickle.BINPERSID[0]]


class FileSlice(io.RawIOBase):
    """The bytes [start, start + length) of an open file, as a file of their own."""

    def __init__(self, file: IO[bytes], start: int, length: int):
        self.file = file
        self.start = start
        self.length = length
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[
            whence
        ]
        if origin + offset < 0:
            raise ValueError("a place before the beginning")
        self.position = origin + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self.length - self.position))
        self.file.seek(self.start + self.position)
        read: int = self.file.readinto(view[:wanted])  # type: ignore[attr-defined]
        self.position += read
        return read


def check_saved(stream: IO[bytes], length: int) -> None:
    """That torch.load, of a ``stream`` of ``length`` bytes, makes no more of it than that: tensors and plain data.

    Raises UnsafePickleError, or whatever a damaged file makes zipfile raise.
    """
    with zipfile.ZipFile(stream) as archive:
        files = archive.infolist()
        if any(file.compress_type != zipfile.ZIP_STORED for file in files):
            raise zipfile.BadZipFile(
                "its parts are compressed, and DCP stores them as they are"
            )
        if sum(file.file_size for file in files) > length:
            raise zipfile.BadZipFile("its parts are larger than itself")
        pickles = [file for file in files if file.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise zipfile.BadZipFile(f"it has {len(pickles)} parts named data.pkl")
        storage_bytes = {}
        for file in files:
            folder, _, key = file.filename.rpartition("/")
            if folder.endswith("/data"):
                storage_bytes[key] = file.file_size
        pickles[0].CRC = None  # type: ignore[assignment]  # not compared: torch does not, and convert.py writes none
        SavedUnpickler(archive.read(pickles[0]), storage_bytes).load()


def load_saved(stream: IO[bytes], length: int) -> Any:
    """What torch.save wrote into a ``stream`` of ``length`` bytes: tensors, on the CPU, and plain data. Raises what
    ``check_saved`` and torch.load raise."""
    check_saved(stream, length)
    stream.seek(0)
    return torch.load(stream, map_location="cpu", weights_only=True)
