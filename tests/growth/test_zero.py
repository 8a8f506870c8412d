import math
from collections.abc import Callable
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

from stackgrow.growth.depth import stack_map
from stackgrow.growth.draw import draw, generator
from stackgrow.growth.rules import Alias, GrowthError
from stackgrow.growth.zero import (
    new_layers,
    new_outputs,
    random_depth_rules,
    random_width_rules,
    zero_depth_rules,
    zero_width_rules,
)
from stackgrow.recipe.keys import Model

MHA = Model(dim=32, n_layers=2, n_heads=4, ffn_dim=40, vocab_size=31)
GQA = replace(MHA, n_kv_heads=2)
WIDE_MHA = replace(MHA, dim=64, n_heads=8, n_kv_heads=8, ffn_dim=80)
# Source, target, and by hand: the target head of each source head, the target key/value head of each source one, and
# the target heads that are new but share an old key/value head.
CASES = {
    "mha": (MHA, WIDE_MHA, [0, 1, 2, 3], [0, 1, 2, 3], []),
    "mha, 3/2": (MHA, replace(MHA, dim=48, n_heads=6, n_kv_heads=6, ffn_dim=41), [0, 1, 2, 3], [0, 1, 2, 3], []),
    "mha to gqa": (MHA, replace(MHA, dim=64, n_heads=8, n_kv_heads=4), [0, 2, 4, 6], [0, 1, 2, 3], [1, 3, 5, 7]),
    "gqa": (GQA, replace(GQA, dim=64, n_heads=8, n_kv_heads=4, ffn_dim=80), [0, 1, 2, 3], [0, 1], []),
    "gqa, kv kept": (GQA, replace(GQA, dim=64, n_heads=8), [0, 1, 4, 5], [0, 1], [2, 3, 6, 7]),
    "gqa, wider heads": (GQA, replace(GQA, dim=64, ffn_dim=80), [0, 1, 2, 3], [0, 1], []),
    "wider and more heads": (GQA, replace(GQA, dim=192, n_heads=6, n_kv_heads=3), [0, 1, 2, 3], [0, 1], []),
    "ffn alone": (GQA, replace(GQA, ffn_dim=47), [0, 1, 2, 3], [0, 1], []),
    "torchtitan init": (replace(MHA, init="torchtitan"), replace(WIDE_MHA, init="torchtitan"), [0, 1, 2, 3], [0, 1, 2, 3], []),
}  # fmt: skip
BOTH: dict[str, Callable] = {"zero": zero_width_rules, "random": random_width_rules}
SEED = 9


def exact_eps(source: Model, target: Model) -> Model:
    return replace(target, norm_eps=source.norm_eps * source.dim / target.dim)


