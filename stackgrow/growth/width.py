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
    "attention.wq.bias": ("query",),
    "attention.wk.bias": ("key",),
    "attention.wv.bias": ("key",),
    "attention.q_norm": ("head",),
    "attention.k_norm": ("head",),
    "attention_norm": ("stream",),
    "ffn_norm": ("stream",),
    "norm": ("stream",),
    "output": ("vocab", "stream"),
}
# What growth in width leaves as it is.
KEPT = (
    "family",
    "n_layers",
    "vocab_size",
    "rope_theta",
    "rope_scaling",
    "tie_embeddings",
    "qk_norm",
    "attention_bias",
)
ROWS = 64  # made at a time: new memory is slow, and what is made in the cache is not
GRID = 4096  # fan-in shares are multiples of 1/GRID: they add up to 1 exactly, in any floating-point type


def kind(name: str) -> str:
    """``layers.3.attention.wq.weight`` -> ``attention.wq``."""
    parts = name.removesuffix(".weight").split(".")
    return ".".join(parts[2:] if parts[0] == "layers" else parts)


def tensor_name(layer: int, of_kind: str) -> str:
    """The inverse of ``kind`` in a layer: 3, ``attention.wq`` -> ``layers.3.attention.wq.weight``."""
    suffix = "" if of_kind.endswith(".bias") else ".weight"
    return f"layers.{layer}.{of_kind}{suffix}"


def split_rules(
    source: Model,
    target: Model,
    seed: int,
    moment: Moment | None = None,
    norm: str = "scaled",
    shares: str = "drawn",
) -> Rules:
    """G_direct widthwise (eqs. 4-11): E' = E R, W' = L W R, mu' = sqrt(d)/sqrt(D) [mu, mu_copied].

    Channel j copies channel j mod d, so that D need not be a multiple of d. R splits: the columns that copy one
    source column take uneven shares of it, alpha + beta = 1, seeded per tensor (in the official code, even ones). Heads
    are copied whole, and with the key/value head that they read; head_dim must stay: a copied pair would rotate at
    another frequency.

    All but RMSNorm preserves the function. Given x' = x R, each norm returns c(x) RMSNorm(x) R, where
    c(x)^2 = sum_d x_i^2 / sum_D x'_i^2: exactly d / D where D is a multiple of d, and near it elsewhere. ``norm`` is
    "scaled" for mu' as above, of eq. 10, by which the function changes; or "copied", without the factor, as the
    official code does it: exact at multiples, as section 5.2 says of the operator. Raises GrowthError.

    An embedding that is the head, too, is copied without shares: the last norm takes those of the head, channel by
    channel. Biases and the norms of queries and keys are copied with their heads.

    ``shares`` is "drawn" for those above, or "rms" for SPARKLING's (arXiv 2602.02472): all columns of a matrix that
    reads copies are multiplied by one factor, ``rms_factor``, which keeps the RMS of its outputs. Norms are copied, and
    AdamW's moments with none of the factors (its eq. 24). It preserves the function at whole factors alone.
    """
    check_widths(source, target)
    if shares == "rms":
        _check_rms(source, target, norm)
    if source.norm_eps != target.norm_eps:
        raise GrowthError(
            f"a split keeps norm_eps: {source.norm_eps:g}, not {target.norm_eps:g}"
        )
    channels = copied_channels(source, target)
    factor = 1.0
    if norm == "scaled":
        factor = math.sqrt(source.dim) / math.sqrt(target.dim)
    memory = Reused()
    targets: dict[str, Rule] = {}
    for name, shape in source.tensors().items():
        copied = [channels[axis] for axis in AXES[kind(name)]]
        unchanged = [list(range(size)) for size in shape]
        if copied == unchanged:
            targets[name] = Alias(name)
        elif name.endswith(".bias"):
            targets[name] = _split_vector(name, copied[0], 1.0, False, seed, moment)
        elif len(shape) == 1:
            of_head = name == "norm.weight" and source.tie_embeddings
            targets[name] = _split_vector(
                name, copied[0], factor, of_head, seed, moment
            )
        else:
            targets[name] = _split_matrix(
                name, shape, copied[0], copied[1], seed, moment, memory, shares
            )
    return Rules(targets, source.tensors(), target.tensors())


