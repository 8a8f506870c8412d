import dataclasses
import io
import os
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)

from stackgrow.checkpoint.dcp import (
    METADATA,
    CheckpointError,
    SafePlanner,
    SafeReader,
    is_model_key,
    places,
    read_metadata,
    read_tensor,
    tensor_shapes,
)


def state() -> dict[str, Any]:
    """As torchtitan saves it: the model's tensors flat, all other states nested."""
    weight, half = torch.arange(12.0).reshape(4, 3), torch.ones(2, dtype=torch.bfloat16)
    optimizer = {
        "state.a.weight.exp_avg": weight / 2,
        "param_groups.a.weight.betas": (0.9, 0.95),
    }
    return {
        "a.weight": weight,
        "b.weight": half,
        "optimizer": optimizer,
        "lr_scheduler": {"last_epoch": 3},
        "dataloader": {"dp_rank_0": b"\x80\x04N.", "world_size": 1},
        "train_state": {"step": torch.tensor(3), "log_steps": [1, 2]},
    }


def blank() -> dict[str, Any]:
    empty = state()
    empty["a.weight"].fill_(-1)
    empty["optimizer"] = dict.fromkeys(empty["optimizer"])
    empty["optimizer"]["state.a.weight.exp_avg"] = torch.zeros(4, 3)
    empty["train_state"] = {"step": torch.tensor(0), "log_steps": None}
    empty["dataloader"] = {"dp_rank_0": None, "world_size": None}
    return empty


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dcp.save(state(), checkpoint_id=tmp_path / "step-3", no_dist=True)
    return tmp_path / "step-3"


def rewrite(folder: Path, metadata: Any) -> None:
    (folder / METADATA).write_bytes(pickle.dumps(metadata))


def safe_load(folder: Path, into: dict[str, Any]) -> None:
    dcp.load(
        into, storage_reader=SafeReader(folder), planner=SafePlanner(), no_dist=True
    )


