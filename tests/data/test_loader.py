"""Token order is a pure function of (data manifest, seed, position): design invariant 1."""

import collections
import hashlib
import itertools
import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.stateful import Stateful

from stackgrow.data.loader import TokenLoader, WindowDataset, epoch_key, permute, validation_batches
from stackgrow.data.store import StoreError, TokenStore

S = 8
WINDOWS = 61  # a prime, so that no batch divides an epoch
GLOBAL_BATCH = 12


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
            shards.append({"file": path.name, "tokens": len(part), "documents": 0, "sha256": sha256, "bytes": size})
        splits[split] = {"tokens": len(tokens), "documents": 0, "shards": shards}
    manifest = {"format": 1, "dtype": "uint16", "vocab_size": 1000, "bos_id": 1, "splits": splits}
    manifest["tokenizer"] = {"file": "tokenizer.model", "sha256": hashlib.sha256(b"").hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return TokenStore.open(write_store(tmp_path_factory.mktemp("loader") / "store"))


def loader(store: TokenStore, ranks: int = 1, rank: int = 0, micro: int = 2, **options: Any) -> TokenLoader:
    known = {"seq_len": S, "seed": 7, "global_batch": GLOBAL_BATCH}
    return TokenLoader(store, **{**known, **options}, micro_batch=micro, dp_rank=rank, dp_world_size=ranks)


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
    loaders = [loader(store, ranks, rank, micro, start_position=position, num_workers=workers) for rank in range(ranks)]
    iterators = [iter(each) for each in loaders]
    order: list[int] = []
    for _ in range(steps * GLOBAL_BATCH // (ranks * micro)):
        for iterator in iterators:
            order += windows_of(next(iterator))
        position += ranks * micro
        assert [each.state_dict() for each in loaders] == [{"position": position}] * ranks
    return order, position


def reference(store: TokenStore, count: int) -> list[int]:
    return WindowDataset(store, S, 7).windows(list(range(count))).tolist()


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
        assert sorted(order[epoch * WINDOWS : (epoch + 1) * WINDOWS]) == list(range(WINDOWS))


def test_restarts_with_changed_ranks_workers_and_batches_change_nothing(store: TokenStore) -> None:
    rng = random.Random(0)
    layouts = [
        (1, 12, 2),
        *((r, b, 0) for r in (1, 2, 3, 4) for b in (1, 3, 4, 6) if GLOBAL_BATCH % (r * b) == 0),
    ]
    order: list[int] = []
    position = 0
    for layout in [*layouts, *rng.sample(layouts[1:], 4)]:
        part, position = session(store, position, rng.randint(1, 3), *layout)
        order += part
    assert position > 3 * WINDOWS
    assert order == reference(store, position)


def test_epochs_seeds_and_data_have_orders_of_their_own(store: TokenStore, tmp_path: Path) -> None:
    first, second = reference(store, WINDOWS), reference(store, 2 * WINDOWS)[WINDOWS:]
    other_seed = WindowDataset(store, S, 8).windows(list(range(WINDOWS))).tolist()
    other_shards = TokenStore.open(write_store(tmp_path / "store", shard_tokens=99))
    orders = [first, second, other_seed, reference(other_shards, WINDOWS), list(range(WINDOWS))]
    for one, two in itertools.combinations(orders, 2):
        assert sum(a == b for a, b in zip(one, two, strict=True)) < 10
        assert sorted(one) == sorted(two)


def test_order_is_the_released_one() -> None:
    """A change would make stored positions mean other tokens. From a separate, scalar implementation."""
    windows = permute(np.arange(10), 1000, epoch_key("data", 3407, 0)).tolist()
    assert windows == [82, 427, 691, 501, 461, 687, 347, 457, 704, 708]


def test_position_counts_what_was_yielded_not_what_was_prefetched(store: TokenStore) -> None:
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


def test_workers_really_load(store: TokenStore) -> None:
    """Batches come from other processes, and those end with the iterator."""
    dataset = Recorder(store, S, 7)
    source = loader(store, num_workers=2)
    source.dataset = dataset
    iterator = iter(source)
    pids = {int(next(iterator)[1][0, 0]) for _ in range(4)}
    assert len(pids) == 2
    assert os.getpid() not in pids
    del iterator
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


class Recorder(WindowDataset):
    """Its labels are the id of the process that reads."""

    def __getitems__(self, positions: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(inputs, torch.full_like(labels, os.getpid())) for inputs, labels in super().__getitems__(positions)]


def test_dataset_pickles_and_indexes_singly(store: TokenStore) -> None:
    dataset = WindowDataset(store, S, 7)
    inputs, labels = pickle.loads(pickle.dumps(dataset))[70]
    assert inputs[0] == reference(store, 71)[70] * S
    assert torch.equal(labels, inputs + 1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ranks": 5}, ValueError, "must be a multiple of 5 data-parallel ranks x micro batch 2"),
        ({"micro": 0}, ValueError, "must be a multiple"),
        ({"global_batch": 0}, ValueError, "must be a multiple"),
        ({"ranks": 2, "rank": 2}, ValueError, "rank 2 is outside a world of 2"),
        ({"seq_len": 1000}, StoreError, "needs 1001"),
    ],
)
def test_bad_arguments(store: TokenStore, options: dict[str, int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        loader(store, **options)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 16, 17, 61, 100, 255, 256, 257, 1000, 4096, 5000, 70_001])
def test_permute_is_a_bijection(n: int) -> None:
    for epoch in range(3):
        assert np.array_equal(np.sort(permute(np.arange(n), n, epoch_key("m", 1, epoch))), np.arange(n))


def test_permute_is_elementwise_and_takes_huge_ranges() -> None:
    key, n = epoch_key("m", 1, 0), 3 * 10**12
    index = np.array([0, 5, n - 1, 5])
    together = permute(index, n, key)
    assert together.tolist() == [int(permute(np.array([i]), n, key)[0]) for i in index]
    assert together.min() >= 0
    assert together.max() < n
    assert together[1] == together[3]
    assert permute(np.array([], dtype=np.int64), n, key).size == 0
    for bad in (-1, n):
        with pytest.raises(IndexError):
            permute(np.array([bad]), n, key)


@pytest.mark.parametrize("n", [3, 4, 5])
def test_permute_draws_all_permutations_of_a_few_equally(n: int) -> None:
    """Chi-square over the n! permutations: its mean is its degrees of freedom k, its deviation sqrt(2 k)."""
    draws = 40 * int(np.prod(range(1, n + 1)))
    counts = collections.Counter(tuple(permute(np.arange(n), n, epoch_key("m", s, 0))) for s in range(draws))
    cells = draws // 40
    chi_square = (sum((c - 40) ** 2 for c in counts.values()) + 40**2 * (cells - len(counts))) / 40
    assert chi_square < cells - 1 + 5 * (2 * (cells - 1)) ** 0.5


def test_permute_spreads_evenly() -> None:
    """Where the first tenth of 1,000 indices goes, over 300 keys; and neighbours do not stay neighbours."""
    images = np.stack([permute(np.arange(1000), 1000, epoch_key("m", 1, e)) for e in range(300)])
    bins = np.bincount(images[:, :100].ravel() // 100, minlength=10)
    assert np.abs(bins - 3000).max() < 5 * 3000**0.5
    steps = np.abs(np.diff(images, axis=1))
    assert abs(steps.mean() - 1000 / 3) < 5
    assert (steps == 1).mean() < 0.004, "two of 1,000 is chance"


@pytest.mark.parametrize(("sequences", "ranks", "micro"), [(1, 1, 1), (10, 1, 4), (10, 2, 3), (61, 4, 4), (3, 4, 2)])
def test_validation_batches(store: TokenStore, sequences: int, ranks: int, micro: int) -> None:
    held_out = TokenStore.open(store.manifest.folder, "validation")
    per_rank = [list(validation_batches(held_out, S, sequences, micro, r, ranks)) for r in range(ranks)]
    assert len({len(batches) for batches in per_rank}) == 1
    seen = []
    for inputs, labels in itertools.chain(*per_rank):
        assert inputs["input"].shape == labels.shape == (micro, S)
        real = (labels != -100).all(dim=1)
        assert torch.equal(real, (labels != -100).any(dim=1))
        seen += windows_of(({"input": inputs["input"][real]}, labels[real]))
    assert sorted(seen) == list(range(sequences))


def test_validation_asks_for_too_much(store: TokenStore) -> None:
    with pytest.raises(StoreError, match="has 61 sequences of 8, not 62"):
        validation_batches(store, S, 62, 1, 0, 1)
