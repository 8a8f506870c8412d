"""Every operator on a tiny model of every family, tied and untied: what it makes, and whether it keeps the function."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families_for_tests import COMPILED, RUNS, TINY, tiny
from growth_for_tests import apply, assert_same, deviation, llama, logits, weights
from torch import Tensor

from stackgrow.growth.depth import depth_rules, stack_map
from stackgrow.growth.learned import (
    HyperNetwork,
    initial_network,
    learned_rules,
    with_output,
)
from stackgrow.growth.moments import POWERS, with_moments
from stackgrow.growth.operators import OPERATORS, growth_rules
from stackgrow.growth.rules import GrowthError, Moment
from stackgrow.growth.width import split_rules
from stackgrow.growth.zero import zero_width_rules
from stackgrow.plan.stages import GrowthMask
from stackgrow.recipe.families import FAMILIES
from stackgrow.recipe.keys import Model
from stackgrow.recipe.values import Duration

README = Path(__file__).parents[2] / "README.md"
LAYERS = [0, 1, 0, 1]
ROUNDING = 1e-5  # of the largest logit: float32 through the layers
UNTIED = [case for case, model in TINY.items() if not model.tie_embeddings]
TIED = [case for case, model in TINY.items() if model.tie_embeddings]


def deeper(model: Model) -> Model:
    return replace(model, n_layers=len(LAYERS))


def wider(model: Model) -> Model:
    return replace(model, dim=96, n_heads=8, n_kv_heads=4, ffn_dim=176)


def masked_logits(
    source: Model, target: Model, layer_map: list[int] | None, state: dict[str, Tensor]
) -> Tensor:
    """Of a model grown by "random", with the mask still at 0."""
    import stackgrow.titan  # noqa: F401  (the device comes before torchtitan)
    from stackgrow.titan.model import Llama, model_args

    ramp = Duration(10, "steps")
    map_ = tuple(layer_map) if layer_map else None
    args = model_args(target, 0, mask=GrowthMask(source, map_, ramp))
    args.max_seq_len = 32
    built = Llama(args)
    built.load_state_dict(state, strict=True)
    built.set_mask(0.0)
    return logits(built)


@pytest.mark.parametrize("case", TINY)
def test_stack_copies_every_tensor_of_a_layer(case: str) -> None:
    model = TINY[case]
    small = weights(model)
    grown = apply(growth_rules("stack", model, deeper(model), LAYERS), small)
    assert grown.keys() == deeper(model).tensors().keys()
    for index, layer in enumerate(LAYERS):
        for name in model.layer_tensors():
            want = small[f"layers.{layer}.{name}"]
            assert torch.equal(grown[f"layers.{index}.{name}"], want)


@pytest.mark.parametrize("case", TINY)
def test_zero_keeps_the_function_in_depth(case: str) -> None:
    model = TINY[case]
    small = weights(model)
    grown = apply(growth_rules("zero", model, deeper(model), LAYERS), small)
    assert deviation(logits(deeper(model), grown), logits(model, small)) < ROUNDING


@pytest.mark.parametrize("case", TINY)
def test_random_keeps_the_function_in_depth_while_its_mask_is_0(case: str) -> None:
    model = TINY[case]
    small = weights(model)
    grown = apply(growth_rules("random", model, deeper(model), LAYERS, 3), small)
    found = masked_logits(model, deeper(model), LAYERS, grown)
    assert deviation(found, logits(model, small)) < ROUNDING
    assert deviation(logits(deeper(model), grown), logits(model, small)) > 1e-3


@pytest.mark.parametrize("case", TINY)
def test_split_keeps_the_function_at_a_whole_factor(case: str) -> None:
    model = TINY[case]
    small = weights(model)
    grown = apply(split_rules(model, wider(model), 5, norm="copied"), small)
    assert deviation(logits(wider(model), grown), logits(model, small)) < ROUNDING


@pytest.mark.parametrize("case", TINY)
def test_zero_keeps_the_function_in_width(case: str) -> None:
    model = TINY[case]
    target = replace(wider(model), norm_eps=model.norm_eps / 2)
    small = weights(model)
    grown = apply(zero_width_rules(model, target, 5), small)
    assert deviation(logits(target, grown), logits(model, small)) < ROUNDING


@pytest.mark.parametrize("case", UNTIED)
def test_random_keeps_the_function_in_width_while_its_mask_is_0(case: str) -> None:
    model = TINY[case]
    target = replace(wider(model), norm_eps=model.norm_eps / 2)
    small = weights(model)
    grown = apply(growth_rules("random", model, target, None, 3), small)
    found = masked_logits(model, target, None, grown)
    assert deviation(found, logits(model, small)) < ROUNDING


@pytest.mark.parametrize("case", TIED)
def test_random_does_not_widen_a_tied_model(case: str) -> None:
    model = TINY[case]
    with pytest.raises(GrowthError, match="which are the same numbers"):
        growth_rules("random", model, wider(model), None, 3)


@pytest.mark.parametrize("case", TIED)
def test_the_last_norm_takes_the_shares_of_a_tied_head(case: str) -> None:
    """Copies of a channel add up to the channel; the matrix itself is copied for the embedding."""
    model = TINY[case]
    small = weights(model)
    grown = apply(split_rules(model, wider(model), 5, norm="copied"), small)
    copied = small["tok_embeddings.weight"].repeat(1, 2)
    assert torch.equal(grown["tok_embeddings.weight"], copied)
    halves = grown["norm.weight"].view(2, model.dim)
    assert torch.allclose(halves.sum(0), small["norm.weight"], rtol=1e-6)
    assert (halves[0] != halves[1]).any(), "uneven, as the shares of a matrix are"


@pytest.mark.parametrize("case", [case for case in TINY if "qwen2" in case])
def test_biases_go_with_their_heads(case: str) -> None:
    model = TINY[case]
    target = wider(model)
    small = weights(model)
    split = apply(split_rules(model, target, 5), small)
    padded = apply(zero_width_rules(model, target, 5), small)
    for name in ("wq", "wk", "wv"):
        bias = f"layers.1.attention.{name}.bias"
        assert torch.equal(split[bias], small[bias].repeat(2)), "heads in turn"
        assert torch.equal(padded[bias][: len(small[bias])], small[bias])
        assert not padded[bias][len(small[bias]) :].any()


@pytest.mark.parametrize("case", [case for case in TINY if "qwen3" in case])
@pytest.mark.parametrize("operator", ["split", "zero", "shrink"])
def test_norms_of_queries_and_keys_stay_in_width(case: str, operator: str) -> None:
    model = TINY[case]
    small = weights(model)
    grown = apply(growth_rules(operator, model, wider(model), None, 3), small)
    for layer in range(model.n_layers):
        for name in ("q_norm", "k_norm"):
            norm = f"layers.{layer}.attention.{name}.weight"
            assert torch.equal(grown[norm], small[norm])


@pytest.mark.parametrize("operator", ["split", "zero", "random", "learn", "shrink"])
def test_a_head_under_a_norm_does_not_get_wider(operator: str) -> None:
    model = tiny("llama2", qk_norm=True)
    target = replace(model, dim=96, ffn_dim=176)
    network = HyperNetwork({}, {})
    with pytest.raises(GrowthError, match="must stay where qk_norm takes a norm"):
        growth_rules(operator, model, target, None, 3, network)


@pytest.mark.parametrize("case", TINY)
def test_untrained_maps_of_depth_are_a_stack(case: str) -> None:
    model = TINY[case]
    target = deeper(model)
    small = weights(model)
    network = initial_network(model, target, seed=1)
    learned = apply(learned_rules(model, target, network), small)
    stacked = depth_rules(stack_map(2, 4), model, target)
    assert_same(learned, apply(stacked, small))


@pytest.mark.parametrize("case", TINY)
def test_maps_of_widths_are_the_products_of_the_paper(case: str) -> None:
    """W' = B_out W B_in^T; of a tied matrix once, for a head's B_in is the embedding's B_out. Norms of heads stay."""
    model = TINY[case]
    target = wider(model)
    small = weights(model)
    network = initial_network(model, target, seed=1)
    B = {name: matrix.double() for name, matrix in network.widths.items()}
    B = with_output(B, model, target)
    grown = apply(learned_rules(model, target, network), small)
    assert grown.keys() == target.tensors().keys()
    sides = {
        "tok_embeddings.weight": (None, "emb"),
        "layers.1.attention.wq.weight": ("q", "emb"),
        "layers.1.attention.wo.weight": ("emb", "o"),
        "layers.1.feed_forward.w2.weight": ("emb", "mlp"),
        "layers.1.attention.wq.bias": ("q", None),
        "layers.1.attention.wv.bias": ("v", None),
        "layers.1.attention.q_norm.weight": (None, None),
        "norm.weight": ("emb", None),
        "output.weight": (None, "emb"),
    }
    for name in sides.keys() & small.keys():
        outer, inner = sides[name]
        want = small[name].double()
        if inner:
            want = want @ B[inner].T
        if outer:
            want = B[outer] @ want
        assert torch.equal(grown[name], want.float()), name


