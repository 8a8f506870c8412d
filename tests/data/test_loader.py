"""Token order is a pure function of (data manifest, seed, position): design invariant 1."""

import hashlib
import itertools
import json
import os
import pickle
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch.distributed.checkpoint.stateful import Stateful

from stackgrow.data.loader import (
    TokenLoader,
    WindowDataset,
    open_validation,
    validation_batches,
)
from stackgrow.data.store import StoreError, TokenStore
from stackgrow.recipe.keys import Data

S = 8
WINDOWS = 61  # a prime, so that no batch divides an epoch
GLOBAL_BATCH = 12
BIG_BATCH = 48


def write_store(folder: Path, shard_tokens: int = 100) -> Path:
    """A store whose token i is i: a sequence's first token tells its window."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(b"")
    tokens = np.arange(WINDOWS * S + 5, dtype=np.uint16)
    splits = {}
    for split in ("train", "validation"):
        shards = []
        for i, start in enumerate(range(0, len(tokens), shard_tokens)):
            path = folder / f"{split}-{i:05d}.npy"
            part = tokens[start : start + shard_tokens]
            np.save(path, part)
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            size = path.stat().st_size
            shards.append(
                {
                    "file": path.name,
                    "tokens": len(part),
                    "documents": 0,
                    "sha256": sha256,
                    "bytes": size,
                }
            )
        splits[split] = {"tokens": len(tokens), "documents": 0, "shards": shards}
    manifest = {
        "format": 1,
        "dtype": "uint16",
        "vocab_size": 1000,
        "bos_id": 1,
        "splits": splits,
    }
    manifest["tokenizer"] = {
        "file": "tokenizer.model",
        "sha256": hashlib.sha256(b"").hexdigest(),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return TokenStore.open(write_store(tmp_path_factory.mktemp("loader") / "store"))


def dataset(store: TokenStore, seq_len: int = S, seed: int = 7) -> WindowDataset:
    return WindowDataset([store], [1.0], seq_len, seed)


def loader(
    store: TokenStore, ranks: int = 1, rank: int = 0, micro: int = 2, **options: Any
) -> TokenLoader:
    known = {
        "global_batch": GLOBAL_BATCH,
        "micro_batch": micro,
        "dp_rank": rank,
        "dp_world_size": ranks,
    }
    return TokenLoader(dataset(store), **{**known, **options})


def windows_of(batch: tuple[dict[str, torch.Tensor], torch.Tensor]) -> list[int]:
    """The windows of a batch's rows, after checking that every token of them is right."""
    inputs, labels = batch[0]["input"], batch[1]
    assert inputs.dtype == labels.dtype == torch.int64
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(S))
    assert torch.equal(labels, inputs + 1)
    assert not (inputs[:, 0] % S).any()
    return (inputs[:, 0] // S).tolist()


def session(
    store: TokenStore, position: int, steps: int, ranks: int, micro: int, workers: int
) -> tuple[list[int], int]:
    """Windows in the order in which ``ranks`` loaders give them, and the position reached."""
    loaders = [
        loader(store, ranks, rank, micro, start_position=position, num_workers=workers)
        for rank in range(ranks)
    ]
    iterators = [iter(each) for each in loaders]
    order: list[int] = []
    for _ in range(steps * GLOBAL_BATCH // (ranks * micro)):
        for iterator in iterators:
            order += windows_of(next(iterator))
        position += ranks * micro
        assert [each.state_dict() for each in loaders] == [
            {"position": position}
        ] * ranks
    return order, position


def reference(store: TokenStore, count: int, seed: int = 7) -> list[int]:
    return [
        window for _, window in dataset(store, seed=seed).order.windows(range(count))
    ]


@pytest.mark.parametrize(
    ("ranks", "micro", "workers"),
    [
        (1, 1, 0),
        (1, 12, 0),
        (2, 1, 0),
        (2, 3, 0),
        (3, 2, 0),
        (3, 4, 0),
        (4, 1, 0),
        (4, 3, 0),
        (1, 4, 1),
        (2, 3, 2),
    ],
)
def test_order_does_not_depend_on_ranks_workers_or_batch_split(
    store: TokenStore, ranks: int, micro: int, workers: int
) -> None:
    steps = 16  # three epochs
    order, position = session(store, 0, steps, ranks, micro, workers)
    assert order == reference(store, steps * GLOBAL_BATCH)
    assert position == steps * GLOBAL_BATCH
    for epoch in range(3):
        assert sorted(order[epoch * WINDOWS : (epoch + 1) * WINDOWS]) == list(
            range(WINDOWS)
        )


@pytest.mark.parametrize("mixed", [False, True])
def test_the_order_survives_everything(
    store: TokenStore, tmp_path: Path, mixed: bool
) -> None:
    """1 to 8 ranks, 0 to 2 workers, batch sizes, restarts at random positions, through epochs and a growth (whose
    stage has a batch of its own): one and the same sequence of windows, each of them once per epoch."""
    rng = random.Random(0)
    ranks_, batches = (1, 2, 3, 4, 8), (1, 3, 6)
    sessions = [(r, b, 0) for r in ranks_ for b in batches if BIG_BATCH % (r * b) == 0]
    sessions += [] if mixed else [(r, 2, w) for r in ranks_ for w in (1, 2)]
    rng.shuffle(sessions)
    weights = [0.7, 0.3] if mixed else [1.0]
    stores = [store, TokenStore.open(write_store(tmp_path / "other", shard_tokens=77))][
        : len(weights)
    ]
    data = WindowDataset(stores, weights, S, 7)
    found, position = [], 0
    for number, (ranks, micro, workers) in enumerate(sessions):
        batch = BIG_BATCH if number < 10 else 2 * BIG_BATCH  # grown
        options = {
            "global_batch": batch,
            "micro_batch": micro,
            "dp_world_size": ranks,
            "num_workers": workers,
        }
        loaders = [
            TokenLoader(data, dp_rank=r, start_position=position, **options)
            for r in range(ranks)
        ]
        iterators = [iter(each) for each in loaders]
        for _ in range(rng.randint(1, 2) * batch // (ranks * micro)):
            for iterator in iterators:
                found += windows_of(next(iterator))
        position = loaders[0].position
        assert {each.position for each in loaders} == {position}
    expected = data.order.windows(range(position))
    assert found == [window for _, window in expected]
    for which, count in enumerate(data.order.sequences(position)):
        given = [window for where, window in expected if where == which]
        assert len(given) == count > 2 * WINDOWS, "through epoch boundaries"
        assert sorted(given[: 2 * WINDOWS]) == sorted([*range(WINDOWS)] * 2)


def test_epochs_seeds_and_data_have_orders_of_their_own(
    store: TokenStore, tmp_path: Path
) -> None:
    first, second = reference(store, WINDOWS), reference(store, 2 * WINDOWS)[WINDOWS:]
    other_seed = reference(store, WINDOWS, seed=8)
    other_shards = TokenStore.open(write_store(tmp_path / "store", shard_tokens=99))
    orders = [
        first,
        second,
        other_seed,
        reference(other_shards, WINDOWS),
        list(range(WINDOWS)),
    ]
    for one, two in itertools.combinations(orders, 2):
        assert sum(a == b for a, b in zip(one, two, strict=True)) < 10
        assert sorted(one) == sorted(two)


def test_position_counts_what_was_yielded_not_what_was_prefetched(
    store: TokenStore,
) -> None:
    source = loader(store, num_workers=2)
    iterator = iter(source)
    order = [w for _ in range(3) for w in windows_of(next(iterator))]
    assert source.state_dict() == {"position": 6}
    again = iter(source)
    order += [w for _ in range(3) for w in windows_of(next(again))]
    assert order == reference(store, 12)


def test_state_goes_through_load_state_dict(store: TokenStore) -> None:
    source = loader(store, ranks=2, rank=1, micro=3)
    assert isinstance(source, Stateful)
    stale = iter(source)
    next(stale)
    next(stale)
    source.load_state_dict({"position": 60})
    assert windows_of(next(iter(source))) == reference(store, 66)[63:]
    assert source.state_dict() == {"position": 66}
    with pytest.raises(RuntimeError, match="call iter"):
        next(stale)


def test_iterating_draws_nothing_from_the_global_generator(store: TokenStore) -> None:
    before = torch.get_rng_state()
    for workers in (0, 1):
        next(iter(loader(store, num_workers=workers)))
    assert torch.equal(torch.get_rng_state(), before)


def test_open_files_do_not_grow_with_the_number_of_stores(
    store: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stackgrow.data.store.OPEN_SHARDS", 9)
    data = WindowDataset(
        [TokenStore.open(store.manifest.folder) for _ in range(3)],
        [1.0, 1.0, 1.0],
        S,
        7,
    )
    assert len(store.shards) > 4
    data.__getitems__(list(range(300)))
    assert [len(s._files) for s in data.stores] == [3, 3, 3]


def test_workers_really_load(store: TokenStore) -> None:
    """Batches come from other processes, and those end with the iterator."""
    source = loader(store, num_workers=2)
    source.dataset = Recorder([store], [1.0], S, 7)
    iterator = iter(source)
    pids = {int(next(iterator)[1][0, 0]) for _ in range(4)}
    assert len(pids) == 2
    assert os.getpid() not in pids
    del iterator
    deadline = time.monotonic() + 60
    while any(
        psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        for pid in pids
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_store_is_told_in_one_line_by_workers_too(
    tmp_path: Path, workers: int
) -> None:
    folder = write_store(tmp_path / "store")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (folder / "manifest.json").write_text(
        json.dumps({**manifest, "vocab_size": 10}), encoding="utf-8"
    )
    damaged = TokenStore.open(folder)
    with pytest.raises(StoreError) as caught:
        next(iter(loader(damaged, num_workers=workers)))
    assert "beyond the vocabulary of 10" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.exit_code == 65


class Recorder(WindowDataset):
    """Its labels are the id of the process that reads."""

    def __getitems__(self, positions: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, labels = super().__getitems__(positions)
        return inputs, torch.full_like(labels, os.getpid())


def test_a_pickled_dataset_reads_the_same(store: TokenStore) -> None:
    inputs, labels = pickle.loads(pickle.dumps(dataset(store))).__getitems__([70, 5])
    order = reference(store, 71)
    assert windows_of(({"input": inputs}, labels)) == [order[70], order[5]]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"ranks": 5},
            ValueError,
            "must be a multiple of 5 data-parallel ranks x micro batch 2",
        ),
        ({"micro": 0}, ValueError, "must be a multiple"),
        ({"global_batch": 0}, ValueError, "must be a multiple"),
        ({"ranks": 2, "rank": 2}, ValueError, "rank 2 is outside a world of 2"),
    ],
)
def test_a_loader_refuses_batches_and_ranks_that_do_not_fit(
    store: TokenStore, options: dict[str, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        loader(store, **options)


@pytest.mark.parametrize(
    ("sequences", "ranks", "micro"),
    [(1, 1, 1), (10, 1, 4), (10, 2, 3), (61, 4, 4), (3, 4, 2)],
)
def test_validation_reads_each_window_once_over_all_ranks(
    store: TokenStore, sequences: int, ranks: int, micro: int
) -> None:
    rows = open_validation(Data(path=str(store.manifest.folder), seq_len=S), sequences)
    per_rank = [
        list(validation_batches(rows, S, micro, r, ranks)) for r in range(ranks)
    ]
    assert len({len(batches) for batches in per_rank}) == 1
    seen = []
    for inputs, labels in itertools.chain(*per_rank):
        assert inputs["input"].shape == labels.shape == (micro, S)
        real = (labels != -100).all(dim=1)
        assert torch.equal(real, (labels != -100).any(dim=1))
        seen += windows_of(({"input": inputs["input"][real]}, labels[real]))
    assert sorted(seen) == list(range(sequences))


def test_validation_can_be_spread_over_the_held_out_text(store: TokenStore) -> None:
    rows = open_validation(
        Data(path=str(store.manifest.folder), seq_len=S), 10, take="spread"
    )
    assert [window for _, window in rows] == [i * WINDOWS // 10 for i in range(10)]
    assert rows[-1][1] > WINDOWS * 0.8


def test_validation_takes_what_is_there(store: TokenStore) -> None:
    path = str(store.manifest.folder)
    assert len(open_validation(Data(path=path, seq_len=S), 100)) == WINDOWS
    with pytest.raises(StoreError, match="no sequence of 500"):
        open_validation(Data(path=path, seq_len=500), 1)