def _check_rms(source: Model, target: Model, norm: str) -> None:
    if source.dim == target.dim:
        return
    if norm != "copied":
        raise GrowthError(
            'a split with shares = "rms" copies RMSNorm\'s weights (SPARKLING): give norm = "copied"'
        )
    if source.tie_embeddings:
        raise GrowthError(
            'a split with shares = "rms" does not widen a model with tie_embeddings: the embedding is copied, the head '
            'divided, and SPARKLING multiplies the logits instead, which no checkpoint has room for; use "drawn"'
        )


def rms_factor(inputs: int, grown: int) -> float:
    """Of a matrix whose ``inputs`` become ``grown`` ones by copying (arXiv 2602.02472, eq. 17): the deviation of a sum
    of independent terms stays, of which some count twice, or, beyond twice the width, all grown / inputs times."""
    if grown <= 2 * inputs:
        return math.sqrt(inputs / (3 * grown - 2 * inputs))
    return inputs / grown


def copied_channels(source: Model, target: Model) -> dict[str, list[int]]:
    """For every target channel the source channel that a split copies, by the words of ``AXES``."""
    if source.head_dim != target.head_dim:
        raise GrowthError(
            f"a split keeps the head width: {source.head_dim} -> {target.head_dim} would rotate copied channels at "
            f"other frequencies; use {target.dim // source.head_dim} heads for dim {target.dim}, or another operator"
        )
    k, K = source.kv_heads, target.kv_heads
    r, R = repeats(source), repeats(target)
    copies = K // k  # of each key/value head, at least
    if copies * R < r:
        raise GrowthError(
            f"{K} key/value heads with {R} query heads each cannot hold copies of all {r} query heads of each of "
            f"{k}: use a multiple of {k} key/value heads, or {-(-r // copies) * K} or more query heads"
        )
    # Target group g copies key/value head g mod k; its copies deal that head's queries out in turn.
    key_heads = [group % k for group in range(K)]
    query_heads = []
    for group in range(K):
        first_of_source = key_heads[group] * r
        first_dealt = group // k * R
        for t in range(R):
            query_heads.append(first_of_source + (first_dealt + t) % r)
    whole_head = range(source.head_dim)
    return {
        "vocab": list(range(source.vocab_size)),
        "stream": [j % source.dim for j in range(target.dim)],
        "ffn": [j % source.ffn_dim for j in range(target.ffn_dim)],
        "query": head_channels(query_heads, whole_head, source.head_dim),
        "key": head_channels(key_heads, whole_head, source.head_dim),
        "head": list(whole_head),
    }