@pytest.mark.parametrize("operator", ["split", "zero", "shrink"])
@pytest.mark.parametrize("case", TINY)
def test_moments_follow_the_same_map(case: str, operator: str) -> None:
    """exp_avg by its coefficients, exp_avg_sq by their squares: 0 where an entry copies nothing."""
    model = TINY[case]
    target = wider(model)

    def rules_of(moment: Moment | None) -> object:
        return growth_rules(operator, model, target, None, 3, moment=moment)

    with_moments(rules_of, asymmetric=False)  # type: ignore[arg-type]  # every tensor has its state: else an error
    ones = {name: torch.ones(shape) for name, shape in model.tensors().items()}
    zeros = {name: torch.zeros(shape) for name, shape in model.tensors().items()}
    weights_of_ones = apply(rules_of(None), ones)  # type: ignore[arg-type]
    weights_of_zeros = apply(rules_of(None), zeros)  # type: ignore[arg-type]
    for state in ("exp_avg", "exp_avg_sq"):
        power = POWERS[state]
        found = apply(rules_of(Moment(power)), ones)  # type: ignore[arg-type]
        for name in target.tensors():
            coefficient = weights_of_ones[name] - weights_of_zeros[name]
            assert torch.allclose(found[name], coefficient**power, atol=1e-6), name


