"""What a stranger's pickle may cost: small ones that take hours or gigabytes are refused at once."""

import io
import pickle
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from stackgrow.checkpoint.dcp import (
    METADATA,
    CheckpointError,
    SafePlanner,
    SafeReader,
    places,
    read_item,
    read_metadata,
    read_tensor,
    tensor_shapes,
)
from stackgrow.checkpoint.unpickle import MOST_METADATA

PYTHONS = sorted(Path(__file__).with_name("pythons").glob("*.pickle"))
# dcp.save({"a.weight": torch.ones(3, 4).t()}, checkpoint_id=...) under torch 2.15.0
TORCH_2_15 = Path(__file__).with_name("torches") / "metadata-2.15.0.pickle"
SECONDS = (
    30  # each takes milliseconds where it does not take hours; the machine may be busy
)
WEIGHT = torch.arange(12.0).reshape(4, 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    state = {"a.weight": WEIGHT, "train_state": {"step": 3}}
    dcp.save(state, checkpoint_id=tmp_path / "step-3", no_dist=True)
    return tmp_path / "step-3"


def refused(folder: Path, match: str) -> None:
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=match):
        read_metadata(folder)
    assert time.perf_counter() - started < SECONDS


def program(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + pickle.STOP


def text(value: str) -> bytes:
    return pickle.SHORT_BINUNICODE + bytes([len(value)]) + value.encode()


def get(place: int) -> bytes:
    return pickle.BINGET + bytes([place])


def number(value: int) -> bytes:
    return pickle.BININT1 + bytes([value])


def doubled(times: int, start: bytes = pickle.EMPTY_TUPLE) -> bytes:
    """((x, x), (x, x)) and so on, in four bytes for each level: 2 ** times in all."""
    return start + b"".join(
        pickle.MEMOIZE + get(level) + pickle.TUPLE2 for level in range(times)
    )


@pytest.mark.parametrize("file", PYTHONS, ids=lambda file: file.stem)
def test_the_metadata_that_each_python_writes_is_read(
    file: Path, tmp_path: Path
) -> None:
    (tmp_path / METADATA).write_bytes(file.read_bytes())
    for name in ("__0_0.distcp", "__1_0.distcp"):
        (tmp_path / name).write_bytes(bytes(1500))
    metadata = read_metadata(tmp_path)
    assert tensor_shapes(metadata) == {"a.weight": ((4, 3), torch.float32)}
    assert len(places(metadata, "a.weight")) == 2
    assert metadata.state_dict_metadata["a.weight"].properties == TensorProperties(
        torch.float32
    )
    assert metadata.storage_meta.checkpoint_id == "/runs/a/checkpoint/step-3"


def test_metadata_of_torch_2_15_is_read_by_every_torch(tmp_path: Path) -> None:
    """It writes strides; torches before it, given these, fail in the middle of a load."""
    (tmp_path / METADATA).write_bytes(TORCH_2_15.read_bytes())
    (tmp_path / "__0_0.distcp").write_bytes(bytes(1577))
    metadata = read_metadata(tmp_path)
    assert tensor_shapes(metadata) == {"a.weight": ((4, 3), torch.float32)}
    properties = metadata.state_dict_metadata["a.weight"].properties
    assert properties.dtype == torch.float32
    assert getattr(properties, "strides", (1, 4)) == (1, 4)


@pytest.mark.parametrize(
    "strides",
    [
        pickle.EMPTY_DICT,
        text("abc"),
        text("a") + pickle.TUPLE1,
        number(1) + pickle.TUPLE1 + pickle.TUPLE1,
        pickle.MARK + number(1) * 9 + pickle.TUPLE,
    ],
)
def test_strides_are_a_few_numbers(folder: Path, strides: bytes) -> None:
    written = TORCH_2_15.read_bytes()
    assert written[2:3] == pickle.FRAME, "whose length would be another"
    written = written[:2] + written[11:]
    numbers = number(1) + number(4) + pickle.TUPLE2
    assert written.count(numbers) == 1
    (folder / METADATA).write_bytes(written.replace(numbers, strides))
    refused(folder, "strides that are no numbers|another form|refers to one tuple")


def test_there_are_files_of_all_pythons_that_differ() -> None:
    """All written by these Pythons themselves, see pythons/write.py."""
    by_name = ["3.11.0", "3.11.1", "3.11.2", "3.11.3"]  # enums: getattr(cls, name)
    by_value = ["3.10.13", "3.11.7", "3.12.1", "3.13.0"]  # cls(value)
    written = {
        file.stem.removeprefix("metadata-"): file.read_bytes() for file in PYTHONS
    }
    assert sorted(written) == sorted(by_name + by_value)
    assert len({written[version] for version in by_name}) == 1
    assert b"getattr" in written["3.11.0"]
    for version in by_value:
        assert b"getattr" not in written[version]


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("torch.distributed.checkpoint.metadata\nMetadata", "__init__"),
        ("torch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING", "__class__"),
        ("torch\nfloat32", "itemsize"),
    ],
)
def test_nothing_is_taken_but_the_members_of_that_enum(
    folder: Path, owner: str, name: str
) -> None:
    call = (
        b"cbuiltins\ngetattr\n"
        + b"c"
        + owner.encode()
        + b"\n"
        + text(name)
        + pickle.TUPLE2
        + pickle.REDUCE
    )
    (folder / METADATA).write_bytes(program(call))
    refused(folder, "takes an attribute of something that is no memory format")


