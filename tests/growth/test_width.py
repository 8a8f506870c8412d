import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from growth_for_tests import (
    Tensors,
    apply,
    assert_same,
    deviation,
    llama,
    logits,
    through_checkpoints,
    weights,
)
from torch import Tensor, nn

from stackgrow.growth.depth import depth_rules
from stackgrow.growth.draw import generator
from stackgrow.growth.rules import Alias, GrowthError, Moment
from stackgrow.growth.width import (
    AXES,
    _shares,
    copied_channels,
    kind,
    rms_factor,
    split_rules,
)
from stackgrow.recipe.keys import Model

MHA = Model(dim=16, n_layers=2, n_heads=4, ffn_dim=20, vocab_size=11)
GQA = replace(MHA, n_kv_heads=2)
MQA = replace(MHA, n_kv_heads=1)
# Source, target, and by hand: the source head of each target head, the source key/value head of each target one.
CASES = {
    "mha": (MHA, replace(MHA, dim=32, n_heads=8, n_kv_heads=8, ffn_dim=40), [0, 1, 2, 3] * 2, [0, 1, 2, 3] * 2),
    "mha, 3/2": (MHA, replace(MHA, dim=24, n_heads=6, n_kv_heads=6, ffn_dim=31), [0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 0, 1]),
    "mha, 5/2": (MHA, replace(MHA, dim=40, n_heads=10, n_kv_heads=10, ffn_dim=51), [0, 1, 2, 3] * 2 + [0, 1], [0, 1, 2, 3] * 2 + [0, 1]),
    "mha to gqa": (MHA, replace(MHA, dim=32, n_heads=8, n_kv_heads=4), [0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 2, 3]),
    "gqa": (GQA, replace(GQA, dim=32, n_heads=8, n_kv_heads=4, ffn_dim=40), [0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 0, 1]),
    "gqa, kv kept": (GQA, replace(GQA, dim=32, n_heads=8), [0, 1, 0, 1, 2, 3, 2, 3], [0, 1]),
    "gqa, 3/2": (GQA, replace(GQA, dim=24, n_heads=6, n_kv_heads=3), [0, 1, 2, 3, 0, 1], [0, 1, 0]),
    "gqa, kv alone": (GQA, replace(GQA, n_kv_heads=4), [0, 2, 1, 3], [0, 1, 0, 1]),
    "mqa": (MQA, replace(MQA, dim=32, n_heads=8, n_kv_heads=2), [0, 1, 2, 3, 0, 1, 2, 3], [0, 0]),
    "ffn alone": (GQA, replace(GQA, ffn_dim=33), [0, 1, 2, 3], [0, 1]),
}  # fmt: skip
SEED = 5


def copier(sources: list[int], n: int) -> Tensor:
    """[n, targets]: column j is the unit vector of the source that target j copies."""
    matrix = torch.zeros(n, len(sources), dtype=torch.float64)
    for j, i in enumerate(sources):
        matrix[i, j] = 1
    return matrix


def dense_split(case: str, small: Tensors) -> dict[str, Tensor]:
    """Eqs. 4-11 with matrices, in float64, rounded once. Only the shares of R come from the library."""
    source, target, heads, groups = CASES[case]
    d, D = source.dim, target.dim
    eye = torch.eye(source.head_dim, dtype=torch.float64)
    stream = copier([j % d for j in range(D)], d)
    ffn = copier([j % source.ffn_dim for j in range(target.ffn_dim)], source.ffn_dim)
    query, key = (
        torch.kron(copier(heads, source.n_heads), eye),
        torch.kron(copier(groups, source.kv_heads), eye),
    )
    vocab = torch.eye(source.vocab_size, dtype=torch.float64)
    sides = {"wq": (query, stream), "wk": (key, stream), "wv": (key, stream), "wo": (stream, query), "w1": (ffn, stream),
             "w2": (stream, ffn), "w3": (ffn, stream), "output": (vocab, stream)}  # fmt: skip
    grown = {}
    for name, weight in small.items():
        W, short = weight.double(), name.split(".")[-2]
        if short == "tok_embeddings":
            result = W @ stream
        elif "norm" in short:
            result = math.sqrt(d) / math.sqrt(D) * (W @ stream)
        else:
            out, into = sides[short]
            R = into * _shares(
                into.argmax(0), into.shape[0], generator(SEED, "split", name)
            )
            assert torch.equal(R.sum(1), torch.ones(len(R), dtype=torch.float64)), (
                "alpha + beta = 1"
            )
            result = out.T @ W @ R
        grown[name] = result.to(weight.dtype)
    return grown


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_split_equals_the_equations_bit_for_bit(case: str, dtype: torch.dtype) -> None:
    source, target, _, _ = CASES[case]
    small = weights(source, dtype)
    assert_same(
        apply(split_rules(source, target, SEED), small), dense_split(case, small)
    )


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("case", ["mha", "gqa"])
def test_split_through_checkpoints(case: str, parts: int, tmp_path: Path) -> None:
    source, target, _, _ = CASES[case]
    small = weights(source)
    grown = through_checkpoints(
        split_rules(source, target, SEED), small, tmp_path, parts
    )
    assert_same(grown, dense_split(case, small))