class Payload:
    """Unpickling it creates the file ``marker``."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_a_training_checkpoint_is_read_whole(folder: Path) -> None:
    loaded = blank()
    safe_load(folder, loaded)
    want = state()
    assert torch.equal(loaded["a.weight"], want["a.weight"])
    assert torch.equal(
        loaded["optimizer"].pop("state.a.weight.exp_avg"), want["a.weight"] / 2
    )
    assert loaded["optimizer"] == {"param_groups.a.weight.betas": (0.9, 0.95)}
    assert loaded["train_state"] == want["train_state"]
    assert loaded["dataloader"] == want["dataloader"]


def test_nested_states_stay_nested_without_flattening(tmp_path: Path) -> None:
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(
        {"note": [1, "two"]},
        checkpoint_id=tmp_path / "c",
        planner=planner,
        no_dist=True,
    )
    loaded: dict[str, Any] = {"note": None}
    reader, plan = SafeReader(tmp_path / "c"), SafePlanner(flatten_state_dict=False)
    dcp.load(loaded, storage_reader=reader, planner=plan, no_dist=True)
    assert plan.state_dict["note"] == [1, "two"]


def test_model_keys_and_shapes(folder: Path) -> None:
    shapes = tensor_shapes(read_metadata(folder))
    assert {fqn: shape for fqn, shape in shapes.items() if is_model_key(fqn)} == {
        "a.weight": ((4, 3), torch.float32),
        "b.weight": ((2,), torch.bfloat16),
    }
    assert shapes["train_state.step"] == ((), torch.int64)
    assert {
        fqn for fqn in read_metadata(folder).state_dict_metadata if is_model_key(fqn)
    } == {
        "a.weight",
        "b.weight",
    }


def test_a_payload_in_the_metadata_does_not_run(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    metadata = read_metadata(folder)
    metadata.planner_data = {"a.weight": Payload(marker)}
    rewrite(folder, metadata)
    pickle.loads((folder / METADATA).read_bytes())
    assert marker.exists(), "the payload is live"
    marker.unlink()
    with pytest.raises(CheckpointError, match=r"refers to posix\.system"):
        read_metadata(folder)
    with pytest.raises(CheckpointException):
        safe_load(folder, blank())
    assert not marker.exists()


def test_a_payload_in_a_byte_item_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    buffer = io.BytesIO()
    torch.save(Payload(marker), buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=False)
    assert marker.exists(), "the payload is live"
    marker.unlink()
    dcp.save(
        {"train_state": {"step": Payload(marker)}},
        checkpoint_id=tmp_path / "c",
        no_dist=True,
    )
    with pytest.raises(
        CheckpointException,
        match=r"train_state\.step is not loaded, it holds more than plain data",
    ):
        safe_load(tmp_path / "c", {"train_state": {"step": None}})
    assert not marker.exists()


def test_a_payload_in_metadata_per_rank_does_not_run(
    folder: Path, tmp_path: Path
) -> None:
    (folder / METADATA).unlink()
    (folder / "__0.metadata").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(CheckpointException):
        safe_load(folder, blank())
    assert not (tmp_path / "ran").exists()


def test_metadata_cannot_change_the_classes_it_names(folder: Path) -> None:
    # StorageMeta, then the state (None, {"evil": 1}): BUILD sets an attribute of the class.
    program = b"ctorch.distributed.checkpoint.metadata\nStorageMeta\nN}\x8c\x04evilK\x01s\x86b."
    (folder / METADATA).write_bytes(b"\x80\x04" + program)
    with pytest.raises(CheckpointError, match="no DCP record"):
        read_metadata(folder)
    assert not hasattr(StorageMeta, "evil")


@pytest.mark.parametrize(
    "name",
    ["../other.distcp", "/etc/passwd", "sub/../__0_0.distcp", "s\\x", "..", "", "a\0b"],
)
def test_data_outside_of_the_folder_is_refused(folder: Path, name: str) -> None:
    (folder / "sub").mkdir()
    (folder.parent / "other.distcp").write_bytes((folder / "__0_0.distcp").read_bytes())
    metadata = read_metadata(folder)
    for info in metadata.storage_data.values():
        info.relative_path = name
    rewrite(folder, metadata)
    with pytest.raises(CheckpointError, match="is not a plain file name"):
        read_metadata(folder)


def test_a_link_out_of_the_folder_is_refused(folder: Path) -> None:
    (folder / "__0_0.distcp").rename(folder.parent / "other.distcp")
    (folder / "__0_0.distcp").symlink_to(folder.parent / "other.distcp")
    with pytest.raises(CheckpointError, match="link out of the checkpoint"):
        read_metadata(folder)


def test_damage_is_told_before_anything_is_loaded(folder: Path) -> None:
    whole = (folder / METADATA).read_bytes()
    for damaged in (
        whole[:-1],
        whole[: len(whole) // 2],
        b"",
        b"junk",
        pickle.dumps({"not": "metadata"}),
    ):
        (folder / METADATA).write_bytes(damaged)
        with pytest.raises(CheckpointError, match="is not loaded"):
            read_metadata(folder)
    (folder / METADATA).write_bytes(whole)
    with (folder / "__0_0.distcp").open("r+b") as data:
        data.truncate(data.seek(0, os.SEEK_END) - 1)
    with pytest.raises(CheckpointError, match="missing or truncated"):
        read_metadata(folder)
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match="missing or truncated"):
        read_metadata(folder)
    (folder / METADATA).unlink()
    with pytest.raises(CheckpointError, match="not a complete DCP checkpoint"):
        read_metadata(folder)


def test_a_tensor_is_read_only_where_its_chunks_fill_it(folder: Path) -> None:
    metadata = read_metadata(folder)
    assert torch.equal(read_tensor(folder, metadata, "a.weight"), state()["a.weight"])
    index = MetadataIndex("a.weight", (0, 0))
    metadata.storage_data[index], place = (
        metadata.storage_data[MetadataIndex("b.weight", (0,))],
        index,
    )
    with pytest.raises(CheckpointError, match="holds another tensor"):
        read_tensor(folder, metadata, "a.weight")
    del metadata.storage_data[place]
    with pytest.raises(
        CheckpointError, match=r"a.weight: its 1 stored chunks do not fill \(4, 3\)"
    ):
        read_tensor(folder, metadata, "a.weight")


@pytest.mark.parametrize(
    ("boxes", "fill"),
    [
        ([((0, 0), (1, 3)), ((1, 0), (3, 3))], True),
        (
            [((0, 2), (4, 1)), ((0, 0), (2, 2)), ((2, 0), (2, 2))],
            True,
        ),  # tensor parallel, and FSDP in one half
        (
            [((0, 0), (2, 3)), ((1, 0), (2, 3))],
            False,
        ),  # 12 elements, one row of them twice and one never
        ([((0, 0), (4, 2)), ((2, 1), (4, 1))], False),
        ([((0, 0), (2, 3)), ((3, 0), (2, 3))], False),  # beyond the end
        ([((0, 0), (4, 2))], False),
    ],
)
def test_chunks_fill_a_tensor_once(
    folder: Path, boxes: list[tuple[tuple[int, int], tuple[int, int]]], fill: bool
) -> None:
    metadata = read_metadata(folder)
    entry = metadata.state_dict_metadata["a.weight"]
    assert isinstance(entry, TensorStorageMetadata)
    chunks = [
        ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        for offsets, sizes in boxes
    ]
    metadata.state_dict_metadata["a.weight"] = dataclasses.replace(entry, chunks=chunks)
    info = metadata.storage_data[MetadataIndex("a.weight", (0, 0))]
    metadata.storage_data |= {
        MetadataIndex("a.weight", chunk.offsets): info for chunk in chunks
    }
    with nullcontext() if fill else pytest.raises(CheckpointError, match="do not fill"):
        assert len(places(metadata, "a.weight")) == len(chunks)


def test_metadata_of_a_later_python_is_read(folder: Path) -> None:
    pickled = (folder / METADATA).read_bytes()
    metadata = pickle.loads(pickled)
    assert isinstance(metadata, Metadata)
    old, new = b"\x8c\x07pathlib", b"\x8c\x0epathlib._local"
    if old not in pickled:
        pytest.skip("this torch records the checkpoint's path as a string")
    assert pickled[2:3] == pickle.FRAME
    unframed = b"\x80\x04" + pickled[11:]  # a frame would carry the old length
    (folder / METADATA).write_bytes(unframed.replace(old, new))
    assert read_metadata(folder).storage_meta.checkpoint_id == str(
        metadata.storage_meta.checkpoint_id
    )