def kept_channels(source: Model, target: Model) -> dict[str, list[int]]:
    """For every source channel its place in the padded target, whose other channels are new."""
    e, E = source.head_dim, target.head_dim
    r, R = repeats(source), repeats(target)
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
    key_heads = range(source.kv_heads)
    query_heads = []
    for group in key_heads:
        for t in range(r):
            query_heads.append(group * R + t)
    # Pair p of a head becomes pair p E / e, which rotates at the same frequency.
    inside = [2 * (E // e) * (channel // 2) + channel % 2 for channel in range(e)]
    return {
        "vocab": list(range(source.vocab_size)),
        "stream": list(range(source.dim)),
        "ffn": list(range(source.ffn_dim)),
        "query": head_channels(query_heads, inside, E),
        "key": head_channels(key_heads, inside, E),
        "head": inside,
    }


def check_widths(source: Model, target: Model) -> None:
    """Raise GrowthError unless the target is the source made wider, and nothing else."""
    problems = []
    for key in KEPT:
        before, after = getattr(source, key), getattr(target, key)
        if before != after:
            problems.append(f"{key} {before!r} -> {after!r} must stay")
    for key in ("dim", "n_heads", "kv_heads", "head_dim", "ffn_dim"):
        before, after = getattr(source, key), getattr(target, key)
        if before > after:
            problems.append(f"{key} {before} -> {after} must not shrink")
    if source.qk_norm and source.head_dim != target.head_dim:
        problems.append(
            f"head_dim {source.head_dim} -> {target.head_dim} must stay where qk_norm takes a norm over a head"
        )
    if problems:
        raise GrowthError(
            f"widthwise growth is not defined here: {', '.join(problems)}"
        )


def repeats(model: Model) -> int:
    """Query heads that share a key/value head: 1 without grouped-query attention."""
    return model.n_heads // model.kv_heads


def head_channels(heads: Sequence[int], inside: Sequence[int], width: int) -> list[int]:
    """The channels ``inside`` each of the ``heads``, which are ``width`` wide."""
    channels = []
    for head in heads:
        for channel in inside:
            channels.append(head * width + channel)
    return channels


def _split_vector(
    name: str,
    copied: list[int],
    factor: float,
    of_tied_head: bool,
    seed: int,
    moment: Moment | None,
) -> Compute:
    """A norm mu' [D] from mu [d], or a bias; ``copied`` has the source index of each target index. ``of_tied_head``:
    it also takes the shares of the head, whose matrix is the embedding's and has none."""
    power = moment.power if moment else 1
    zeroed = _second_copies(copied) if moment and moment.asymmetric else []

    def fn(vector: Tensor) -> Tensor:
        import torch

        columns = torch.tensor(copied)
        wide = vector[columns]
        if of_tied_head:
            shares = _shares(columns, len(vector), generator(seed, "split", name))
            wide *= shares**power
        wide = times(wide, factor**power)
        wide[torch.tensor(zeroed, dtype=torch.long)] = 0
        return wide

    return Compute(
        (name,), fn, "split bias" if name.endswith(".bias") else "split norm"
    )


def _split_matrix(
    name: str,
    shape: tuple[int, ...],
    copied_rows: list[int],
    copied_columns: list[int],
    seed: int,
    moment: Moment | None,
    memory: Reused,
    shares: str,
) -> Compute:
    """L W R [d_out', d_in'] from W, whose ``shape`` is [d_out, d_in]; of the embedding, which makes its columns, the
    copy E R without shares."""
    power = moment.power if moment else 1
    asymmetric = moment is not None and moment.asymmetric
    is_embedding = kind(name) == "tok_embeddings"
    drawn = shares == "drawn" and not is_embedding
    factor = 1.0
    if shares == "rms" and not is_embedding and not moment:
        factor = rms_factor(shape[1], len(copied_columns))

    def fn(weight: Tensor) -> Tensor:
        import torch

        rows = torch.tensor(copied_rows)
        columns = torch.tensor(copied_columns)
        wide = memory.empty((len(rows), len(columns)), weight.dtype)
        parts = _shares(columns, shape[1], generator(seed, "split", name)) ** power

        # Some rows at a time stay in the processor's cache between the copy and the product.
        with one_thread():
            for some_rows, part in zip(rows.split(ROWS), wide.split(ROWS), strict=True):
                narrow = weight.index_select(0, some_rows)
                torch.index_select(narrow, 1, columns, out=part)
                if drawn:
                    part *= parts
                elif factor != 1:
                    part.copy_(times(part, factor))

        # A moment of which the first copy alone keeps its own.
        if asymmetric:
            for dimension, copied in enumerate((copied_rows, copied_columns)):
                again = torch.tensor(_second_copies(copied), dtype=torch.long)
                wide.index_fill_(dimension, again, 0)
        return wide

    return Compute((name,), fn, "split")


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


def _second_copies(copied: Sequence[int]) -> list[int]:
    """The target indices that copy what one before them copies too."""
    seen: set[int] = set()
    again = []
    for index, source in enumerate(copied):
        if source in seen:
            again.append(index)
        seen.add(source)
    return again


def _shares(columns: Tensor, n_source: int, rng: torch.Generator) -> Tensor:
    """The diagonals of alpha, beta, ..: one share per target column, float32. The n copies of a source column draw
    weights from [0.5, 1.5) and take proportional shares, which add up to 1 exactly."""
    import torch

    # Proportional shares, in whole numbers of the grid.
    drawn = torch.rand(len(columns), generator=rng, dtype=torch.float64) + 0.5
    totals = torch.zeros(n_source, dtype=torch.float64).index_add_(0, columns, drawn)
    shares = (GRID * drawn / totals[columns]).floor()
    # The first copy of each source column takes what rounding left over.
    first = torch.full((n_source,), len(columns))
    first.scatter_reduce_(0, columns, torch.arange(len(columns)), "amin")
    given = torch.zeros(n_source, dtype=torch.float64).index_add_(0, columns, shares)
    shares[first] += GRID - given
    return (shares / GRID).float()


def times(tensor: Tensor, factor: float) -> Tensor:
    """In float64, then rounded."""
    return (tensor.double() * factor).to(tensor.dtype)
