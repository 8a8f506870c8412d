from dataclasses import replace
from pathlib import Path

import pytest
import torch
from growth_for_tests import (
    Tensors,
    apply,
    assert_same,
    deviation,
    logits,
    through_checkpoints,
    weights,
)
from torch import Tensor

from stackgrow.growth.learned import (
    HyperNetwork,
    initial_network,
    learned_rules,
    widen,
    with_output,
)
from stackgrow.growth.learned_shapes import layer_kinds
from stackgrow.growth.rules import Alias, GrowthError
from stackgrow.recipe.keys import Model

MHA = Model(
    dim=16, n_layers=2, n_heads=4, ffn_dim=20, vocab_size=4100
)  # more rows than are computed at a time
GQA = replace(MHA, n_kv_heads=2)
CASES = {
    "mha": (MHA, replace(MHA, dim=32, n_heads=8, n_kv_heads=8, ffn_dim=44, n_layers=5)),
    "gqa": (GQA, replace(GQA, dim=32, n_heads=8, n_kv_heads=4, n_layers=4)),
    "gqa, kv kept": (GQA, replace(GQA, dim=32, n_heads=8, n_layers=2)),
    "gqa, wider heads": (GQA, replace(GQA, dim=32, n_layers=3)),
    "depth alone": (GQA, replace(GQA, n_layers=6)),
}
SEED = 4
B = {"wq": ("q", "emb"), "wk": ("k", "emb"), "wv": ("v", "emb"), "wo": ("emb", "o"),
     "w1": ("mlp", "emb"), "w3": ("mlp", "emb"), "w2": ("emb", "mlp")}  # fmt: skip


def trained(source: Model, target: Model) -> HyperNetwork:
    """No entry as it was drawn, none zero."""
    start, rng = initial_network(source, target, SEED), torch.Generator().manual_seed(1)
    widths = {
        k: m + 0.1 * torch.randn(m.shape, generator=rng)
        for k, m in start.widths.items()
    }
    return HyperNetwork(
        widths,
        {
            k: m + 0.1 * torch.randn(m.shape, generator=rng)
            for k, m in start.depths.items()
        },
    )


def output_map(value: Tensor, source: Model, target: Model) -> Tensor:
    """B_V spread over the query heads, head by head."""
    e, E = source.head_dim, target.head_dim
    r, R = source.n_heads // source.kv_heads, target.n_heads // target.kv_heads
    spread = torch.zeros(target.n_heads * E, source.n_heads * e, dtype=torch.float64)
    for i in range(target.n_heads):
        for j in range(source.n_heads):
            if i % R % r == j % r:
                block = value[
                    i // R * E : (i // R + 1) * E, j // r * e : (j // r + 1) * e
                ]
                spread[i * E : (i + 1) * E, j * e : (j + 1) * e] = block
    return spread


def dense_learned(
    source: Model, target: Model, network: HyperNetwork, small: Tensors
) -> dict[str, Tensor]:
    """Eqs. 37-42 in float64, each layer widened before the layers are mixed, as they are written. Where a direction
    has no matrices they are identities."""
    sizes = {
        "emb": source.dim,
        "q": source.dim,
        "k": source.kv_heads * source.head_dim,
        "mlp": source.ffn_dim,
    }
    sizes["v"], same = sizes["k"], torch.eye(source.n_layers, dtype=torch.float64)
    widths = {
        k: network.widths[k].double() if network.widths else torch.eye(n).double()
        for k, n in sizes.items()
    }
    widths["o"] = output_map(widths["v"], source, target)

    def wide(name: str) -> Tensor:
        W, short = small[name].double(), name.split(".")[-2]
        if W.dim() == 1:
            return widths["emb"] @ W
        if short in ("tok_embeddings", "output"):
            return W @ widths["emb"].T
        return widths[B[short][0]] @ W @ widths[B[short][1]].T

    grown = {}
    for name in target.tensors():
        if name.startswith("layers."):
            _, layer, tensor = name.split(".", 2)
            D = (
                network.depths[tensor.removesuffix(".weight")].double()
                if network.depths
                else same
            )
            grown[name] = sum(
                D[int(layer), j] * wide(f"layers.{j}.{tensor}")
                for j in range(source.n_layers)
            )
        else:
            grown[name] = wide(name)
    return grown


def assert_rounded(have: Tensors, want: Tensors, unit: float) -> None:
    """Rounded once from float64: within one unit in the last place; 1e-14 for sums that cancel."""
    assert set(have) == set(want)
    for name, exact in want.items():
        assert (
            (have[name].double() - exact).abs() <= unit * exact.abs() + 1e-14
        ).all(), name


@pytest.mark.parametrize(
    ("dtype", "unit"),
    [(torch.float32, 2**-23), (torch.bfloat16, 2**-7)],
    ids=["float32", "bfloat16"],
)
@pytest.mark.parametrize("case", CASES)
def test_folding_equals_the_equations(
    case: str, dtype: torch.dtype, unit: float
) -> None:
    source, target = CASES[case]
    network, small = trained(source, target), weights(source, dtype)
    grown = apply(learned_rules(source, target, network), small)
    assert {w.dtype for w in grown.values()} == {dtype}
    assert_rounded(grown, dense_learned(source, target, network, small), unit)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("case", ["mha", "gqa"])