def test_nested_tuples_as_a_key(folder: Path) -> None:
    pickled = program(pickle.EMPTY_DICT, doubled(60), pickle.NONE, pickle.SETITEM)
    assert len(pickled) < 495
    (folder / METADATA).write_bytes(pickled)
    refused(folder, "refers to one tuple from several places")


def test_nested_lists_that_a_message_would_show(folder: Path) -> None:
    lists = b"".join(
        pickle.EMPTY_LIST
        + pickle.MEMOIZE
        + pickle.MARK
        + get(level) * 2
        + pickle.APPENDS
        for level in range(60)
    )
    (folder / METADATA).write_bytes(program(pickle.EMPTY_LIST + pickle.MEMOIZE, lists))
    refused(folder, "refers to one list from several places")


def test_a_path_that_doubles(folder: Path) -> None:
    path = b"cpathlib\nPosixPath\n" + pickle.MEMOIZE + text("abcdefgh") + pickle.MEMOIZE
    for level in range(1, 30):
        path += get(0) + get(level) * 2 + pickle.TUPLE2 + pickle.REDUCE + pickle.MEMOIZE
    assert len(path) < 437
    (folder / METADATA).write_bytes(program(path))
    refused(folder, "longer than 4096 characters")


def test_a_shape_of_many_dimensions(folder: Path) -> None:
    pickled = pickle.dumps(torch.Size([1] * 100_000), protocol=4)
    (folder / METADATA).write_bytes(pickled)
    refused(folder, "no tuple of up to 8 numbers")


def test_instructions_that_are_never_written(folder: Path) -> None:
    (folder / METADATA).write_bytes(program(pickle.EMPTY_SET))
    refused(folder, "has the instruction")


def test_a_file_without_end(folder: Path) -> None:
    with (folder / METADATA).open("r+b") as stream:
        stream.truncate(MOST_METADATA + 1)  # a sparse file
    refused(folder, "is larger than")


def test_many_chunks_are_looked_at_in_linear_time(tmp_path: Path) -> None:
    """By columns: each would be compared with each."""
    n = 30_000
    chunks = [
        ChunkStorageMetadata(torch.Size([0, i]), torch.Size([4, 1])) for i in range(n)
    ]
    entry = TensorStorageMetadata(
        TensorProperties(torch.float32), torch.Size([4, n]), chunks
    )
    info = _StorageInfo("__0_0.distcp", 0, 1000)
    storage = {MetadataIndex("a.weight", chunk.offsets): info for chunk in chunks}
    metadata = Metadata({"a.weight": entry}, storage_data=storage)
    started = time.perf_counter()
    assert len(places(metadata, "a.weight")) == n
    assert time.perf_counter() - started < SECONDS


# The tensors and byte items themselves.


def archive(
    folder: Path, fqn: str
) -> tuple[dict[str, bytes], MetadataIndex, _StorageInfo]:
    """The parts of what torch.save wrote of an entry."""
    metadata = read_metadata(folder)
    index = next(index for index in metadata.storage_data if index.fqn == fqn)
    info = metadata.storage_data[index]
    data = (folder / info.relative_path).read_bytes()[
        info.offset : info.offset + info.length
    ]
    with zipfile.ZipFile(io.BytesIO(data)) as parts:
        return {name: parts.read(name) for name in parts.namelist()}, index, info


def replace(
    folder: Path,
    fqn: str,
    changes: dict[str, bytes],
    compression: int = zipfile.ZIP_STORED,
) -> int:
    """Puts an entry with changed parts in a file of its own; returns its bytes."""
    parts, index, _ = archive(folder, fqn)
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", compression) as new:
        for name, content in {**parts, **changes}.items():
            new.writestr(name, content)
    (folder / "changed.distcp").write_bytes(written.getvalue())
    metadata = pickle.loads((folder / METADATA).read_bytes())
    metadata.storage_data[index] = _StorageInfo(
        "changed.distcp", 0, len(written.getvalue())
    )
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    return len(written.getvalue())


def refuses(folder: Path, match: str) -> None:
    """The readers of single tensors and items, and DCP's over all of them, as a run loads its checkpoints."""
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=match):
        read_all(folder)
    state = {"a.weight": torch.zeros(4, 3), "train_state": {"step": None}}
    with pytest.raises(CheckpointException, match=match):
        dcp.load(
            state,
            storage_reader=SafeReader(folder),
            planner=SafePlanner(),
            no_dist=True,
        )
    assert time.perf_counter() - started < SECONDS


