"""G_learn (LiGO): the target's weights as learned linear maps of the source's. Here: the maps, and folding them in.

Paper: arXiv 2405.15319, appendix A.6. B matrices widen, [target channels, source channels]; D matrices mix layers,
[L, l]. Eq. 40 prints the head without the transpose that its shapes need.
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
    """What LiGO learns: ``widths`` {"emb", "q", "k", "v", "mlp": B}, ``depths`` {name in LAYER_KINDS: D}.

    A direction that does not grow has no matrices: see ``learned_shapes.shapes``."""

    widths: Mapping[str, Tensor]
    depths: Mapping[str, Tensor]


def initial_network(source: Model, target: Model, seed: int) -> HyperNetwork:
    """B: the identity on the old channels, as ``kept_channels`` places them, and rows from N(0, 1/sqrt(rows of B));
    D: stacked identities, so that layer i is layer i mod l (official code, tongxuluo/prts)."""
    kept, widths, wanted = kept_channels(source, target), {}, shapes(source, target)
    for name, shape in wanted["widths"].items():
        widths[name] = torch.empty(shape).normal_(0, 1 / math.sqrt(shape[0]), generator=generator(seed, "learn", name))
        widths[name][kept[CHANNELS[name]]] = torch.eye(shape[1])
    D = torch.eye(source.n_layers)[torch.arange(target.n_layers) % source.n_layers]
    return HyperNetwork(widths, {name: D.clone() for name in wanted["depths"]})


def widen(name: str, weight: Tensor, widths: Mapping[str, Tensor]) -> Tensor:
    """Eqs. 37-40, W' = B_out W B_in^T, for one tensor; differentiable. ``widths`` come from ``with_output``:
    none, where only the depth grows, leave W as it is."""
    if not widths:
        return weight
    sides = {"stream": "emb", "ffn": "mlp", "vocab": ""}
    rows, *columns = [sides.get(axis, name.split(".")[-2][-1]) for axis in AXES[kind(name)]]  # wq: "q", .. wo: "o"
    for column in columns:
        weight = weight @ widths[column].T
    return widths[rows] @ weight if rows else weight


def with_output(widths: Mapping[str, Tensor], source: Model, target: Model) -> dict[str, Tensor]:
    """``widths`` and "o", [H E, h e]: B_V as wo must read it, where each query head brings the values of its
    key/value head. Query head t of a target group takes from query head t mod r of the source groups; with one query
    head per group (MHA), "o" is B_V itself, as in eq. 38. Under GQA the paper defines nothing: this is ours."""
    if not widths:
        return {}
    pairs = torch.eye(repeats(source)).to(widths["v"])[torch.arange(repeats(target)) % repeats(source)]
    blocks = widths["v"].view(target.kv_heads, target.head_dim, source.kv_heads, source.head_dim)
    o = torch.einsum("ts,GEge->GtEgse", pairs, blocks)
    return {**widths, "o": o.reshape(target.n_heads * target.head_dim, source.n_heads * source.head_dim)}


def learned_rules(source: Model, target: Model, network: HyperNetwork) -> Rules:
    """Fold a trained network in: W_i' = B_out (sum_j D[i, j] W_j) B_in^T (eqs. 37-42), in float64, then rounded.

    A layer's rule reads every source layer whose D is not zero: all of one weight type, once D is trained. Raises
    GrowthError where the geometry or a matrix's shape does not fit.
    """
    check_learned(source, target)
    _check_shapes(network, shapes(source, target))
    widths = with_output({name: B.detach().double() for name, B in network.widths.items()}, source, target)
    targets: dict[str, Rule] = {}
    for name in target.tensors():
        mixed = {name: 1.0}
        if kind(name) in network.depths:
            layer, tensor = name.split(".", 2)[1:]
            row = network.depths[kind(name)][int(layer)].tolist()
            mixed = {f"layers.{j}.{tensor}": c for j, c in enumerate(row) if c} or {f"layers.0.{tensor}": 0.0}
        targets[name] = _folded(name, mixed, widths) if widths or kind(name) in network.depths else Alias(name)
    used = {fqn for rule in targets.values() for fqn in rule.sources}
    return Rules(targets, source.tensors(), target.tensors(), frozenset(set(source.tensors()) - used))


def _folded(name: str, mixed: Mapping[str, float], widths: Mapping[str, Tensor]) -> Compute:
    def fn(first: Tensor, *others: Tensor) -> Tensor:
        coefficient, *more = mixed.values()
        total = coefficient * first.double()
        for c, weight in zip(more, others, strict=True):
            total += c * weight.double()
        return widen(name, total, widths).to(first.dtype)

    def by_rows(weight: Tensor) -> Tensor:  # the vocabulary is the one long axis, and not widened
        return torch.cat([fn(rows) for rows in weight.split(ROWS)])

    return Compute(tuple(mixed), by_rows if AXES[kind(name)][0] == "vocab" else fn, "learned map")


def _check_shapes(network: HyperNetwork, needed: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
    have = {part: {name: tuple(M.shape) for name, M in getattr(network, part).items()} for part in needed}
    problems = [
        f"{part}[{name!r}] is {have[part].get(name, 'missing')}, not {shape}"
        for part, wanted in needed.items()
        for name, shape in wanted.items()
        if have[part].get(name) != shape
    ]
    if problems:
        raise GrowthError(f"the network does not fit these models: {'; '.join(problems)}")