def test_folding_through_checkpoints(case: str, parts: int, tmp_path: Path) -> None:
    source, target = CASES[case]
    small, rules = (
        weights(source),
        learned_rules(source, target, trained(source, target)),
    )
    grown = through_checkpoints(rules, small, tmp_path, parts)
    assert_same(grown, apply(rules, small))
    assert_rounded(
        grown, dense_learned(source, target, trained(source, target), small), 2**-23
    )


def test_initial_network_is_the_identity_over_small_rows() -> None:
    source = Model(dim=64, n_layers=2, n_heads=4, ffn_dim=96, vocab_size=5)
    target = replace(source, dim=128, n_heads=8, n_kv_heads=8, ffn_dim=224, n_layers=5)
    network = initial_network(source, target, SEED)
    shapes = {k: tuple(m.shape) for k, m in network.widths.items()}
    assert shapes == {
        "emb": (128, 64),
        "q": (128, 64),
        "k": (128, 64),
        "v": (128, 64),
        "mlp": (224, 96),
    }
    for name, matrix in network.widths.items():
        rows, columns = matrix.shape
        new = matrix[columns:]
        assert torch.equal(matrix[:columns], torch.eye(columns)), name
        assert abs(new.std().item() * rows**0.5 - 1) < 6 / (2 * new.numel()) ** 0.5, (
            name
        )
    assert not torch.equal(network.widths["q"], network.widths["k"])
    stacked = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1], [1, 0]])
    assert set(network.depths) == set(layer_kinds(source))
    assert all(torch.equal(D, stacked) for D in network.depths.values())
    assert_same(initial_network(source, target, SEED).widths, network.widths)
    assert not torch.equal(
        initial_network(source, target, SEED + 1).widths["q"], network.widths["q"]
    )


def test_the_initial_depth_map_is_a_stack() -> None:
    source, target = CASES["depth alone"]
    small, rules = (
        weights(source),
        learned_rules(source, target, initial_network(source, target, SEED)),
    )
    for name, W in apply(rules, small).items():
        parts = name.split(".")
        parts[1] = str(int(parts[1]) % 2) if parts[0] == "layers" else parts[1]
        assert torch.equal(W, small[".".join(parts)]), name
    assert all(len(rule.sources) == 1 for rule in rules.targets.values())
    outside = {name for name in target.tensors() if not name.startswith("layers.")}
    assert {
        name for name, rule in rules.targets.items() if isinstance(rule, Alias)
    } == outside


@pytest.mark.parametrize("source", [MHA, GQA], ids=["mha", "gqa"])
def test_an_identity_over_zeros_is_the_source_with_its_norms_scaled(
    source: Model,
) -> None:
    """On the model itself: heads, their values and wo fit together. mu' = B mu lacks the factor sqrt(d/D)."""
    source = replace(source, vocab_size=97)
    target = replace(
        source,
        dim=32,
        n_heads=8,
        n_kv_heads=2 * source.kv_heads,
        ffn_dim=40,
        norm_eps=source.norm_eps / 2,
    )
    start, small = initial_network(source, target, SEED), weights(source)
    widths = {
        k: torch.cat([m[: m.shape[1]], torch.zeros_like(m[m.shape[1] :])])
        for k, m in start.widths.items()
    }
    grown = logits(
        target,
        apply(learned_rules(source, target, HyperNetwork(widths, start.depths)), small),
    )
    scaled = {name: w * 2**0.5 if w.dim() == 1 else w for name, w in small.items()}
    assert deviation(grown, logits(source, scaled)) < 1e-5


def test_unused_layers_are_dropped_and_a_zero_row_gives_zeros() -> None:
    source, target = CASES["depth alone"]
    network = initial_network(source, target, SEED)
    D = torch.zeros(6, 2)
    D[1:, 0] = 1
    rules = learned_rules(
        source,
        target,
        HyperNetwork(network.widths, {**network.depths, "attention.wq": D}),
    )
    assert rules.dropped == {"layers.1.attention.wq.weight"}
    grown = apply(rules, weights(source))
    assert (grown["layers.0.attention.wq.weight"] == 0).all()
    assert torch.equal(
        grown["layers.5.attention.wq.weight"],
        weights(source)["layers.0.attention.wq.weight"],
    )


def test_widening_is_differentiable_in_every_width() -> None:
    source, target = CASES["gqa"]
    widths = {
        k: m.clone().requires_grad_()
        for k, m in initial_network(source, target, SEED).widths.items()
    }
    small = weights(source)
    sum(
        widen(n, w, with_output(widths, source, target)).square().sum()
        for n, w in small.items()
    ).backward()
    for name, matrix in widths.items():
        assert matrix.grad is not None
        assert (matrix.grad.abs().sum(1) > 0).all(), name


def test_networks_of_other_models_are_refused() -> None:
    source, target = CASES["mha"]
    network = initial_network(source, target, SEED)
    with pytest.raises(
        GrowthError, match=r"depths\['ffn_norm'\] is \(5, 2\), not \(6, 2\)"
    ):
        learned_rules(source, replace(target, n_layers=6), network)
    with pytest.raises(
        GrowthError, match=r"widths\['emb'\] is missing, not \(32, 16\)"
    ):
        learned_rules(
            source,
            target,
            replace(
                network, widths={k: m for k, m in network.widths.items() if k != "emb"}
            ),
        )
    with pytest.raises(GrowthError, match="vocab_size 4100 -> 5 must stay"):
        learned_rules(source, replace(target, vocab_size=5), network)