def read_all(folder: Path) -> None:
    metadata = read_metadata(folder)
    read_tensor(folder, metadata, "a.weight")
    read_item(folder, metadata, "train_state.step")


def test_entries_in_a_file_of_their_own_are_read(folder: Path) -> None:
    replace(folder, "a.weight", {})
    assert torch.equal(read_tensor(folder, read_metadata(folder), "a.weight"), WEIGHT)


def test_a_tensor_that_is_stored_compressed(folder: Path) -> None:
    size = replace(
        folder, "a.weight", {"archive/data/0": bytes(1 << 24)}, zipfile.ZIP_DEFLATED
    )
    assert size < 1 << 16
    refuses(folder, "its parts are compressed")


def test_a_tensor_of_more_than_its_storage(folder: Path) -> None:
    """torch would allocate it."""
    parts, _, _ = archive(folder, "a.weight")
    rows, many = (
        pickle.BININT1 + b"\x04",
        pickle.BININT + (1 << 30).to_bytes(4, "little"),
    )
    columns = pickle.BININT1 + b"\x03"
    shape = rows + columns + pickle.TUPLE2
    changed = parts["archive/data.pkl"].replace(shape, many + columns + pickle.TUPLE2)
    assert changed != parts["archive/data.pkl"]
    replace(folder, "a.weight", {"archive/data.pkl": changed})
    refuses(folder, "reaches beyond its storage")


def test_a_storage_that_claims_more_than_there_is(folder: Path) -> None:
    parts, _, _ = archive(folder, "a.weight")
    elements = pickle.BININT1 + bytes([12])
    changed = parts["archive/data.pkl"].replace(
        elements, pickle.BININT + (1 << 30).to_bytes(4, "little")
    )
    assert changed != parts["archive/data.pkl"]
    replace(folder, "a.weight", {"archive/data.pkl": changed})
    refuses(folder, "is not in the file whole")


@pytest.mark.parametrize("fqn", ["a.weight", "train_state.step"])
def test_nested_tuples_in_a_saved_dictionary(folder: Path, fqn: str) -> None:
    bomb = (
        b"\x80\x02"
        + pickle.EMPTY_DICT
        + nested_put(60)
        + pickle.NONE
        + pickle.SETITEM
        + pickle.STOP
    )
    replace(folder, fqn, {"archive/data.pkl": bomb})
    refuses(folder, "refers to one tuple from several places")


def nested_put(times: int) -> bytes:
    """As ``doubled``, in the instructions that torch knows."""
    levels = (
        pickle.BINPUT + bytes([level]) + get(level) + pickle.TUPLE2
        for level in range(times)
    )
    return pickle.EMPTY_TUPLE + b"".join(levels)


def test_bytes_that_are_made_again_and_again(folder: Path) -> None:
    long = pickle.BINUNICODE + (1 << 16).to_bytes(4, "little") + b"a" * (1 << 16)
    again = (
        b"c_codecs\nencode\n"
        + get(0)
        + text_in_protocol_2("latin1")
        + pickle.TUPLE2
        + pickle.REDUCE
    )
    bomb = (
        b"\x80\x02" + pickle.EMPTY_LIST + pickle.MARK + long + pickle.BINPUT + b"\x00"
    )
    bomb += again * 1000 + pickle.APPENDS + pickle.STOP
    replace(folder, "train_state.step", {"archive/data.pkl": bomb})
    refuses(folder, "makes more bytes than it holds")


def text_in_protocol_2(value: str) -> bytes:
    return pickle.BINUNICODE + len(value).to_bytes(4, "little") + value.encode()


@pytest.mark.parametrize(
    "value",
    [
        3, 0.5, None, True, "text", b"\x80\x04N.", [1, [2.5, "x"]], {"a": {"b": (0.9, 0.95)}}, 2**70,
        OrderedDict(a=1), torch.tensor(3), torch.ones(2, dtype=torch.bfloat16), torch.zeros(0, 3),
        {"betas": (0.9, 0.95), "size": torch.Size([2]), "dtype": torch.float32}, torch.arange(6).reshape(2, 3).T,
    ],
    ids=repr,
)  # fmt: skip
def test_plain_data_is_read_as_it_was(value: Any, tmp_path: Path) -> None:
    dcp.save(
        {"train_state": {"item": value}}, checkpoint_id=tmp_path / "c", no_dist=True
    )
    metadata = read_metadata(tmp_path / "c")
    if isinstance(value, torch.Tensor):
        read: Any = read_tensor(tmp_path / "c", metadata, "train_state.item")
        assert torch.equal(read, value)
        return
    for name in metadata.state_dict_metadata:
        read_item(tmp_path / "c", metadata, name)
    loaded: dict[str, Any] = {
        "train_state": {"item": value if isinstance(value, dict) else None}
    }
    dcp.load(
        loaded,
        storage_reader=SafeReader(tmp_path / "c"),
        planner=SafePlanner(),
        no_dist=True,
    )
    assert loaded["train_state"]["item"] == value
