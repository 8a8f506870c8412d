"""The order of windows: a keyed permutation of each store's, and stores mixed by weight."""

import collections
import hashlib
import itertools
import math
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stackgrow.data.order import BLOCK, Order, apportion, epoch_key, permute
from stackgrow.data.store import Manifest, Shard, Split, StoreError


def manifest(tokens: int, name: str = "a", tokenizer: str = "t") -> Manifest:
    split = Split(
        tokens,
        0,
        (
            Shard(
                "x.npy",
                tokens,
                0,
                hashlib.sha256(name.encode()).hexdigest(),
                2 * tokens + 128,
            ),
        ),
    )
    return Manifest(
        Path(name),
        "uint16",
        100,
        1,
        "m",
        tokenizer,
        {"train": split, "validation": split},
        {},
    )


def test_order_is_the_released_one() -> None:
    """A change would make stored positions mean other tokens. From a separate, scalar implementation."""
    windows = permute(np.arange(10), 1000, epoch_key("data", 3407, 0)).tolist()
    assert windows == [82, 427, 691, 501, 461, 687, 347, 457, 704, 708]


@pytest.mark.parametrize(
    "n", [1, 2, 3, 4, 5, 7, 8, 16, 17, 61, 100, 255, 256, 257, 1000, 4096, 5000, 70_001]
)
def test_permute_is_a_bijection(n: int) -> None:
    for epoch in range(3):
        assert np.array_equal(
            np.sort(permute(np.arange(n), n, epoch_key("m", 1, epoch))), np.arange(n)
        )


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


def chi_square(n: int, draws_per_permutation: int) -> float:
    """Chi-square of how often each of the n! permutations of range(n) is drawn, over as many keys as it takes."""
    cells = math.factorial(n)
    counts = dict.fromkeys(itertools.permutations(range(n)), 0)
    for seed in range(draws_per_permutation * cells):
        counts[tuple(permute(np.arange(n), n, epoch_key("m", seed, 0)).tolist())] += 1
    return (
        sum((count - draws_per_permutation) ** 2 for count in counts.values())
        / draws_per_permutation
    )


@pytest.mark.parametrize("n", [3, 4])
def test_permute_draws_all_permutations_of_a_few_equally(n: int) -> None:
    """Of even draws, chi-square's mean is its degrees of freedom k, its deviation sqrt(2 k)."""
    degrees = math.factorial(n) - 1
    assert chi_square(n, 100) < degrees + 5 * (2 * degrees) ** 0.5


def test_permutations_of_five_spread_by_a_tenth() -> None:
    """They are not drawn evenly, as the comment on ROUNDS says: their frequencies' spread beyond that of chance."""
    degrees = math.factorial(5) - 1
    chance = 1 / 40  # variance of a frequency over its mean, of 40 even draws each
    spread = max(0.0, (chi_square(5, 40) / degrees - 1) * chance) ** 0.5
    assert 0.05 < spread < 0.14