def places(case: str) -> dict[str, list[int]]:
    """Where each source channel goes. In a head n times as wide, pair p goes to pair n p."""
    source, target, heads, groups, _ = CASES[case]
    n = target.head_dim // source.head_dim
    inside = [2 * n * p + b for p in range(source.head_dim // 2) for b in (0, 1)]
    return {
        "stream": list(range(source.dim)),
        "ffn": list(range(source.ffn_dim)),
        "query": [h * target.head_dim + c for h in heads for c in inside],
        "key": [g * target.head_dim + c for g in groups for c in inside],
        "vocab": list(range(source.vocab_size)),
    }


def embed(places: list[int], n: int) -> Tensor:
    """[n, sources]: column i is the unit vector of its place."""
    return torch.eye(n, dtype=torch.float64)[:, places]


def dense_padded(case: str, small: Tensors, operator: str) -> dict[str, Tensor]:
    """Eqs. 12-33 with matrices in float64, rounded once: W' = P_out W P_in^T + N, where N is the fresh target less
    what the operator takes from it. The fresh target comes from the library: it is random."""
    source, target, _, _, sharing = CASES[case]
    sides = {"tok_embeddings": ("vocab", "stream"), "wq": ("query", "stream"), "wk": ("key", "stream"),
             "wv": ("key", "stream"), "wo": ("stream", "query"), "w1": ("ffn", "stream"), "w2": ("stream", "ffn"),
             "w3": ("ffn", "stream"), "output": ("vocab", "stream")}  # fmt: skip
    place, grown = places(case), {}
    for name, shape in target.tensors().items():
        W, short = small[name].double(), name.split(".")[-2]
        if shape == tuple(W.shape):
            grown[name] = small[name]
            continue
        N = (
            draw(name, shape, target, generator(SEED, "new", name))
            .to(small[name].dtype)
            .double()
        )
        if "norm" in short:
            P = embed(place["stream"], target.dim)
            result = (
                P @ (W * (math.sqrt(source.dim) / math.sqrt(target.dim)))
                + (1 - P.sum(1)) * N
            )
        else:
            out, into = (
                embed(place[side], shape[i]) for i, side in enumerate(sides[short])
            )
            old_rows, old_columns = out.sum(1, keepdim=True), into.sum(1)
            if operator == "zero":
                N = N * (1 - old_columns) if short != "tok_embeddings" else N * 0
            if short == "wo":
                heads = torch.ones(target.n_heads, dtype=torch.float64)
                heads[sharing] = 0
                N = N * heads.repeat_interleave(target.head_dim)
            if short == "wq":
                W = W * math.sqrt(target.head_dim / source.head_dim)
            result = out @ W @ into.T + N * (1 - old_rows * old_columns)
        grown[name] = result.to(small[name].dtype)
    return grown


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operator", BOTH)
@pytest.mark.parametrize("case", CASES)
def test_width_equals_the_equations_bit_for_bit(
    case: str, operator: str, dtype: torch.dtype
) -> None:
    source, target = CASES[case][:2]
    small = weights(source, dtype)
    rules = BOTH[operator](source, target, SEED)
    assert_same(apply(rules, small), dense_padded(case, small, operator))


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("operator", BOTH)
@pytest.mark.parametrize("case", ["mha", "gqa"])
def test_width_through_checkpoints(
    case: str, operator: str, parts: int, tmp_path: Path
) -> None:
    source, target = CASES[case][:2]
    small = weights(source)
    grown = through_checkpoints(
        BOTH[operator](source, target, SEED), small, tmp_path, parts
    )
    assert_same(grown, dense_padded(case, small, operator))


def test_blocks_are_those_of_equations_14_and_23() -> None:
    """[[W, A], [0, C]] and [[W, A], [B, C]], read off where the source's rows and columns come first."""
    small = weights(MHA)
    zero = apply(zero_width_rules(MHA, WIDE_MHA, SEED), small)
    random = apply(random_width_rules(MHA, WIDE_MHA, SEED), small)
    for name, W in small.items():
        if W.dim() == 1:
            assert torch.equal(random[name][len(W) :], torch.ones(len(W)))
            assert torch.equal(random[name], zero[name])
            continue
        rows, columns = W.shape
        for grown in (zero[name], random[name]):
            assert torch.equal(grown[:rows, :columns], W)
        assert (random[name] != 0).all()
        assert (zero[name][rows:, :columns] == 0).all()
        A, C = zero[name][:rows, columns:], zero[name][rows:, columns:]
        assert (A == 0).all() if name == "tok_embeddings.weight" else (A != 0).all()
        assert (C != 0).all()


def masked(model: nn.Module, masks: Tensors) -> nn.Module:
    """c = 0: the masked outputs are zero."""
    for name, mask in masks.items():
        model.get_submodule(name.removesuffix(".weight")).register_forward_hook(
            lambda m, x, y, mask=mask: y * ~mask
        )
    return model


@pytest.mark.parametrize("case", CASES)
def test_zero_width_preserves_the_function(case: str) -> None:
    source, target = CASES[case][0], exact_eps(*CASES[case][:2])
    small = weights(source)
    grown = apply(zero_width_rules(source, target, SEED), small)
    before = logits(source, small)
    assert deviation(logits(target, grown), before) < 1e-5
    broken = grown | {
        "layers.1.attention.wq.weight": grown["layers.1.attention.wq.weight"].roll(2, 0)
    }
    assert deviation(logits(target, broken), before) > 1e-4


@pytest.mark.parametrize("case", CASES)
def test_random_width_with_mask_zero_preserves_the_function(case: str) -> None:
    source, target = CASES[case][0], exact_eps(*CASES[case][:2])
    small = weights(source)
    grown, before = (
        apply(random_width_rules(source, target, SEED), small),
        logits(source, small),
    )
    masks = new_outputs(source, target)
    assert deviation(logits(masked(llama(target, grown), masks)), before) < 1e-5
    assert deviation(logits(target, grown), before) > 1e-2, "not masked"
    for kind in ("wv", "w2", "wo"):
        name = (
            f"layers.0.{'feed_forward' if kind == 'w2' else 'attention'}.{kind}.weight"
        )
        if name in masks:
            one_less = {n: mask for n, mask in masks.items() if n != name}
            assert (
                deviation(logits(masked(llama(target, grown), one_less)), before) > 1e-4
            ), name


@pytest.mark.parametrize("case", CASES)
def test_new_outputs_are_all_but_the_old(case: str) -> None:
    source, target = CASES[case][:2]
    place, masks = places(case), new_outputs(source, target)
    sides = {"tok_embeddings": "stream", "wq": "query", "wk": "key", "wv": "key", "wo": "stream", "w1": "ffn",
             "w2": "stream", "w3": "ffn"}  # fmt: skip
    for name, shape in target.tensors().items():
        short = name.split(".")[-2]
        if len(shape) == 1 or short == "output":
            assert name not in masks
            continue
        old, n = place[sides[short]], shape[1 if short == "tok_embeddings" else 0]
        new = sorted(set(range(n)) - set(old))
        assert (
            masks[name].nonzero().flatten().tolist() if name in masks else []
        ) == new


def test_an_unscaled_epsilon_is_why_the_paper_is_not_exact() -> None:
    """A padded x meets eps D / d: the deviation is of the order of eps / mean(x^2), and grows with eps."""
    source, target = CASES["gqa"][:2]
    small = weights(source)
    found = []
    for eps in (1e-5, 1e-4):
        narrow, wide = replace(source, norm_eps=eps), replace(target, norm_eps=eps)
        grown = logits(wide, apply(zero_width_rules(narrow, wide, SEED), small))
        found.append(deviation(grown, logits(narrow, small)))
    assert 5e-5 < found[0] < found[1] / 5


def test_wider_heads_need_their_scale_and_their_places() -> None:
    """Without sqrt(n) on W_Q, or with the old pairs first in the head, the scores are others."""
    source, target = (
        CASES["gqa, wider heads"][0],
        exact_eps(*CASES["gqa, wider heads"][:2]),
    )
    small = weights(source)
    grown, before = (
        apply(zero_width_rules(source, target, SEED), small),
        logits(source, small),
    )
    unscaled = {
        n: w / math.sqrt(2) if n.endswith("wq.weight") else w for n, w in grown.items()
    }
    assert deviation(logits(target, unscaled), before) > 1e-3
    pairs = [c for p in range(target.head_dim // 2) for c in (2 * p, 2 * p + 1)]
    first = [c for c in pairs if c // 2 % 2 == 0] + [c for c in pairs if c // 2 % 2]
    moved = {
        n: w.view(-1, target.head_dim, w.shape[1])[:, first].reshape(w.shape)
        if n.endswith(("wq.weight", "wk.weight"))
        else w
        for n, w in grown.items()
    }
    assert deviation(logits(target, moved), before) > 1e-3


def test_zero_width_learns_in_all_its_parts() -> None:
    """New outputs are zero only at first: after three steps without weight decay, every new entry has moved."""
    source, target = CASES["gqa, kv kept"][:2]
    before = apply(zero_width_rules(source, target, SEED), weights(source))
    model = llama(target, before)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    tokens = torch.arange(2 * 32).view(2, 32) % target.vocab_size  # every token occurs
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(
            model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten()
        ).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert (parameter != before[name]).float().mean() > 0.99, name


# Depth. The source has layers 0 to 1; a new layer is any later copy.
MAPS = {
    "stack": [0, 1, 0, 1, 0, 1],
    "interleave": [0, 0, 1, 1],
    "uneven": [0, 1, 1],
    "one": [0, 1, 0],
}
NEW = {"stack": [2, 3, 4, 5], "interleave": [1, 3], "uneven": [2], "one": [2]}


@pytest.mark.parametrize("order", MAPS)
def test_zero_depth_is_a_copy_with_zero_outputs(order: str, tmp_path: Path) -> None:
    target = replace(GQA, n_layers=len(MAPS[order]))
    small = weights(GQA)
    rules = zero_depth_rules(MAPS[order], GQA, target)
    want = {}
    for name in target.tensors():
        parts = name.split(".")
        copied = (
            ".".join(["layers", str(MAPS[order][int(parts[1])]), *parts[2:]])
            if parts[0] == "layers"
            else name
        )
        silent = parts[-2] in ("wo", "w2") and int(parts[1]) in NEW[order]
        want[name] = torch.zeros_like(small[copied]) if silent else small[copied]
    assert sum((w == 0).all().item() for w in want.values()) == 2 * len(NEW[order])
    assert_same(apply(rules, small), want)
    assert sum(
        not isinstance(rule, Alias) for rule in rules.targets.values()
    ) == 2 * len(NEW[order])
    assert_same(through_checkpoints(rules, small, tmp_path, 2), want)
    assert deviation(logits(target, want), logits(GQA, small)) < 1e-5


@pytest.mark.parametrize("order", MAPS)
def test_random_depth_with_masked_blocks_preserves_the_function(
    order: str, tmp_path: Path
) -> None:
    target = replace(GQA, n_layers=len(MAPS[order]))
    small = weights(GQA)
    rules = random_depth_rules(MAPS[order], GQA, target, SEED)
    grown = apply(rules, small)
    for parts in (1, 2, 4):
        assert_same(through_checkpoints(rules, small, tmp_path, parts), grown)
    model, before = llama(target, grown), logits(GQA, small)
    assert deviation(logits(model), before) > 1e-2, "not masked"
    assert new_layers(MAPS[order], 2) == NEW[order]
    for layer in NEW[order]:
        for block in (
            model.layers[str(layer)].attention,
            model.layers[str(layer)].feed_forward,
        ):
            block.register_forward_hook(lambda m, x, y: 0 * y)
    assert deviation(logits(model), before) < 1e-5
    for i, layer in enumerate(MAPS[order]):
        for tensor in GQA.layer_tensors():
            same = torch.equal(
                grown[f"layers.{i}.{tensor}"], small[f"layers.{layer}.{tensor}"]
            )
            assert same == (i not in NEW[order]), (i, tensor)


def test_random_layers_have_the_initial_distribution() -> None:
    source = Model(dim=128, n_layers=1, n_heads=4, ffn_dim=352, vocab_size=8)
    target = replace(source, n_layers=3)
    grown = apply(
        random_depth_rules(stack_map(1, 3), source, target, SEED), weights(source)
    )
    for tensor, shape in source.layer_tensors().items():
        w, other = grown[f"layers.1.{tensor}"], grown[f"layers.2.{tensor}"]
        if len(shape) == 1:
            assert torch.equal(w, torch.ones(shape))
            continue
        std = (
            1 / (shape[1] ** 0.5 * 3)
            if tensor.endswith("w2.weight")
            else (2 / (5 * shape[1])) ** 0.5
        )
        assert abs(w.std().item() / std - 1) < 6 / (2 * w.numel()) ** 0.5, tensor
        assert abs((w * other).mean().item()) < 6 * std**2 / w.numel() ** 0.5, (
            "layers are independent"
        )


def test_new_weights_are_not_the_initialization_of_the_run() -> None:
    """The base model may have been drawn with the same seed: the new weights must not repeat its numbers."""
    shape = WIDE_MHA.tensors()["layers.0.attention.wq.weight"]
    initial = draw(
        "layers.0.attention.wq.weight",
        shape,
        WIDE_MHA,
        generator(SEED, "layers.0.attention.wq.weight"),
    )
    grown = apply(random_width_rules(MHA, WIDE_MHA, SEED), weights(MHA))[
        "layers.0.attention.wq.weight"
    ]
    assert not torch.isin(grown, initial).any()
    again, other = (
        apply(random_width_rules(MHA, WIDE_MHA, s), weights(MHA))
        for s in (SEED, SEED + 1)
    )
    assert torch.equal(again["layers.0.attention.wq.weight"], grown)
    assert not torch.equal(other["layers.0.attention.wq.weight"], grown)


REFUSED = [
    (
        {"dim": 56, "n_heads": 4, "n_kv_heads": 2},
        r"head width 8 -> 14 is no whole factor.* use 7 heads of 8",
    ),
    (
        {"n_heads": 8, "n_kv_heads": 8},
        r"1 query heads per key/value head cannot hold the 2 .* use 4 key/value heads or fewer",
    ),
    ({"n_heads": 16, "n_kv_heads": 8}, "head_dim 8 -> 4 must not shrink"),
    ({"norm_eps": 1e-4}, r"norm_eps 1e-05 -> 0.0001: keep it.* exactly with 5e-06"),
    ({"n_layers": 4}, "n_layers 2 -> 4 must stay"),
]


@pytest.mark.parametrize("operator", BOTH)
@pytest.mark.parametrize(
    ("change", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED]
)
def test_width_refuses_what_cannot_preserve_the_function(
    change: dict[str, float], message: str, operator: str
) -> None:
    target = replace(GQA, dim=64, n_heads=8, n_kv_heads=4)
    with pytest.raises(GrowthError, match=message):
        BOTH[operator](GQA, replace(target, **change), 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("layer_map", [[1, 0, 1], [0, 0], [1, 0]])
def test_depth_refuses_maps_that_cannot_preserve_the_function(
    layer_map: list[int],
) -> None:
    target = replace(GQA, n_layers=len(layer_map))
    for rules in (
        lambda: zero_depth_rules(layer_map, GQA, target),
        lambda: random_depth_rules(layer_map, GQA, target, 0),
    ):
        with pytest.raises(
            GrowthError, match="must name the source layers 0 to 1 in order"
        ):
            rules()
