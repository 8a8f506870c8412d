"""Mutated ``.metadata``: read, or refused with a CheckpointError. No other error, no hang, no code run, nothing written.

STACKGROW_FUZZ=2000 python -m pytest tests/growth/test_dcp_fuzz.py     (default 400; make torture runs 2000)
"""

import dataclasses
import os
import pickle
import random
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from stackgrow.checkpoint.convert import grow_checkpoint
from stackgrow.checkpoint.dcp import (
    METADATA,
    CheckpointError,
    is_model_key,
    places,
    read_metadata,
    read_tensor,
)
from stackgrow.growth.rules import Alias, Rules

CASES = int(os.environ.get("STACKGROW_FUZZ", "400"))
SEED = 20261125
SECONDS = 10  # for one case
MEMORY = 24 << 30  # of address space, of which torch alone takes some

NASTY: list[Any] = [
    None, -1, 0, 1, 2**31, 2**63 - 1, 2**70, -(2**63), 1.5, float("nan"), True, "", "..", "../x", "/etc/passwd", "a\0b",
    ".metadata", b"", b"\xff", [], {}, (), (1,), torch.Size([2**40]), torch.Size([0]), torch.Size([-1]),
    torch.float64, torch.Size([3, 4]), MetadataIndex("b.weight", (0,)),
]  # fmt: skip


class Payload:
    """Unpickling it creates the file ``marker``."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    state = {
        "a.weight": torch.arange(12.0).reshape(4, 3),
        "b.weight": torch.ones(2),
        "optimizer": {
            "state.a.weight.exp_avg": torch.zeros(4, 3),
            "param_groups.a.weight.lr": 0.1,
        },
        "train_state": {"step": torch.tensor(3)},
    }
    dcp.save(state, checkpoint_id=tmp_path / "step-3", no_dist=True)
    return tmp_path / "step-3"


@pytest.fixture
def limits() -> Iterator[None]:
    def hang(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    before, memory = (
        signal.signal(signal.SIGALRM, hang),
        resource.getrlimit(resource.RLIMIT_AS),
    )
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, memory[1]))
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    resource.setrlimit(resource.RLIMIT_AS, memory)


def bytes_changed(rng: random.Random, content: bytes, marker: Path) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at, n = rng.randrange(len(data)), rng.choice([1, 1, 2, 4, 16, 200])
        change = rng.randrange(6)
        if change == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif change == 1:
            data[at : at + n] = rng.randbytes(n)
        elif change == 2:
            del data[at : at + n]
            data += b"." * (not data)
        elif change == 3:
            data[at:at] = data[(other := rng.randrange(len(data))) : other + n]
        elif change == 4:
            data[at:] = data[at : at + n]
        else:
            data[at:at] = pickle.dumps(Payload(marker))[2:-1] + rng.choice(
                [b"", b"0", b"."]
            )
    return bytes(data)


def values_changed(rng: random.Random, content: bytes, marker: Path) -> bytes:
    """One field, key or element somewhere in the metadata replaced."""
    metadata = pickle.loads(content)
    value = rng.choice([*NASTY, Payload(marker)])
    spots: list[Callable[[], None]] = []

    def put(spot: Any, name: Any) -> Callable[[], None]:
        if isinstance(spot, dict | list):
            return lambda: spot.__setitem__(name, value)
        return lambda: object.__setattr__(spot, name, value)

    def walk(spot: Any, depth: int = 0) -> None:
        if dataclasses.is_dataclass(spot):
            children = [
                (f.name, getattr(spot, f.name, None)) for f in dataclasses.fields(spot)
            ]
        elif isinstance(spot, dict):
            children = list(spot.items())
            spots.extend(
                (lambda d=spot, k=k: d.__setitem__(value, d.pop(k, None)))
                for k in spot
                if _hashable(value)
            )
        elif isinstance(spot, list):
            children = list(enumerate(spot))
        else:
            return
        for name, child in children:
            spots.append(put(spot, name))
            walk(child, depth + 1)

    walk(metadata)
    for _ in range(rng.choice([1, 1, 3])):
        rng.choice(spots)()
    try:
        return pickle.dumps(metadata, protocol=rng.choice([2, 4, 5]))
    except Exception:  # a value that not even pickle takes here
        return values_changed(rng, content, marker)


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def use(folder: Path, target: Path) -> None:
    """All that this project does with a stranger's checkpoint: shapes, places, tensors, growth."""
    metadata = read_metadata(folder)
    names = [name for name in metadata.state_dict_metadata if is_model_key(name)]
    for name in names:
        places(metadata, name)
        read_tensor(folder, metadata, name)
    shapes: dict[str, tuple[int, ...]] = {"a.weight": (4, 3), "b.weight": (2,)}
    targets = {
        "a.weight": Alias("a.weight"),
        "c.weight": Alias("a.weight"),
        "b.weight": Alias("b.weight"),
    }
    grow_checkpoint(
        folder, target, Rules(targets, shapes, {**shapes, "c.weight": (4, 3)})
    )


def test_mutated_metadata_is_refused_or_read_and_never_executed(
    folder: Path, tmp_path: Path, limits: None
) -> None:
    content, marker, refused = (folder / METADATA).read_bytes(), tmp_path / "ran", 0
    before = {p: p.read_bytes() for p in folder.iterdir() if p.name != METADATA}
    for case in range(CASES):
        rng = random.Random(SEED + case)
        mutate = values_changed if case % 2 else bytes_changed
        (folder / METADATA).write_bytes(mutate(rng, content, marker))
        target = tmp_path / "grown" / str(case)
        signal.alarm(SECONDS)
        try:
            use(folder, target)
        except CheckpointError:
            refused += 1
        except BaseException as error:
            pytest.fail(f"case {case}: {type(error).__name__}: {error}", pytrace=True)
        signal.alarm(0)
        assert not marker.exists(), f"case {case}: the payload ran"
    assert {p: p.read_bytes() for p in folder.iterdir() if p.name != METADATA} == before
    assert {p.name for p in tmp_path.iterdir()} <= {"step-3", "grown"}, (
        "nothing is written elsewhere"
    )
    assert CASES / 2 < refused < CASES, "most mutations hurt, and some do not"


def test_the_mutations_reach_the_payload(folder: Path, tmp_path: Path) -> None:
    """The plain unpickler runs it."""
    marker = tmp_path / "ran"
    for case in range(1, 400, 2):
        data = values_changed(
            random.Random(SEED + case), (folder / METADATA).read_bytes(), marker
        )
        try:
            assert isinstance(pickle.loads(data), Metadata)
        except Exception:
            continue
        if marker.exists():
            return
    pytest.fail("no case had a payload that runs")


def test_a_chunk_that_claims_more_than_is_stored(folder: Path) -> None:
    """It would be allocated before it is read."""
    metadata = read_metadata(folder)
    entry = metadata.state_dict_metadata["a.weight"]
    assert isinstance(entry, TensorStorageMetadata)
    huge = torch.Size([2**33, 3])
    metadata.state_dict_metadata["a.weight"] = dataclasses.replace(
        entry, size=huge, chunks=[ChunkStorageMetadata(torch.Size([0, 0]), huge)]
    )
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"a\.weight: "):
        places(read_metadata(folder), "a.weight")