def test_permute_sends_indices_everywhere_and_parts_neighbours() -> None:
    """Where the first tenth of 1,000 indices goes, over 300 keys; and neighbours do not stay neighbours."""
    images = np.stack(
        [permute(np.arange(1000), 1000, epoch_key("m", 1, e)) for e in range(300)]
    )
    bins = np.bincount(images[:, :100].ravel() // 100, minlength=10)
    assert np.abs(bins - 3000).max() < 5 * 3000**0.5
    steps = np.abs(np.diff(images, axis=1))
    assert abs(steps.mean() - 1000 / 3) < 5
    assert (steps == 1).mean() < 0.004, "two of 1,000 is chance"


def mixture(
    weights: tuple[float, ...] = (6.5, 2.5, 1),
    sizes: tuple[int, ...] = (500, 7001, 33),
    **options: Any,
) -> Order:
    manifests = [
        manifest(8 * size + 1, name) for size, name in zip(sizes, "abc", strict=False)
    ]
    return Order(manifests, weights, 8, options.get("seed", 7))


def test_mixture_holds_its_weights_in_every_block() -> None:
    order = mixture()
    stores = np.array([store for store, _ in order.windows(range(3 * BLOCK))])
    for block in range(3):
        assert np.bincount(stores[block * BLOCK : (block + 1) * BLOCK]).tolist() == [
            6500,
            2500,
            1000,
        ]
    assert abs(np.bincount(stores[:1000])[0] - 650) < 100, (
        "mixed well inside a block, too"
    )
    assert (stores[:BLOCK] != stores[BLOCK : 2 * BLOCK]).any(), "and anew in each"


def test_each_store_of_a_mixture_gives_its_own_order() -> None:
    """The i-th sequence that a store gives is what position i of that store alone would be: each window once an epoch."""
    order = mixture()
    found = order.windows(range(25_000))
    for store, name in enumerate("abc"):
        ours = [window for which, window in found if which == store]
        alone = Order([manifest(8 * order.n_windows[store] + 1, name)], [1], 8, 7)
        assert ours == [window for _, window in alone.windows(range(len(ours)))]
        if store != 1:  # which does not get through its first epoch
            assert sorted(ours[: order.n_windows[store]]) == list(
                range(order.n_windows[store])
            )


def test_mixture_is_a_pure_function_of_the_position() -> None:
    order = mixture()
    found = order.windows(range(12_000))
    again = pickle.loads(pickle.dumps(mixture()))
    for position in (11_999, 0, 4095, 4096, 9999, 10_000):
        assert again.windows([position]) == [found[position]]
    assert mixture(seed=8).windows(range(100)) != found[:100]
    assert mixture((6, 3, 1)).data_hash != order.data_hash


@pytest.mark.parametrize("position", [0, 1, 499, 9_999, 10_000, 10_001, 23_456])
def test_what_each_store_gave_is_counted_exactly(position: int) -> None:
    order = mixture()
    counted = collections.Counter(store for store, _ in order.windows(range(position)))
    assert order.sequences(position) == [counted[store] for store in range(3)]
    seen = order.seen(position)
    assert sum(s["tokens"] for s in seen.values()) == 8 * position
    for name, n in zip("abc", order.n_windows, strict=True):
        assert (
            seen[name]["tokens"]
            == seen[name]["epoch"] * n * 8 + seen[name]["epoch_tokens"]
        )


def test_shares_add_up_and_the_largest_remainders_are_rounded_up() -> None:
    assert apportion([0.67, 0.15, 0.045, 0.045, 0.045, 0.045], BLOCK) == [
        6700,
        1500,
        450,
        450,
        450,
        450,
    ]
    assert apportion([1, 1, 1], 10) == [4, 3, 3]
    assert apportion([3], 7) == [7]
    assert apportion([1e308, 1e308, 1e308, 1e308], 8) == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("manifests", "weights", "message"),
    [
        ([manifest(8)], [1], "a: train has 8 tokens, seq_len 8 needs 9"),
        (
            [manifest(80), manifest(80, "b", "u")],
            [1, 1],
            "b and a have different tokenizers",
        ),
        (
            [manifest(80), manifest(80, "b")],
            [1, 1e-5],
            "b: its weight is less than 1/10000 of all",
        ),
    ],
)
def test_an_order_refuses_stores_that_do_not_fit(
    manifests: list[Manifest], weights: list[float], message: str
) -> None:
    with pytest.raises(StoreError, match=message):
        Order(manifests, weights, 8, 7)


def test_any_position_of_any_corpus_costs_the_same() -> None:
    """Positions of a 615B-token corpus resolve as fast as those of a small one: nothing is materialised."""

    def seconds(order: Order) -> float:
        best = 1.0
        for start in range(0, 10**6, 10**5):
            began = time.thread_time()  # not the clock: the machine may be busy
            order.windows(range(start, start + 512))
            best = min(best, time.thread_time() - began)
        return best

    small, huge = (
        Order([manifest(3 * 10**5 * 8 + 1)], [1], 8, 7),
        Order([manifest(3 * 10**8 * 2048 + 1)], [1], 2048, 7),
    )
    assert seconds(huge) < 3 * seconds(small)
