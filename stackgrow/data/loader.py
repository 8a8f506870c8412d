"""Batches in an order that ranks, workers, batch split and restarts cannot change.

Sequences carry one global number, their position. Position p belongs to epoch p // n, n being the number of
windows of the store, and is window ``permute(p % n, n, key of the epoch)``. A loader's state is one integer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.stateful import Stateful
from torchdata.stateful_dataloader import StatefulDataLoader

from stackgrow.data.store import StoreError, TokenStore

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]
IGNORE = -100  # the label that torch's cross entropy skips
ROUNDS = 8  # enough for an even choice among all permutations of a handful of windows, too


def epoch_key(manifest_hash: str, seed: int, epoch: int) -> bytes:
    return hashlib.sha256(f"{manifest_hash}:{seed}:{epoch}".encode()).digest()


def permute(index: np.ndarray, n: int, key: bytes) -> np.ndarray:
    """A keyed bijection of range(n), applied to each element of ``index`` (int64 [k] -> int64 [k]).

    A balanced Feistel network on the next even power of two; what falls outside range(n) is sent through it
    again until it falls inside (cycle walking). Memory does not grow with n.
    """
    x = np.array(index, dtype=np.int64, ndmin=1)
    if x.size and (x.min() < 0 or x.max() >= n):
        raise IndexError(f"indices {x.min()}..{x.max()} are outside range({n})")
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    keys = np.frombuffer(hashlib.shake_256(key).digest(8 * ROUNDS), dtype="<u8")
    x = _feistel(x.astype(np.uint64), half, keys)
    while (outside := x >= np.uint64(n)).any():
        x[outside] = _feistel(x[outside], half, keys)
    return x.astype(np.int64)


def _feistel(x: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    bits, mask = np.uint64(half), np.uint64(2**half - 1)
    left, right = x >> bits, x & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << bits) | right


def _mix(z: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class WindowDataset(torch.utils.data.Dataset):
    """position -> (inputs int64 [S], labels int64 [S]); labels are the inputs shifted by one.

    Raises:
        StoreError: the split is shorter than one window.
    """

    def __init__(self, store: TokenStore, seq_len: int, seed: int):
        self.store, self.seq_len, self.seed = store, seq_len, seed
        self.n_windows = store.windows(seq_len)
        if self.n_windows < 1:
            raise StoreError(
                f"{store.manifest.folder}: {store.split} has {store.n_tokens} tokens, "
                f"seq_len {seq_len} needs {seq_len + 1}; shorten seq_len or prepare more text"
            )

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """A whole batch, which is how torch's fetcher asks: one permutation per batch instead of per row."""
        return [_window(self.store, int(window), self.seq_len) for window in self.windows(positions)]

    def windows(self, positions: list[int]) -> np.ndarray:
        """The windows (int64 [k]) at these positions, which may lie in different epochs."""
        epochs, index = np.divmod(np.asarray(positions, dtype=np.int64), self.n_windows)
        windows = np.empty_like(index)
        for epoch in np.unique(epochs):
            key = epoch_key(self.store.manifest_hash, self.seed, int(epoch))
            windows[epochs == epoch] = permute(index[epochs == epoch], self.n_windows, key)
        return windows


def _window(store: TokenStore, window: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    start = window * seq_len
    tokens = torch.from_numpy(store.tokens(start, start + seq_len + 1).astype(np.int64))
    return tokens[:-1], tokens[1:]


class _Positions:
    """Batch sampler without end: ``rows`` positions from ``start``, then ``stride`` further on, and so on."""

    def __init__(self, start: int, rows: int, stride: int):
        self.start, self.rows, self.stride = start, rows, stride

    def __iter__(self) -> Iterator[list[int]]:
        start = self.start
        while True:
            yield list(range(start, start + self.rows))
            start += self.stride


class TokenLoader(Stateful):
    """Yields ({"input": int64 [b, S]}, labels int64 [b, S]) for one data-parallel rank, without end.

    With R ranks and micro batches of b sequences, micro batch a of rank r of a step that begins at position p
    takes positions p + a * R * b + r * b + [0..b). ``position`` counts the sequences yielded to the trainers
    of all ranks, whatever the workers have prefetched, and is all the state. Each ``iter()`` starts there.

    Raises:
        ValueError: a global batch that is not a multiple of R * b, or a rank outside the world.
        StoreError: the split is shorter than one window.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        seq_len: int,
        seed: int,
        global_batch: int,
        micro_batch: int,
        dp_rank: int,
        dp_world_size: int,
        start_position: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        self.dataset = WindowDataset(store, seq_len, seed)
        self.micro_batch, self.num_workers, self.pin_memory = micro_batch, num_workers, pin_memory
        self.dp_rank = _checked_rank(dp_rank, dp_world_size)
        self.stride = dp_world_size * micro_batch
        if micro_batch < 1 or global_batch < 1 or global_batch % self.stride:
            raise ValueError(
                f"global batch of {global_batch} sequences must be a multiple of "
                f"{dp_world_size} data-parallel ranks x micro batch {micro_batch}"
            )
        self.position = start_position

    def __iter__(self) -> Iterator[Batch]:
        first = self.position + self.dp_rank * self.micro_batch
        loader = StatefulDataLoader(
            self.dataset,
            batch_sampler=_Positions(first, self.micro_batch, self.stride),
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            # Without one of its own it draws from torch's global generator: a resume would change dropout.
            generator=torch.Generator(),
            # Its own snapshots are bound to the number of workers; ours is ``position``.
            snapshot_every_n_steps=2**62,
        )
        reached = self.position
        for inputs, labels in loader:
            if self.position != reached:
                raise RuntimeError("the position was set while this iterator was live; call iter() again")
            self.position = reached = reached + self.stride
            yield {"input": inputs}, labels

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.position = int(state_dict["position"])


def validation_batches(
    store: TokenStore, seq_len: int, sequences: int, micro_batch: int, dp_rank: int, dp_world_size: int
) -> Iterator[Batch]:
    """The first ``sequences`` windows of ``store``, in order, each exactly once over all ranks.

    Every rank yields equally many batches ({"input": int64 [b, S]}, labels int64 [b, S]); rows beyond the
    last of these windows are padding, with labels -100.

    Raises:
        StoreError: the store has fewer windows.
    """
    _checked_rank(dp_rank, dp_world_size)
    if not 1 <= sequences <= store.windows(seq_len):
        raise StoreError(
            f"{store.manifest.folder}: {store.split} has {store.windows(seq_len)} sequences of {seq_len}, "
            f"not {sequences}; ask for fewer or prepare with a larger --validation"
        )
    padding = torch.zeros(seq_len, dtype=torch.int64), torch.full((seq_len,), IGNORE)

    def batches() -> Iterator[Batch]:
        for start in range(dp_rank * micro_batch, sequences + dp_rank * micro_batch, dp_world_size * micro_batch):
            windows = range(start, start + micro_batch)
            rows = [_window(store, i, seq_len) if i < sequences else padding for i in windows]
            inputs, labels = zip(*rows, strict=True)
            yield {"input": torch.stack(inputs)}, torch.stack(labels)

    return batches()


def _checked_rank(dp_rank: int, dp_world_size: int) -> int:
    if not 0 <= dp_rank < dp_world_size:
        raise ValueError(f"data-parallel rank {dp_rank} is outside a world of {dp_world_size}")
    return dp_rank
