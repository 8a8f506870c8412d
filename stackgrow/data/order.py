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
ROUNDS = 8  # enough for an even choice among all permutations of a handful of windows, too


class Order:
    """The order of the training windows of ``seq_len`` tokens of one store, or of several by their weights.

    Raises:
        StoreError: a split is shorter than one window, the stores' tokenizers differ, or a weight is too small.
    """

    def __init__(self, manifests: Sequence[Manifest], weights: Sequence[float], seq_len: int, seed: int):
        self.manifests, self.seq_len, self.seed = tuple(manifests), seq_len, seed
        self.shares = apportion(weights, BLOCK)
        self.n_windows = [manifest.splits["train"].windows(seq_len) for manifest in manifests]
        for manifest, share, n in zip(manifests, self.shares, self.n_windows, strict=True):
            if n < 1:
                has = manifest.splits["train"].tokens
                raise StoreError(
                    f"{manifest.folder}: train has {has} tokens, seq_len {seq_len} needs {seq_len + 1}; shorten "
                    "seq_len or prepare more text"
                )
            if manifest.tokenizer_sha256 != manifests[0].tokenizer_sha256:
                raise StoreError(f"{manifest.folder} and {manifests[0].folder} have different tokenizers")
            if share < 1:
                raise StoreError(f"{manifest.folder}: its weight is less than 1/{BLOCK} of all; raise it or drop it")
        self.hashes = [manifest.hash("train") for manifest in manifests]
        parts = [[*part] for part in zip(self.hashes, self.shares, strict=True)]
        self.data_hash = self.hashes[0] if len(parts) == 1 else canonical_hash(parts)
        self.__setstate__({})

    def windows(self, positions: Sequence[int]) -> list[tuple[int, int]]:
        """(store, window) at each of these positions, which may lie in different epochs."""
        found = []
        for position in positions:
            stores, windows = self._chunk(position // CHUNK)
            found.append((int(stores[position % CHUNK]), int(windows[position % CHUNK])))
        return found

    def sequences(self, position: int) -> list[int]:
        """How many of the first ``position`` sequences each store gives."""
        if len(self.shares) == 1:
            return [position]
        blocks, rest = divmod(position, BLOCK)
        begun = np.bincount(self._block(blocks)[0][:rest], minlength=len(self.shares))
        return [int(blocks * share + more) for share, more in zip(self.shares, begun, strict=True)]

    def seen(self, position: int) -> dict[str, dict[str, Any]]:
        """Store -> tokens among the first ``position`` sequences: all, those of the epoch begun, and which it is."""
        found = {}
        for manifest, count, n in zip(self.manifests, self.sequences(position), self.n_windows, strict=True):
            tokens = {"tokens": count * self.seq_len, "epoch": count // n, "epoch_tokens": count % n * self.seq_len}
            found[str(manifest.folder)] = {**tokens, "epochs": round(count / n, 4)}
        return found

    def _resolve_chunk(self, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        stores, index = self._stores(np.arange(chunk * CHUNK, (chunk + 1) * CHUNK))
        windows = np.empty_like(index)
        for store, n in enumerate(self.n_windows):
            epochs, within = np.divmod(index, n)
            for epoch in np.unique(epochs[stores == store]):
                here = (stores == store) & (epochs == epoch)
                windows[here] = permute(within[here], n, epoch_key(self.hashes[store], self.seed, int(epoch)))
        return stores, windows

    def _stores(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The store of each position, and how many sequences that store gives before it (int64 [k], both)."""
        if len(self.shares) == 1:
            return np.zeros_like(positions), positions
        stores, before = np.empty((2, len(positions)), np.int64)
        for block in np.unique(positions // BLOCK):
            here = positions // BLOCK == block
            drawn, counts = self._block(int(block))
            stores[here], before[here] = drawn[positions[here] % BLOCK], counts[positions[here] % BLOCK]
        return stores, before

    def _resolve_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """``_stores`` of all positions of one block of a mixture."""
        place = permute(np.arange(BLOCK), BLOCK, epoch_key(self.data_hash, self.seed, block))
        stores = np.searchsorted(np.cumsum(self.shares), place, side="right")
        before = np.empty_like(stores)
        for store, share in enumerate(self.shares):
            before[stores == store] = np.arange(block * share, (block + 1) * share)
        return stores, before

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_chunk", "_block")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._chunk = functools.lru_cache(maxsize=2)(self._resolve_chunk)
        self._block = functools.lru_cache(maxsize=2)(self._resolve_block)


def read_order(data: Data, seed: int) -> Order:
    """The order of a recipe's data, from the stores' manifests alone. Raises StoreError."""
    paths, weights = zip(*data.stores, strict=True)
    return Order([read_manifest(path) for path in paths], weights, data.seq_len, seed)


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to ``weights`` that add up to ``total``: the largest remainders are rounded up."""
    scaled = [weight / max(weights) for weight in weights]  # a sum of huge ones would be infinite
    exact = [weight / sum(scaled) * total for weight in scaled]
    shares = [int(share) for share in exact]
    order = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for i in order[: total - sum(shares)]:
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