@pytest.mark.parametrize("case", CASES)
def test_query_heads_keep_their_key_value_head_and_all_are_there(case: str) -> None:
    source, target, heads, groups = CASES[case]
    before, after = source.n_heads // source.kv_heads, target.n_heads // target.kv_heads
    assert [h // before for h in heads] == [
        groups[i // after] for i in range(target.n_heads)
    ], "the table above"
    assert set(heads) == set(range(source.n_heads))
    channels, e = copied_channels(source, target), source.head_dim
    assert [c // e for c in channels["query"][::e]] == heads
    assert [c // e for c in channels["key"][::e]] == groups
    assert channels["query"][:e] == list(range(e)), (
        "the order inside a head is that of the rotation"
    )


def test_shares_are_uneven_positive_and_differ_between_tensors() -> None:
    columns = torch.arange(400) % 200
    first = _shares(columns, 200, generator(SEED, "split", "a"))
    assert 0.249 < first.min() < 0.3
    assert 0.7 < first.max() < 0.751
    assert (first.view(2, 200).sum(0) == 1).all()
    assert len(first.unique()) > 300
    assert not torch.equal(first, _shares(columns, 200, generator(SEED, "split", "b")))
    assert not torch.equal(
        first, _shares(columns, 200, generator(SEED + 1, "split", "a"))
    )
    assert torch.equal(_shares(torch.arange(7), 7, generator(0)), torch.ones(7)), (
        "a column that is not copied stays"
    )


def test_what_does_not_change_is_an_alias() -> None:
    source, target, _, _ = CASES["ffn alone"]
    computed = {
        name
        for name, rule in split_rules(source, target, 0).targets.items()
        if not isinstance(rule, Alias)
    }
    assert computed == {
        f"layers.{i}.feed_forward.w{j}.weight" for i in (0, 1) for j in (1, 2, 3)
    }


# The function. Norms are the one place where a split does not preserve it.
BIG = Model(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=176, vocab_size=97)
TWICE = replace(BIG, dim=128, n_heads=8, n_kv_heads=4, ffn_dim=352)
WIDER = {
    "twice": (BIG, TWICE),
    "thrice, mha": (
        replace(BIG, n_kv_heads=4),
        replace(BIG, dim=192, n_heads=12, n_kv_heads=12),
    ),
    "3/2": (BIG, replace(BIG, dim=96, n_heads=6, n_kv_heads=3, ffn_dim=200)),
    "kv kept": (BIG, replace(BIG, dim=128, n_heads=8, ffn_dim=352)),
    "mqa": (replace(BIG, n_kv_heads=1), replace(BIG, dim=96, n_heads=6, n_kv_heads=1)),
}


class FirstChannels(nn.Module):
    """RMSNorm' of eq. 10 with the sum over the first d channels alone, for which eq. 11 says it is exact."""

    def __init__(self, norm: nn.RMSNorm, d: int) -> None:
        super().__init__()
        self.norm, self.d = norm, d

    def forward(self, x: Tensor) -> Tensor:
        D = x.shape[-1]
        squares = (
            x[..., : self.d].square().sum(-1, keepdim=True) / D
            + self.norm.eps * self.d / D
        )
        return x * squares.rsqrt() * self.norm.weight


def with_first_channels(model: nn.Module, d: int) -> nn.Module:
    for parent in [*model.layers.values(), model]:
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.RMSNorm):
                setattr(parent, name, FirstChannels(child, d))
    return model


@pytest.mark.parametrize("case", WIDER)
def test_split_preserves_the_function_where_norms_do(case: str) -> None:
    source, target = WIDER[case]
    small = weights(source)
    grown = apply(split_rules(source, target, SEED), small)
    exact = logits(with_first_channels(llama(target, grown), source.dim))
    assert deviation(exact, logits(source, small)) < 1e-5
    broken = grown | {
        "layers.1.attention.wo.weight": grown["layers.1.attention.wo.weight"].roll(
            target.head_dim, 1
        )
    }
    assert (
        deviation(logits(with_first_channels(llama(target, broken), source.dim)), exact)
        > 1e-3
    )


@pytest.mark.parametrize("case", ["twice", "thrice, mha", "kv kept"])
def test_split_to_a_multiple_is_the_source_with_its_norms_scaled(case: str) -> None:
    """The deviation, exactly: with D = n d, every norm returns 1/sqrt(n) of the source's."""
    source, target = WIDER[case]
    small = weights(source)
    grown = logits(target, apply(split_rules(source, target, SEED), small))
    factor = (source.dim / target.dim) ** 0.5
    scaled = {name: w * factor if w.dim() == 1 else w for name, w in small.items()}
    assert deviation(grown, logits(source, scaled)) < 1e-5
    assert deviation(grown, logits(source, small)) > 0.05


@pytest.mark.parametrize("case", ["twice", "thrice, mha", "kv kept"])
def test_split_to_a_multiple_preserves_the_function_where_norms_are_copied(
    case: str,
) -> None:
    """As the official code does it, and as section 5.2 says of the operator."""
    source, target = WIDER[case]
    small = weights(source)
    grown = apply(split_rules(source, target, SEED, norm="copied"), small)
    assert deviation(logits(target, grown), logits(source, small)) < 1e-5
    scaled = apply(split_rules(source, target, SEED), small)
    norms = {name for name, weight in small.items() if weight.dim() == 1}
    assert_same(
        {n: grown[n] for n in grown.keys() - norms},
        {n: scaled[n] for n in scaled.keys() - norms},
    )
    for name in norms:
        assert torch.equal(grown[name], small[name].repeat(target.dim // source.dim)), (
            name
        )


@pytest.mark.parametrize(
    ("case", "low", "high"), [("twice", 0.4, 0.7), ("3/2", 0.3, 0.6)]
)
def test_measured_deviation_of_a_split(case: str, low: float, high: float) -> None:
    source, target = WIDER[case]
    small = weights(source)
    assert (
        low
        < deviation(
            logits(target, apply(split_rules(source, target, SEED), small)),
            logits(source, small),
        )
        < high
    )


REFUSED = [
    ({"n_heads": 4, "n_kv_heads": 2}, "keeps the head width: 16 -> 32 .* use 8 heads"),
    ({"n_heads": 8, "n_kv_heads": 1}, "kv_heads 2 -> 1 must not shrink"),
    (
        {"dim": 48, "n_heads": 3, "n_kv_heads": 3},
        "dim 64 -> 48 must not shrink, n_heads 4 -> 3 must not shrink",
    ),
    ({"n_layers": 6}, "n_layers 3 -> 6 must stay"),
    ({"rope_theta": 5e5}, "rope_theta 10000.0 -> 500000.0 must stay"),
    ({"vocab_size": 98}, "vocab_size 97 -> 98 must stay"),
    ({"ffn_dim": 175}, "ffn_dim 176 -> 175 must not shrink"),
    ({"norm_eps": 5e-6}, "keeps norm_eps: 1e-05, not 5e-06"),
]


@pytest.mark.parametrize(
    ("change", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED]
)
def test_a_width_that_cannot_be_split_is_refused(
    change: dict[str, float], message: str
) -> None:
    with pytest.raises(GrowthError, match=message):
        split_rules(BIG, replace(TWICE, **change), 0)  # type: ignore[arg-type]


def test_too_few_query_heads_per_key_value_head() -> None:
    source = Model(dim=32, n_layers=1, n_heads=8, n_kv_heads=2, ffn_dim=8, vocab_size=5)
    target = replace(source, dim=36, n_heads=9, n_kv_heads=3)
    with pytest.raises(
        GrowthError,
        match=r"3 key/value heads with 3 query heads each .* all 4 .* 12 or more query heads",
    ):
        split_rules(source, target, 0)
    split_rules(source, replace(target, dim=48, n_heads=12), 0)


def test_depth_after_width_gets_a_valid_source() -> None:
    rules = split_rules(BIG, TWICE, 0)
    assert (
        depth_rules([0, 1, 2, 0, 1, 2], TWICE, replace(TWICE, n_layers=6)).source_shapes
        == rules.target_shapes
    )


def rms_split(source: Model, target: Model, moment: Moment | None = None) -> Tensors:
    rules = split_rules(source, target, SEED, moment, norm="copied", shares="rms")
    return apply(rules, weights(source))


@pytest.mark.parametrize("case", CASES)
def test_rms_shares_are_one_factor_for_a_matrix(case: str) -> None:
    """SPARKLING, eqs. 9, 11 and 17: W' = alpha [W, W_copied], with the channels of a split; norms are copied."""
    source, target, _, _ = CASES[case]
    small, channels = weights(source), copied_channels(source, target)
    grown = rms_split(source, target)
    for name, W in small.items():
        copied = W
        for dimension, axis in enumerate(AXES[kind(name)]):
            copied = copied.index_select(dimension, torch.tensor(channels[axis]))
        alpha = 1.0
        if W.dim() == 2 and name != "tok_embeddings.weight":
            c = copied.shape[1] / W.shape[1] - 1
            alpha = 1 / math.sqrt(1 + 3 * c) if c <= 1 else 1 / (1 + c)
        want = (copied.double() * alpha).float()
        assert torch.allclose(grown[name], want, rtol=2e-7, atol=0), name


def test_rms_shares_keep_the_rms_of_what_is_computed() -> None:
    """Of inputs that are independent, as eq. 7 has it, at 1 to 4 times the width: within 2%."""
    rng = torch.Generator().manual_seed(0)
    d = 512
    W = torch.randn(256, d, generator=rng)
    x = torch.randn(d, 256, generator=rng)
    before = (W @ x).square().mean().sqrt().item()
    for D in (d, 640, 768, 1024, 1536, 2048):
        copied = torch.arange(D) % d
        y = rms_factor(d, D) * W[:, copied] @ x[copied]
        assert y.square().mean().sqrt().item() == pytest.approx(before, rel=0.02), D


@pytest.mark.parametrize("factor", [2, 3])
def test_rms_shares_preserve_the_function_at_whole_factors(factor: int) -> None:
    target = replace(
        MHA,
        dim=16 * factor,
        n_heads=4 * factor,
        n_kv_heads=4 * factor,
        ffn_dim=20 * factor,
    )
    grown = rms_split(MHA, target)
    assert deviation(logits(target, grown), logits(MHA, weights(MHA))) < 1e-5


def test_rms_shares_do_not_preserve_the_function_at_others() -> None:
    source, target, _, _ = CASES["mha, 3/2"]
    grown = rms_split(source, target)
    assert deviation(logits(target, grown), logits(source, weights(source))) > 0.01


def test_rms_shares_leave_moments_their_size() -> None:
    """Eq. 24: S' = [S, 0], without the factor; and [S, S] for a copy."""
    source, target, _, _ = CASES["mha, 3/2"]
    small, channels = weights(source), copied_channels(source, target)
    for power in (1, 2):
        copies = rms_split(source, target, Moment(power))
        firsts = rms_split(source, target, Moment(power, asymmetric=True))
        for name, S in small.items():
            wide = S
            for dimension, axis in enumerate(AXES[kind(name)]):
                wide = wide.index_select(dimension, torch.tensor(channels[axis]))
            assert torch.equal(copies[name], wide), name
            kept = tuple(slice(size) for size in S.shape)
            assert torch.equal(firsts[name][kept], S), name
            assert firsts[name].count_nonzero() == S.count_nonzero(), name


def test_rms_shares_are_refused_where_they_are_not_defined() -> None:
    source, target, _, _ = CASES["mha"]
    with pytest.raises(GrowthError, match='give norm = "copied"'):
        split_rules(source, target, SEED, shares="rms")
    split_rules(source, replace(source, ffn_dim=40), SEED, shares="rms")
    tied = (replace(model, tie_embeddings=True) for model in (source, target))
    with pytest.raises(GrowthError, match="tie_embeddings"):
        split_rules(*tied, SEED, norm="copied", shares="rms")
