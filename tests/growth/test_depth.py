import subprocess
import sys
from dataclasses import replace

import pytest

from stackgrow.growth.depth import depth_rules, interleave_map, stack_map
from stackgrow.growth.rules import Alias, GrowthError
from stackgrow.recipe.keys import Model


def llama(n_layers: int) -> Model:
    return Model(
        dim=8, n_layers=n_layers, n_heads=2, n_kv_heads=1, ffn_dim=10, vocab_size=7
    )


def sources(layer_map: list[int], tensor: str) -> list[str]:
    """The source of one tensor of every target layer, in order, for a source of six layers."""
    rules = depth_rules(layer_map, llama(6), llama(len(layer_map)))
    found = [rules.targets[f"layers.{i}.{tensor}"] for i in range(len(layer_map))]
    return [rule.source for rule in found if isinstance(rule, Alias)]


def test_orders_are_those_of_the_definitions() -> None:
    assert stack_map(3, 6) == [0, 1, 2, 0, 1, 2]
    assert stack_map(3, 8) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert stack_map(2, 2) == [0, 1]
    assert interleave_map(3, 6) == [0, 0, 1, 1, 2, 2]
    assert interleave_map(2, 6) == [0, 0, 0, 1, 1, 1]


# Partial stacking, 6 -> 24 layers, in the paper's notation, which counts layers from 1.
PARTIAL = {
    "123456*4": "123456" * 4,
    "12-3456*5-56": "12" + "3456" * 5 + "56",
    "12-345*7-6": "12" + "345" * 7 + "6",
    "123-456*7": "123" + "456" * 7,
    "1-234*7-56": "1" + "234" * 7 + "56",
    "1234-56*10": "1234" + "56" * 10,
    "12-34*10-56": "12" + "34" * 10 + "56",
    "123*7-456": "123" * 7 + "456",
}


@pytest.mark.parametrize("order", PARTIAL.values(), ids=PARTIAL.keys())
def test_explicit_maps_give_partial_stacking(order: str) -> None:
    layer_map = [int(digit) - 1 for digit in order]
    assert len(layer_map) == 24
    for tensor in ("attention.wq.weight", "ffn_norm.weight"):
        assert sources(layer_map, tensor) == [
            f"layers.{int(digit) - 1}.{tensor}" for digit in order
        ]


def test_all_but_the_layers_is_kept() -> None:
    rules = depth_rules(stack_map(6, 12), llama(6), llama(12))
    for name in ("tok_embeddings.weight", "norm.weight", "output.weight"):
        assert rules.targets[name] == Alias(name)
    assert set(rules.targets) == set(llama(12).tensors())
    assert not rules.dropped


def test_layer_numbers_of_two_digits_are_not_confused() -> None:
    rules = depth_rules([11, 1, *range(12)], llama(12), llama(14))
    assert rules.targets["layers.0.attention.wq.weight"] == Alias(
        "layers.11.attention.wq.weight"
    )
    assert rules.targets["layers.1.attention.wq.weight"] == Alias(
        "layers.1.attention.wq.weight"
    )
    assert rules.targets["layers.13.attention.wq.weight"] == Alias(
        "layers.11.attention.wq.weight"
    )


def test_omitted_layers_are_recorded_as_dropped() -> None:
    rules = depth_rules([0, 1, 3, 0, 1, 3], llama(4), llama(6))
    assert rules.dropped == {
        name for name in llama(4).tensors() if name.startswith("layers.2.")
    }
    assert len(rules.dropped) == 9


@pytest.mark.parametrize(
    ("layer_map", "told"),
    [
        ([0, 1, 0], r"has 3 entries and the target model 4 layers"),
        ([0, 1, 2, 0], r"names layers \[2\]; the source model has 0 to 1"),
        ([0, 1, 0, -1], r"names layers \[-1\]"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(layer_map: list[int], told: str) -> None:
    with pytest.raises(GrowthError, match=told):
        depth_rules(layer_map, llama(2), llama(4))


@pytest.mark.parametrize(("n_source", "n_target"), [(0, 4), (4, 2)])
def test_counts_that_do_not_grow_are_refused(n_source: int, n_target: int) -> None:
    for make in (stack_map, interleave_map):
        with pytest.raises(GrowthError, match=f"not {n_source} -> {n_target}"):
            make(n_source, n_target)


def test_interleaving_tells_the_counts_that_work() -> None:
    with pytest.raises(GrowthError, match="use 6 or 9 target layers"):
        interleave_map(3, 8)


@pytest.mark.parametrize(
    "change",
    [
        {"n_heads": 4, "n_kv_heads": 2},
        {"rope_theta": 5e5},
        {"ffn_dim": 12},
        {"vocab_size": 9},
    ],
)
def test_models_that_differ_in_more_than_depth_are_refused(
    change: dict[str, float],
) -> None:
    with pytest.raises(GrowthError, match=f"{next(iter(change))} .* -> "):
        depth_rules(stack_map(2, 4), llama(2), replace(llama(4), **change))


def test_planning_a_growth_does_not_import_torch() -> None:
    code = "import sys, stackgrow.growth.depth; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
