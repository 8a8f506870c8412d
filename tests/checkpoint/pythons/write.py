"""Writes the ``.metadata`` of a checkpoint as DCP does under the Python that runs this, without torch:

    for python in python3.10 python3.11 python3.12 python3.13; do $python tests/checkpoint/pythons/write.py; done

What differs between Pythons is how they pickle paths and enums; torch's classes are stood for by ones of their names.
3.11.2 was Debian 12's. 3.11.0, 3.11.1 and 3.11.3 ran this compiled to WebAssembly, under node: npm's python-wasm 0.26.3
and 0.28.1, and pyodide 0.24.1.
"""

import dataclasses
import enum
import pathlib
import pickle
import platform
import sys
import types


def module(name):
    sys.modules[name] = types.ModuleType(name)
    return sys.modules[name]


torch = module("torch")
serialization = module("torch.serialization")
for name in ("torch.distributed", "torch.distributed.checkpoint"):
    module(name)
meta = module("torch.distributed.checkpoint.metadata")
filesystem = module("torch.distributed.checkpoint.filesystem")


def of(owner):
    """Lets a class or function be the one of that name in ``owner``, for pickle."""

    def put(thing):
        thing.__module__, thing.__qualname__ = owner.__name__, thing.__name__
        setattr(owner, thing.__name__, thing)
        return thing

    return put


@of(torch)
class Size(tuple):
    def __reduce__(self):
        return Size, (tuple(self),)


class Named:
    """As torch pickles a dtype, by its name alone, and a layout, by a function of its name."""

    def __init__(self, reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


@of(serialization)
def _get_layout(name):
    return Named((_get_layout, (name,)))


torch.float32 = Named("float32")
torch.float32.__module__ = "torch"


@of(meta)
class _MEM_FORMAT_ENCODING(enum.Enum):
    TORCH_CONTIGUOUS_FORMAT = 0
    TORCH_CHANNELS_LAST = 1
    TORCH_PRESERVE_FORMAT = 2


@of(meta)
class TensorProperties:
    def __getstate__(self):
        format = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
        return (torch.float32, _get_layout("torch.strided"), False, format, False)


def record(owner, name, fields):
    return of(owner)(
        dataclasses.make_dataclass(
            name, fields, eq=name == "MetadataIndex", frozen=name == "MetadataIndex"
        )
    )


Metadata = record(
    meta,
    "Metadata",
    ["state_dict_metadata", "planner_data", "storage_data", "storage_meta", "version"],
)
Index = record(meta, "MetadataIndex", ["fqn", "offset", "index"])
Tensor = record(meta, "TensorStorageMetadata", ["properties", "size", "chunks"])
Chunk = record(meta, "ChunkStorageMetadata", ["offsets", "sizes"])
Bytes = record(meta, "BytesStorageMetadata", [])
StorageMeta = record(
    meta, "StorageMeta", ["checkpoint_id", "save_id", "load_id", "modules"]
)
Info = record(filesystem, "_StorageInfo", ["relative_path", "offset", "length"])

metadata = Metadata(
    state_dict_metadata={
        "a.weight": Tensor(
            properties=TensorProperties(),
            size=Size((4, 3)),
            chunks=[
                Chunk(Size((0, 0)), Size((2, 3))),
                Chunk(Size((2, 0)), Size((2, 3))),
            ],
        ),
        "train_state.log_steps": Bytes(),
    },
    planner_data={
        "a.weight": ("a.weight",),
        "train_state.log_steps": ("train_state", "log_steps"),
    },
    storage_data={
        Index("a.weight", Size((0, 0)), 0): Info("__0_0.distcp", 0, 1000),
        Index("a.weight", Size((2, 0)), 1): Info("__1_0.distcp", 0, 1000),
        Index("train_state.log_steps", None, None): Info("__0_0.distcp", 1000, 500),
    },
    storage_meta=StorageMeta(
        pathlib.Path("/runs/a/checkpoint/step-3"), "5ed1", None, []
    ),
    version="1.0.0",
)
file = pathlib.Path(__file__).with_name(f"metadata-{platform.python_version()}.pickle")
file.write_bytes(pickle.dumps(metadata))
print(file.name, file.stat().st_size, "bytes")
