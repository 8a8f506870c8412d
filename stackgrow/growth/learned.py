"""G_learn (LiGO): the target's weights as learned linear maps of the source's. Here: the maps, and folding them in.

Paper: arXiv 2405.15319, appendix A.6. B matrices widen, [target channels, source channels]; D matrices mix layers,
[L, l]. Eq. 40 prints the head without the transpose that its shapes need. Which matrices there are: learned_shapes.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stackgrow.growth.draw import generator
from stackgrow.growth.learned_shapes import CHANNELS, check_learned, shapes
from stackgrow.growth.rules import Alias, Compute, GrowthError, Rule, Rules
from stackgrow.growth.width import AXES, kept_channels, kind, repeats
from stackgrow.recipe.keys import Model

ROWS = 4096  # of the embedding and the head, computed in float64 at a time


@dataclass(frozen=True)
class HyperNetwork:
    """What LiGO learns: ``widths`` {"emb", "q", "k", "v", "mlp": B}, ``depths`` {kind of tensor in a layer: D}.

    A direction that is not learned has no matrices: see ``learned_shapes.shapes``."""

    widths: Mapping[str, Tensor]
    depths: Mapping[str, Tensor]


def initial_network(
    source: Model, target: Model, seed: int, maps: str = "paper"
) -> HyperNetwork:
    """B: the identity on the old channels, as ``kept_channels`` places them, and rows from N(0, 1/sqrt(rows of B));
    D: stacked identities, so that layer i is layer i mod l (official code, tongxuluo/prts)."""
    kept = kept_channels(source, target)
    wanted = shapes(source, target, maps)

    # Widths: old channels pass through, new ones are random mixtures of them.
    widths = {}
    for name, shape in wanted["widths"].items():
        rows, columns = shape
        rng = generator(seed, "learn", name)
        B = torch.empty(shape)
        B.normal_(0, 1 / math.sqrt(rows), generator=rng)
        old_rows = kept[CHANNELS[name]]
        B[old_rows] = torch.eye(columns)
        widths[name] = B

    # Depths: as G_stack has it.
    stacked = torch.arange(target.n_layers) % source.n_layers
    depths = {}
    for name in wanted["depths"]:
        depths[name] = torch.eye(source.n_layers)[stacked]
    return HyperNetwork(widths, depths)


def widen(name: str, weight: Tensor, widths: Mapping[str, Tensor]) -> Tensor:
    """Eqs. 37-40, W' = B_out W B_in^T, for one tensor; differentiable. ``widths`` come from ``with_output``:
    none, where only the depth is learned, leave W as it is."""
    if not widths:
        return weight
    rows, *columns = AXES[kind(name)]
    # A norm has no columns.
    for axis in columns:
        B_in = widths[_matrix_of(axis, name)]
        weight = weight @ B_in.T
    # The vocabulary does not grow, nor does what a norm of queries or keys is taken over.
    if rows in ("vocab", "head"):
        return weight
    B_out = widths[_matrix_of(rows, name)]
    return B_out @ weight


def _matrix_of(axis: str, name: str) -> str:
    """The B of an axis of a tensor: of query and key channels by the tensor's own letter, wq: "q", .. wo: "o"."""
    if axis == "stream":
        return "emb"
    if axis == "ffn":
        return "mlp"
    return name.split(".")[-2][-1]


def with_output(
    widths: Mapping[str, Tensor], source: Model, target: Model
) -> dict[str, Tensor]:
    """``widths`` and "o", [H E, h e]: B_V as wo must read it, where each query head brings the values of its
    key/value head. Query head t of a target group takes from query head t mod r of the source groups; with one query
    head per group (MHA), "o" is B_V itself, as in eq. 38. Under GQA the paper defines nothing: this is ours."""
    if not widths:
        return {}
    B_V = widths["v"]
    # pairs [R, r]: 1 where query head t of a target group takes from query head s of a source group.
    from_heads = torch.arange(repeats(target)) % repeats(source)
    pairs = torch.eye(repeats(source)).to(B_V)[from_heads]
    # B_V by heads: [K, E, k, e], of target and source groups (G, g) and the channels in them.
    blocks = B_V.view(
        target.kv_heads, target.head_dim, source.kv_heads, source.head_dim
    )
    o = torch.einsum("ts,GEge->GtEgse", pairs, blocks)
    return {**widths, "o": o.reshape(target.query_width, source.query_width)}


def learned_rules(
    source: Model, target: Model, network: HyperNetwork, maps: str = "paper"
) -> Rules:
    """Fold a trained network in: W_i' = B_out (sum_j D[i, j] W_j) B_in^T (eqs. 37-42), in float64, then rounded.

    A layer's rule reads every source layer whose D is not zero: all of one weight type, once D is trained. Raises
    GrowthError where the geometry or a matrix's shape does not fit.
    """
    check_learned(source, target)
    _check_shapes(network, shapes(source, target, maps))
    exact = {name: B.detach().double() for name, B in network.widths.items()}
    widths = with_output(exact, source, target)

    targets: dict[str, Rule] = {}
    used: set[str] = set()
    for name in target.tensors():
        D = network.depths.get(kind(name))
        if D is not None:
            mixture = _mixture(name, D)
            targets[name] = _folded(name, mixture, widths)
        # The embedding, the last norm and the head, and, where no depth is learned, the layers.
        elif widths:
            targets[name] = _folded(name, {name: 1.0}, widths)
        else:
            targets[name] = Alias(name)
        used.update(targets[name].sources)
    dropped = frozenset(set(source.tensors()) - used)
    return Rules(targets, source.tensors(), target.tensors(), dropped)


def _mixture(name: str, D: Tensor) -> dict[str, float]:
    """Source tensor -> its coefficient in the target tensor ``name``, those of zero left out unless all are."""
    layer, tensor = name.split(".", 2)[1:]
    mixture = {}
    for j, coefficient in enumerate(D[int(layer)].tolist()):
        if coefficient:
            mixture[f"layers.{j}.{tensor}"] = coefficient
    return mixture or {f"layers.0.{tensor}": 0.0}


def _folded(
    name: str, mixture: Mapping[str, float], widths: Mapping[str, Tensor]
) -> Compute:
    """The target tensor ``name``: its source tensors mixed, then widened. Fewer matrices are multiplied so."""

    def fn(*weights: Tensor) -> Tensor:
        total = torch.zeros_like(weights[0], dtype=torch.float64)
        for coefficient, weight in zip(mixture.values(), weights, strict=True):
            total += coefficient * weight.double()
        return widen(name, total, widths).to(weights[0].dtype)

    # The vocabulary is the one long axis, and not widened: some rows at a time need no float64 copy of all.
    def by_rows(weight: Tensor) -> Tensor:
        parts = [fn(rows) for rows in weight.split(ROWS)]
        return torch.cat(parts)

    is_long = AXES[kind(name)][0] == "vocab"
    return Compute(tuple(mixture), by_rows if is_long else fn, "learned map")


def _check_shapes(
    network: HyperNetwork, needed: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> None:
    problems = []
    for part, wanted in needed.items():
        matrices = getattr(network, part)
        for name, shape in wanted.items():
            have = tuple(matrices[name].shape) if name in matrices else "missing"
            if have != shape:
                problems.append(f"{part}[{name!r}] is {have}, not {shape}")
    if problems:
        raise GrowthError(
            f"the network does not fit these models: {'; '.join(problems)}"
        )