@pytest.mark.parametrize("change", [{"tie_embeddings": True}, {"attention_bias": True}])
def test_growth_changes_no_part_of_the_family(change: dict[str, bool]) -> None:
    model = TINY["llama2"]
    with pytest.raises(GrowthError, match=f"{next(iter(change))} False -> True"):
        growth_rules("stack", model, replace(deeper(model), **change), LAYERS)
    with pytest.raises(GrowthError, match=f"{next(iter(change))} False -> True"):
        growth_rules("split", model, replace(wider(model), **change))


def directions(model: Model, operator: str) -> str:
    """In which an operator grows a model of this family, as the rules themselves say."""
    found = []
    for direction, target in (("depth", deeper(model)), ("width", wider(model))):
        layer_map = LAYERS if direction == "depth" and operator != "learn" else None
        try:
            network = None
            if operator == "learn":
                network = initial_network(model, target, 0)
            growth_rules(operator, model, target, layer_map, 0, network)
            found.append(direction)
        except GrowthError:
            pass
    return ", ".join(found)


def yes(name: str, tested: set[str]) -> str:
    return "yes" if name in tested else "no"


def family_table() -> str:
    """Every cell is a test that runs over families_for_tests.py: operators here; train, ranks and compile in tests/e2e
    and tests/titan; import and export in tests/checkpoint."""
    trained = {"llama2"}
    for family_key, *_ in RUNS.values():
        trained.add(family_key.removeprefix("model.family="))
    compiled = {TINY[case].family for case in COMPILED}
    tiny_models = {model.family for model in TINY.values()}

    columns = ["train", *OPERATORS, "import, export", "FSDP, HSDP, TP", "compile"]
    lines = [
        f"| family | models | {' | '.join(columns)} |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for name, family in FAMILIES.items():
        cells = [f"`{name}`", family.models, yes(name, trained)]
        cells += [directions(TINY[name], operator) for operator in OPERATORS]
        cells.append(yes(name, tiny_models))
        cells.append(yes(name, trained & tiny_models))
        cells.append(yes(name, compiled))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_readme_has_the_table_of_families() -> None:
    assert {model.family for model in TINY.values()} == FAMILIES.keys()
    assert family_table() in README.read_text(encoding="utf-8"), family_table()


def test_unscaled_frequencies_would_give_other_logits() -> None:
    """What the tests of scaled families would not see otherwise."""
    model = TINY["llama3"]
    state = weights(model)
    unscaled = llama(replace(model, rope_scaling=None), state)
    assert deviation(logits(unscaled), logits(model, state)) > 1e-3
