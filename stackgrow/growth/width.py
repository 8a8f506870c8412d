"""Widthwise growth: how the channels of source and target correspond, and the split (G_direct).

Paper: arXiv 2405.15319, appendix A. Small letters are the source's, capitals the target's: d, D width of the
residual stream; f, F of the SwiGLU layer; e, E of a head; h, H heads; k, K key/value heads; r = h/k, R = H/K.
torchtitan's query head i reads key/value head i // r, and rotates channels 2p and 2p+1 of a head by theta^(-2p/e).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stackgrow.growth.draw import generator
from stackgrow.growth.reused import Reused
from stackgrow.growth.rules import Alias, Compute, GrowthError, Moment, Rule, Rules
from stackgrow.recipe.keys import Model

if TYPE_CHECKING:  # a plan checks a growth by its rules, and needs no torch for that
    import torch
    from torch import Tensor

# The channels along each dimension of a tensor: first those it makes, then those it reads. The embedding makes its
# columns; wo reads the channels of the query heads.
AXES = {
    "tok_embeddings": ("vocab", "stream"),
    "attention.wq": ("query", "stream"),
    "attention.wk": ("key", "stream"),
    "attention.wv": ("key", "stream"),
    "attention.wo": ("stream", "query"),
    "feed_forward.w1": ("ffn", "stream"),
    "feed_forward.w2": ("stream", "ffn"),
    "feed_forward.w3": ("ffn", "stream"),
    "attention_norm": ("stream",),
    "ffn_norm": ("stream",),
    "norm": ("stream",),
    "output": ("vocab", "stream"),
}
ROWS = 64  # made at a time: new memory is slow, and what is made in the cache is not
GRID = 4096  # fan-in shares are multiples of 1/GRID: they add up to 1 exactly, in any floating-point type


def kind(name: str) -> str:
    """``layers.3.attention.wq.weight`` -> ``attention.wq``."""
    parts = name.removesuffix(".weight").split(".")
    return ".".join(parts[2:] if parts[0] == "layers" else parts)


def split_rules(source: Model, target: Model, seed: int, moment: Moment | None = None) -> Rules:
    """G_direct widthwise (eqs. 4-11): E' = E R, W' = L W R, mu' = sqrt(d)/sqrt(D) [mu, mu_copied].

    Channel j copies channel j mod d, so that D need not be a multiple of d. R splits: the columns that copy one
    source column take uneven shares of it, alpha + beta = 1, seeded per tensor. Heads are copied whole, and with
    the key/value head that they read; head_dim must stay: a copied channel pair would rotate at another frequency.

    All but RMSNorm preserves the function. Given x' = x R, each norm returns c(x) RMSNorm(x) R, where
    c(x)^2 = sum_d x_i^2 / sum_D x'_i^2: exactly d / D where D is a multiple of d, and near it elsewhere. Copying
    mu without its factor would be exact for multiples: the factor is the paper's. Raises GrowthError.
    """
    check_widths(source, target)
    if source.norm_eps != target.norm_eps:
        raise GrowthError(f"a split keeps norm_eps: {source.norm_eps:g}, not {target.norm_eps:g}")
    channels, have, want = copied_channels(source, target), source.tensors(), target.tensors()
    memory = Reused()
    targets = {
        name: _split(name, shape, [channels[axis] for axis in AXES[kind(name)]], seed, moment, memory)
        for name, shape in have.items()
    }
    return Rules(targets, have, want)


def copied_channels(source: Model, target: Model) -> dict[str, list[int]]:
    """For every target channel the source channel that a split copies, by the words of ``AXES``."""
    if source.head_dim != target.head_dim:
        raise GrowthError(
            f"a split keeps the head width: {source.head_dim} -> {target.head_dim} would rotate copied channels at "
            f"other frequencies; use {target.dim // source.head_dim} heads for dim {target.dim}, or another operator"
        )
    k, K, r, R = source.kv_heads, target.kv_heads, repeats(source), repeats(target)
    if K // k * R < r:
        raise GrowthError(
            f"{K} key/value heads with {R} query heads each cannot hold copies of all {r} query heads of each of "
            f"{k}: use a multiple of {k} key/value heads, or {-(-r // (K // k)) * K} or more query heads"
        )
    # Target group g copies key/value head g mod k; its copies deal that head's queries out in turn.
    groups = [g % k for g in range(K)]
    heads = [g % k * r + (g // k * R + t) % r for g in range(K) for t in range(R)]
    return {
        "vocab": list(range(source.vocab_size)),
        "stream": [j % source.dim for j in range(target.dim)],
        "ffn": [j % source.ffn_dim for j in range(target.ffn_dim)],
        "query": head_channels(heads, range(source.head_dim), source.head_dim),
        "key": head_channels(groups, range(source.head_dim), source.head_dim),
    }


def kept_channels(source: Model, target: Model) -> dict[str, list[int]]:
    """For every source channel its place in the padded target, whose other channels are new."""
    k, e, E, r, R = source.kv_heads, source.head_dim, target.head_dim, repeats(source), repeats(target)
    if E % e:
        raise GrowthError(
            f"head width {e} -> {E} is no whole factor: no pair of the wider head rotates at the frequencies of the "
            f"old ones; use {target.dim // e} heads of {e}"
        )
    if r > R:
        raise GrowthError(
            f"{R} query heads per key/value head cannot hold the {r} that share one now, and new key/value heads "
            f"copy nothing: use {target.n_heads // r} key/value heads or fewer"
        )
    inside = [2 * (E // e) * (c // 2) + c % 2 for c in range(e)]
    return {
        "vocab": list(range(source.vocab_size)),
        "stream": list(range(source.dim)),
        "ffn": list(range(source.ffn_dim)),
        "query": head_channels([g * R + t for g in range(k) for t in range(r)], inside, E),
        "key": head_channels(range(k), inside, E),
    }


def check_widths(source: Model, target: Model) -> None:
    """Raise GrowthError unless the target is the source made wider, and nothing else."""
    same = ("family", "n_layers", "vocab_size", "rope_theta")
    grown = ("dim", "n_heads", "kv_heads", "head_dim", "ffn_dim")
    pairs = [(key, getattr(source, key), getattr(target, key)) for key in (*same, *grown)]
    problems = [f"{key} {a!r} -> {b!r} must stay" for key, a, b in pairs if key in same and a != b]
    problems += [f"{key} {a} -> {b} must not shrink" for key, a, b in pairs if key in grown and a > b]
    if problems:
        raise GrowthError(f"widthwise growth is not defined here: {', '.join(problems)}")


def repeats(model: Model) -> int:
    return model.n_heads // model.kv_heads


def head_channels(heads: Sequence[int], inside: Sequence[int], width: int) -> list[int]:
    return [head * width + channel for head in heads for channel in inside]


def _split(
    name: str, have: tuple[int, ...], axes: list[list[int]], seed: int, moment: Moment | None, memory: Reused
) -> Rule:
    """``have`` is the source's shape; ``axes`` the source index of each target index, per dimension."""
    if all(axis == list(range(n)) for axis, n in zip(axes, have, strict=True)):
        return Alias(name)
    power, asymmetric = (moment.power, moment.asymmetric) if moment else (1, False)
    again = [[j for j, first in enumerate(first_of(axis)) if j != first] for axis in axes] if asymmetric else []
    factor = (math.sqrt(have[0]) / math.sqrt(len(axes[0]))) ** power

    def fn(tensor: Tensor) -> Tensor:
        import torch

        rows, *columns = map(torch.tensor, axes)
        if not columns:
            wide = times(tensor[rows], factor)
        else:
            wide = memory.empty((len(rows), len(columns[0])), tensor.dtype)
            shares = _shares(columns[0], have[1], generator(seed, "split", name)) ** power
            with one_thread():
                for some, part in zip(rows.split(ROWS), wide.split(ROWS), strict=True):
                    torch.index_select(tensor.index_select(0, some), 1, columns[0], out=part)
                    if kind(name) != "tok_embeddings":
                        part *= shares
        for dimension, copies in enumerate(again):
            wide.index_fill_(dimension, torch.tensor(copies, dtype=torch.long), 0)
        return wide

    return Compute((name,), fn, "split" if len(axes) > 1 else "split norm")


