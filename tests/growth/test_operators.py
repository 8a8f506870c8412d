import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from growth_for_tests import (
    apply,
    assert_same,
    deviation,
    logits,
    through_checkpoints,
    weights,
)

from stackgrow.growth import own
from stackgrow.growth.depth import depth_rules, stack_map
from stackgrow.growth.learned import initial_network, learned_rules
from stackgrow.growth.operators import OPERATORS, compose, growth_rules, operator_named
from stackgrow.growth.reference import REFERENCE_FILE, with_operators
from stackgrow.growth.rules import Alias, Compute, GrowthError, Moment
from stackgrow.growth.width import split_rules
from stackgrow.growth.zero import random_depth_rules, zero_depth_rules, zero_width_rules
from stackgrow.recipe import keys
from stackgrow.recipe.keys import Model

SOURCE = Model(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=40, vocab_size=31)
WIDE = replace(SOURCE, dim=64, n_heads=8, n_kv_heads=4, ffn_dim=80)
DEEP = replace(SOURCE, n_layers=4)
LARGE = replace(WIDE, n_layers=4)
TARGETS = {
    "width": (WIDE, None),
    "depth": (DEEP, [0, 1, 0, 1]),
    "both": (LARGE, [0, 1, 0, 1]),
}


def test_the_table_names_the_operators() -> None:
    assert list(OPERATORS) == ["stack", "split", "zero", "random", "learn", "shrink"]
    for name, operator in OPERATORS.items():
        assert operator.name == name


def test_it_is_importable_without_torch() -> None:
    code = "import sys; from stackgrow.growth.operators import OPERATORS; assert 'torch' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2]
    )


@pytest.mark.parametrize("direction", TARGETS)
@pytest.mark.parametrize("name", OPERATORS)
def test_every_claimed_direction_grows_and_no_other(name: str, direction: str) -> None:
    target, layer_map = TARGETS[direction]
    if name == "learn":
        network = initial_network(SOURCE, target, 0)
        rules = growth_rules(name, SOURCE, target, network=network)
        assert_same(
            apply(rules, weights(SOURCE)),
            apply(learned_rules(SOURCE, target, network), weights(SOURCE)),
        )
    elif direction in OPERATORS[name].directions:
        grown = apply(
            growth_rules(name, SOURCE, target, layer_map, seed=3), weights(SOURCE)
        )
        assert {n: tuple(w.shape) for n, w in grown.items()} == target.tensors()
        assert all(w.isfinite().all() for w in grown.values())
    else:
        with pytest.raises(
            GrowthError, match=r"does not grow in|changes n_layers alone"
        ):
            growth_rules(name, SOURCE, target, layer_map)


def test_both_directions_are_width_then_depth() -> None:
    small, layer_map = weights(SOURCE), [0, 1, 0, 1]
    wide = apply(split_rules(SOURCE, WIDE, 3), small)
    want = apply(depth_rules(layer_map, WIDE, LARGE), wide)
    assert_same(
        apply(growth_rules("split", SOURCE, LARGE, layer_map, seed=3), small), want
    )
    wide = apply(zero_width_rules(SOURCE, WIDE, 3, grown=LARGE), small)
    want = apply(zero_depth_rules(layer_map, WIDE, LARGE), wide)
    assert_same(
        apply(growth_rules("zero", SOURCE, LARGE, layer_map, seed=3), small), want
    )


@pytest.mark.parametrize("name", ["zero", "random"])
def test_both_directions_draw_for_the_layers_of_the_grown_model(name: str) -> None:
    """The initialization of w2 is N(0, 1 / (sqrt(d_in) L)) with the target's L, not the source's."""
    wide, deep = (
        replace(SOURCE, dim=128, n_heads=16, n_kv_heads=8, ffn_dim=640),
        replace(SOURCE, n_layers=8),
    )
    target = replace(wide, n_layers=deep.n_layers)
    grown = apply(
        growth_rules(name, SOURCE, target, stack_map(2, 8), seed=3), weights(SOURCE)
    )
    new_rows = grown["layers.0.feed_forward.w2.weight"][SOURCE.dim :, SOURCE.ffn_dim :]
    assert new_rows.std().item() == pytest.approx(640**-0.5 / target.n_layers, rel=0.02)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_both_directions_through_checkpoints(parts: int, tmp_path: Path) -> None:
    small = weights(SOURCE)
    for name in ("split", "zero", "random"):
        rules = growth_rules(name, SOURCE, LARGE, [0, 1, 0, 1], seed=3)
        assert_same(
            through_checkpoints(rules, small, tmp_path / name, parts),
            apply(rules, small),
        )


def test_zero_in_both_directions_preserves_the_function() -> None:
    target, small = replace(LARGE, norm_eps=SOURCE.norm_eps / 2), weights(SOURCE)
    grown = apply(growth_rules("zero", SOURCE, target, [0, 1, 0, 1]), small)
    assert deviation(logits(target, grown), logits(SOURCE, small)) < 1e-5


def test_composition_passes_each_rule_its_own_sources() -> None:
    """Alias of Compute, Compute of Alias, and Compute of two, of which one has two sources itself."""
    names, map_of_two = list(SOURCE.tensors()), [0, 1]
    w, v = "layers.0.ffn_norm.weight", "layers.1.ffn_norm.weight"
    first = depth_rules(map_of_two, SOURCE, SOURCE)
    first = replace(
        first,
        targets={**first.targets, w: Compute((v, w), lambda a, b: b.sub_(a), "minus")},
    )
    second = replace(
        depth_rules(map_of_two, SOURCE, SOURCE),
        targets={n: Alias(n) for n in names}
        | {v: Compute((w, v), lambda a, b: 10 * a + b, "plus")},
    )
    small, rules = weights(SOURCE), compose(first, second)
    grown = apply(rules, small)
    assert torch.equal(grown[w], small[w] - small[v])
    assert torch.equal(grown[v], 10 * (small[w] - small[v]) + small[v])
    assert rules.targets[v].sources == (v, w, v)
    assert rules.targets["norm.weight"] == Alias("norm.weight")
    assert not rules.dropped


