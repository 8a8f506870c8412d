"""Which window stands where: a pure function of (manifests, seed, position), in time and memory that do not grow.

Sequences carry one global number, their position. Of a single store, position p belongs to epoch p // n, n being the
number of windows, and is window ``permute(p % n, n, key of the epoch)``. In a mixture every block of BLOCK positions
holds each store's share exactly, dealt out anew for each block; the i-th sequence that a store gives is what position
i of that store alone would be. No torch.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from stackgrow.data.store import Manifest, StoreError, read_manifest
from stackgrow.recipe.keys import Data
from stackgrow.recipe.write import canonical_hash

BLOCK = 10_000  # weights of a mixture are kept to four decimals
CHUNK = 4096  # positions resolved at a time: numpy costs as much for one
# Rounds of the Feistel network. They draw all permutations of up to 4 windows equally often. Of 5, 6 and 7 windows some
# come more often than others: the frequencies spread by 10, 14 and 19% of their mean (standard deviation, measured over
# 24,000 to 100,800 keys). More rounds would change the order of every run.
ROUNDS = 8


class Order:
    """The order of the training windows of ``seq_len`` tokens of one store, or of several by their weights.

    Raises:
        StoreError: a split is shorter than one window, the stores' tokenizers or document ends differ, or a weight is
            too small.
    """

    def __init__(
        self,
        manifests: Sequence[Manifest],
        weights: Sequence[float],
        seq_len: int,
        seed: int,
    ):
        self.manifests = tuple(manifests)
        self.seq_len = seq_len
        self.seed = seed
        self.shares = apportion(weights, BLOCK)  # of each store, in BLOCK sequences
        self.n_windows = [
            manifest.splits["train"].windows(seq_len) for manifest in manifests
        ]
        self._refuse_what_cannot_be_mixed()
        self.hashes = [manifest.hash("train") for manifest in manifests]
        if len(manifests) == 1:
            self.data_hash = self.hashes[0]
        else:
            parts = [
                [sha256, share]
                for sha256, share in zip(self.hashes, self.shares, strict=True)
            ]
            self.data_hash = canonical_hash(parts)
        self._start_caches()

    def _refuse_what_cannot_be_mixed(self) -> None:
        first = self.manifests[0]
        for manifest, share, n_windows in zip(
            self.manifests, self.shares, self.n_windows, strict=True
        ):
            if n_windows < 1:
                tokens = manifest.splits["train"].tokens
                raise StoreError(
                    f"{manifest.folder}: train has {tokens} tokens, seq_len {self.seq_len} needs {self.seq_len + 1}; "
                    "shorten seq_len or prepare more text"
                )
            if manifest.tokenizer_sha256 != first.tokenizer_sha256:
                raise StoreError(
                    f"{manifest.folder} and {first.folder} have different tokenizers"
                )
            if manifest.document_ends != first.document_ends:
                raise StoreError(
                    f"{manifest.folder} was prepared with --document-ends {manifest.document_ends}, {first.folder} "
                    f"with {first.document_ends}; prepare one of them again"
                )
            if share < 1:
                raise StoreError(
                    f"{manifest.folder}: its weight is less than 1/{BLOCK} of all; raise it or drop it"
                )

    def windows(self, positions: Sequence[int]) -> list[tuple[int, int]]:
        """(store, window) at each of these positions, which may lie in different epochs."""
        result = []
        for position in positions:
            stores, windows = self._chunk(position // CHUNK)
            within = position % CHUNK
            result.append((int(stores[within]), int(windows[within])))
        return result

    def sequences(self, position: int) -> list[int]:
        """How many of the first ``position`` sequences each store gives."""
        if len(self.shares) == 1:
            return [position]
        blocks, rest = divmod(position, BLOCK)
        stores_of_block, _ = self._block(blocks)
        in_begun_block = np.bincount(stores_of_block[:rest], minlength=len(self.shares))
        counts = []
        for share, begun in zip(self.shares, in_begun_block, strict=True):
            counts.append(int(blocks * share + begun))
        return counts

    def seen(self, position: int) -> dict[str, dict[str, Any]]:
        """Store -> tokens among the first ``position`` sequences: all, those of the epoch begun, and which it is."""
        result = {}
        for manifest, count, n_windows in zip(
            self.manifests, self.sequences(position), self.n_windows, strict=True
        ):
            result[str(manifest.folder)] = {
                "tokens": count * self.seq_len,
                "epoch": count // n_windows,
                "epoch_tokens": count % n_windows * self.seq_len,
                "epochs": round(count / n_windows, 4),
            }
        return result

    def _resolve_chunk(self, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """Stores and windows of the CHUNK positions of this chunk (int64 [CHUNK], both)."""
        start = chunk * CHUNK
        stores, index = self._stores(np.arange(start, start + CHUNK))
        windows = np.empty_like(index)
        for store in range(len(self.shares)):
            mine = stores == store
            windows[mine] = self._windows_of(store, index[mine])
        return stores, windows

    def _windows_of(self, store: int, index: np.ndarray) -> np.ndarray:
        """The windows that a store gives as its ``index``-th ones (int64 [k], both)."""
        n_windows = self.n_windows[store]
        epochs, within = np.divmod(index, n_windows)
        windows = np.empty_like(index)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            key = epoch_key(self.hashes[store], self.seed, int(epoch))
            windows[chosen] = permute(within[chosen], n_windows, key)
        return windows

    def _stores(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The store of each position, and how many sequences that store gives before it (int64 [k], both)."""
        if len(self.shares) == 1:
            return np.zeros_like(positions), positions
        stores = np.empty(len(positions), np.int64)
        before = np.empty(len(positions), np.int64)
        for block in np.unique(positions // BLOCK):
            chosen = positions // BLOCK == block
            within = positions[chosen] % BLOCK
            stores_of_block, before_in_block = self._block(int(block))
            stores[chosen] = stores_of_block[within]
            before[chosen] = before_in_block[within]
        return stores, before

    def _resolve_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """``_stores`` of all positions of one block of a mixture."""
        # Positions in random order are dealt to the stores like cards: the first share to the first, and so on.
        dealt = permute(
            np.arange(BLOCK), BLOCK, epoch_key(self.data_hash, self.seed, block)
        )
        stores = np.searchsorted(np.cumsum(self.shares), dealt, side="right")
        before = np.empty_like(stores)
        for store, share in enumerate(self.shares):
            before[stores == store] = np.arange(block * share, (block + 1) * share)
        return stores, before

    def _start_caches(self) -> None:
        # Two of each: a batch may lie across a border.
        self._chunk = functools.lru_cache(maxsize=2)(self._resolve_chunk)
        self._block = functools.lru_cache(maxsize=2)(self._resolve_block)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_chunk"], state["_block"]  # caches do not pickle
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_caches()


def read_order(data: Data, seed: int) -> Order:
    """The order of a recipe's data, from the stores' manifests alone. Raises StoreError."""
    manifests = [read_manifest(path) for path, _ in data.stores]
    weights = [weight for _, weight in data.stores]
    return Order(manifests, weights, data.seq_len, seed)


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to ``weights`` that add up to ``total``: the largest remainders are rounded up."""
    largest = max(weights)
    scaled = [
        weight / largest for weight in weights
    ]  # a sum of huge ones would be infinite
    sum_of_scaled = sum(scaled)
    exact = [weight / sum_of_scaled * total for weight in scaled]
    shares = [int(share) for share in exact]

    def rank(i: int) -> tuple[float, int]:
        remainder = exact[i] - shares[i]
        return -remainder, i

    left_over = total - sum(shares)
    for i in sorted(range(len(exact)), key=rank)[:left_over]:
        shares[i] += 1
    return shares


def epoch_key(data_hash: str, seed: int, epoch: int) -> bytes:
    return hashlib.sha256(f"{data_hash}:{seed}:{epoch}".encode()).digest()


def permute(index: np.ndarray, n: int, key: bytes) -> np.ndarray:
    """A keyed bijection of range(n), applied to each element of ``index`` (int64 [k] -> int64 [k]).

    A balanced Feistel network on the next even power of two; what falls outside range(n) is sent through it
    again until it falls inside (cycle walking). Memory does not grow with n.
    """
    x = np.array(index, dtype=np.int64, ndmin=1)
    if np.any((x < 0) | (x >= n)):
        raise IndexError(f"indices {x.min()}..{x.max()} are outside range({n})")
    # A square of a power of two has two halves that can be exchanged.
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    keys = np.frombuffer(hashlib.shake_256(key).digest(8 * ROUNDS), dtype="<u8")
    x = _feistel(x.astype(np.uint64), half_bits, keys)
    # A cycle that starts inside comes back inside, and no two do at the same place.
    outside = x >= np.uint64(n)
    while outside.any():
        x[outside] = _feistel(x[outside], half_bits, keys)
        outside = x >= np.uint64(n)
    return x.astype(np.int64)


def _feistel(x: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    """A bijection of the numbers of 2 * half_bits bits: each round mixes one half of them into the other."""
    bits = np.uint64(half_bits)
    mask = np.uint64(2**half_bits - 1)
    left = x >> bits
    right = x & mask
    for key in keys:
        mixed = left ^ (_mix(right ^ key) & mask)
        left = right
        right = mixed
    return (left << bits) | right


def _mix(z: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