@contextmanager
def one_thread() -> Iterator[None]:
    """For many small steps: several threads would meet after each, spinning, on cores that write and hash meanwhile."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def first_of(axis: Sequence[int]) -> list[int]:
    """For every target index the first one that copies the same source index."""
    first: dict[int, int] = {}
    return [first.setdefault(source, j) for j, source in enumerate(axis)]


def _shares(columns: Tensor, n_source: int, rng: torch.Generator) -> Tensor:
    """The diagonals of alpha, beta, ..: one share per target column, float32. The n copies of a source column draw
    weights from [0.5, 1.5) and take proportional shares, which add up to 1 exactly."""
    import torch

    drawn = torch.rand(len(columns), generator=rng, dtype=torch.float64) + 0.5
    totals = torch.zeros(n_source, dtype=torch.float64).index_add_(0, columns, drawn)
    shares = (GRID * drawn / totals[columns]).floor()
    first = torch.full((n_source,), len(columns)).scatter_reduce_(0, columns, torch.arange(len(columns)), "amin")
    shares[first] += GRID - torch.zeros(n_source, dtype=torch.float64).index_add_(0, columns, shares)
    return (shares / GRID).float()


def times(tensor: Tensor, factor: float) -> Tensor:
    return (tensor.double() * factor).to(tensor.dtype)