def test_composition_drops_what_neither_uses() -> None:
    rules = compose(split_rules(SOURCE, WIDE, 0), depth_rules([0, 0], WIDE, WIDE))
    assert rules.dropped == {
        name for name in SOURCE.tensors() if name.startswith("layers.1.")
    }


def test_seeds_reach_the_operators() -> None:
    for name in ("split", "zero", "random"):
        one, other = (
            apply(growth_rules(name, SOURCE, WIDE, seed=s), weights(SOURCE))
            for s in (1, 2)
        )
        assert not torch.equal(
            one["layers.0.attention.wq.weight"], other["layers.0.attention.wq.weight"]
        )
    deep = apply(
        growth_rules("random", SOURCE, DEEP, stack_map(2, 4), seed=2), weights(SOURCE)
    )
    assert_same(
        deep,
        apply(random_depth_rules(stack_map(2, 4), SOURCE, DEEP, 2), weights(SOURCE)),
    )


REFUSED = [
    (
        "stak",
        WIDE,
        None,
        "no growth operator 'stak': the operators are stack, split, zero, random, learn, shrink",
    ),
    (
        "stack",
        WIDE,
        None,
        "'stack' does not grow in width: use split, zero, random, learn, shrink",
    ),
    (
        "stack",
        LARGE,
        [0, 1, 0, 1],
        "depth growth changes n_layers alone, but the models differ in dim 32 -> 64",
    ),
    (
        "split",
        DEEP,
        [0, 1, 0, 1],
        "'split' does not grow in depth: use stack, zero, random, learn",
    ),
    ("zero", LARGE, None, "n_layers 2 -> 4 must stay"),
    ("learn", WIDE, None, "takes a trained network"),
]


@pytest.mark.parametrize(
    ("name", "target", "layer_map", "message"),
    REFUSED,
    ids=[row[3][:25] for row in REFUSED],
)
def test_an_undefined_growth_is_refused(
    name: str, target: Model, layer_map: list[int] | None, message: str
) -> None:
    with pytest.raises(GrowthError, match=message):
        growth_rules(name, SOURCE, target, layer_map)


def test_the_recipes_names_are_those_of_the_table() -> None:
    """recipe/ must not know growth/, so that the names alone stand there too, for the schema."""
    assert tuple(OPERATORS) == keys.OPERATORS


def test_keys_of_operators_are_keys_of_a_growth() -> None:
    known = {spec.name for spec in fields(keys.Growth)}
    train, parallel = (
        {spec.name for spec in fields(table)} for table in (keys.Train, keys.Parallel)
    )
    for operator in OPERATORS.values():
        assert operator.keys | set(operator.refuses) <= known
        for limit in operator.forbids:
            table, _, name = limit.key.rpartition(".")
            assert name in (parallel if table else train)


def test_the_table_in_the_readme_is_fresh() -> None:
    readme = REFERENCE_FILE.read_text(encoding="utf-8")
    assert with_operators(readme) == readme, "run `make schema`"


def test_an_unknown_operator_is_told_the_nearest_name() -> None:
    with pytest.raises(GrowthError, match="did you mean 'stack'"):
        operator_named("stak")


OWN = """
from stackgrow.growth.depth import depth_rules

def stacked(layer_map, source, target):
    return depth_rules(layer_map, source, target)

def with_moments(layer_map, source, target, moment):
    return depth_rules(layer_map, source, target)

def asks_too_much(layer_map, model):
    return None

def gives_nothing(source):
    return None

number = 3
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Found in the working directory, and of another name each time, since Python keeps modules."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(own, "_trusted", False)
    return name


def test_an_operator_of_ones_own_is_not_imported_without_trust(own_module: str) -> None:
    assert operator_named(f"{own_module}:stacked").directions == (
        "depth",
        "width",
        "both",
    )
    with pytest.raises(own.TrustError, match="only with --trust"):
        growth_rules(f"{own_module}:stacked", SOURCE, DEEP, (0, 1, 0, 1))
    assert own_module not in sys.modules


def test_an_operator_of_ones_own_makes_the_rules(own_module: str) -> None:
    own.trust()
    rules = growth_rules(f"{own_module}:stacked", SOURCE, DEEP, (0, 1, 0, 1))
    assert rules == depth_rules((0, 1, 0, 1), SOURCE, DEEP)
    assert (
        growth_rules(
            f"{own_module}:with_moments", SOURCE, DEEP, (0, 1, 0, 1), moment=Moment(2)
        )
        == rules
    )


@pytest.mark.parametrize(
    ("function", "moment", "message"),
    [
        ("stacked", Moment(1), 'no parameter "moment"'),
        (
            "asks_too_much",
            None,
            "asks for model; its parameters can be source, target, layer_map, seed, moment",
        ),
        ("gives_nothing", None, "gave NoneType, not"),
        ("number", None, "is no function"),
        (
            "missing",
            None,
            "cannot be loaded: module 'own_.*' has no attribute 'missing'",
        ),
    ],
)
def test_an_operator_that_is_none_is_told_why(
    own_module: str, function: str, moment: Moment | None, message: str
) -> None:
    own.trust()
    with pytest.raises(GrowthError, match=message):
        growth_rules(
            f"{own_module}:{function}", SOURCE, DEEP, (0, 1, 0, 1), moment=moment
        )
