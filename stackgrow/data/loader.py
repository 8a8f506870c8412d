"""Batches in an order that ranks, workers, batch split and restarts cannot change: a loader's state is one integer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.stateful import Stateful
from torchdata.stateful_dataloader import StatefulDataLoader

from stackgrow.data.order import Order, apportion
from stackgrow.data.store import StoreError, TokenStore
from stackgrow.process.signals import leave_group
from stackgrow.recipe.keys import Data

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]
Rows = tuple[torch.Tensor, torch.Tensor]  # inputs and labels, int64 [b, S] both
IGNORE = -100  # the label that torch's cross entropy skips


class WindowDataset(torch.utils.data.Dataset):
    """The training windows of one store, or of several by their weights, in the order of data/order.py.

    Raises:
        StoreError: what ``Order`` raises.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        weights: Sequence[float],
        seq_len: int,
        seed: int,
    ):
        self.stores = tuple(stores)
        self.seq_len = seq_len
        # A process may open so many files, whatever the number of stores.
        for store in stores:
            store.open_files = max(1, store.open_files // len(stores))
        self.order = Order([store.manifest for store in stores], weights, seq_len, seed)

    @classmethod
    def open(cls, data: Data, seed: int) -> WindowDataset:
        """The data of a recipe. Raises StoreError for a store that is absent or damaged."""
        stores = [TokenStore.open(path) for path, _ in data.stores]
        weights = [weight for _, weight in data.stores]
        return cls(stores, weights, data.seq_len, seed)

    @property
    def bos_id(self) -> int:
        return self.stores[0].manifest.bos_id

    def __getitems__(self, positions: list[int]) -> Rows:
        """A whole batch, which is how torch's fetcher asks: inputs and labels, int64 [b, S] both."""
        rows = [
            (self.stores[store], window)
            for store, window in self.order.windows(positions)
        ]
        return _stacked(rows, self.seq_len)


def _stacked(rows: Sequence[tuple[TokenStore, int]], seq_len: int) -> Rows:
    """Inputs and labels of these windows, int64 [b, S]; labels are the inputs shifted by one."""
    inputs = np.empty((len(rows), seq_len), np.int64)
    labels = np.empty((len(rows), seq_len), np.int64)
    for i, (store, window) in enumerate(rows):
        start = window * seq_len
        tokens = store.tokens(start, start + seq_len + 1)
        inputs[i] = tokens[:-1]
        labels[i] = tokens[1:]
    return torch.from_numpy(inputs), torch.from_numpy(labels)


class _Positions:
    """Batch sampler without end: ``rows`` positions from ``start``, then ``stride`` further on, and so on."""

    def __init__(self, start: int, rows: int, stride: int):
        self.start = start
        self.rows = rows
        self.stride = stride

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
    """

    def __init__(
        self,
        dataset: WindowDataset,
        *,
        global_batch: int,
        micro_batch: int,
        dp_rank: int,
        dp_world_size: int,
        start_position: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        self.dataset = dataset
        self.micro_batch = micro_batch
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.dp_rank = _checked_rank(dp_rank, dp_world_size)
        self.stride = dp_world_size * micro_batch
        if micro_batch < 1 or global_batch < 1 or global_batch % self.stride:
            raise ValueError(
                f"global batch of {global_batch} sequences must be a multiple of "
                f"{dp_world_size} data-parallel ranks x micro batch {micro_batch}"
            )
        self.position = start_position

    def _batches(self) -> Iterable[Rows]:
        first = self.position + self.dp_rank * self.micro_batch
        positions = _Positions(first, self.micro_batch, self.stride)
        if self.num_workers == 0 and not self.pin_memory:
            # A DataLoader would take as long as reading does.
            return map(self.dataset.__getitems__, positions)
        return StatefulDataLoader(
            self.dataset,
            batch_sampler=positions,
            collate_fn=_as_fetched,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            worker_init_fn=leave_group,
            # Without one of its own it draws from torch's global generator: a resume would change dropout.
            generator=torch.Generator(),
            # Its own snapshots are bound to the number of workers; ours is ``position``.
            snapshot_every_n_steps=2**62,
        )

    def __iter__(self) -> Iterator[Batch]:
        reached = self.position
        for inputs, labels in _told_in_one_line(self._batches()):
            if self.position != reached:
                raise RuntimeError(
                    "the position was set while this iterator was live; call iter() again"
                )
            reached += self.stride
            self.position = reached
            yield {"input": inputs}, labels

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.position = int(state_dict["position"])


def _told_in_one_line(batches: Iterable[Rows]) -> Iterator[Rows]:
    """The batches. A worker's StoreError comes with a traceback in its message, of which the last line is the error."""
    try:
        yield from batches
    except StoreError as error:
        *traceback, message = str(error).splitlines()
        if not traceback:
            raise
        raise StoreError(message.partition("StoreError: ")[2]) from error


def _as_fetched(batch: Rows) -> Rows:
    return batch


def open_validation(
    data: Data, sequences: int, take: str = "first"
) -> list[tuple[TokenStore, int]]:
    """Held-out windows of a recipe's stores, ``sequences`` in all and from each by its weight; fewer where a store
    holds out fewer. ``take``: its "first" ones, or "spread" evenly over it: documents lie in the order of their files,
    so that the first windows can be those of one folder alone. Raises StoreError."""
    paths = [path for path, _ in data.stores]
    counts = apportion([weight for _, weight in data.stores], sequences)
    rows: list[tuple[TokenStore, int]] = []
    for path, count in zip(paths, counts, strict=True):
        if count == 0:
            continue
        store = TokenStore.open(path, split="validation")
        windows = store.windows(data.seq_len)
        taken = min(count, windows)
        for i in range(taken):
            window = i * windows // taken if take == "spread" else i
            rows.append((store, window))
    if not rows:
        raise StoreError(
            f"{paths[0]}: validation has no sequence of {data.seq_len}; prepare a larger --validation"
        )
    return rows


def validation_batches(
    rows: Sequence[tuple[TokenStore, int]],
    seq_len: int,
    micro_batch: int,
    dp_rank: int,
    dp_world_size: int,
) -> Iterator[Batch]:
    """These windows, in order, each exactly once over all ranks.

    Every rank yields equally many batches ({"input": int64 [b, S]}, labels int64 [b, S]); rows beyond the
    last of these windows are padding, with labels -100.
    """
    _checked_rank(dp_rank, dp_world_size)
    first = dp_rank * micro_batch
    stride = dp_world_size * micro_batch
    for start in range(first, len(rows) + first, stride):
        inputs = torch.zeros((micro_batch, seq_len), dtype=torch.int64)
        labels = torch.full((micro_batch, seq_len), IGNORE)
        present = rows[start : start + micro_batch]
        if present:
            inputs[: len(present)], labels[: len(present)] = _stacked(present, seq_len)
        yield {"input": inputs}, labels


def _checked_rank(dp_rank: int, dp_world_size: int) -> int:
    if not 0 <= dp_rank < dp_world_size:
        raise ValueError(
            f"data-parallel rank {dp_rank} is outside a world of {dp_world_size}"
        )
    return dp_rank
