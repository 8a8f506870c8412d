"""A rate of its own for what a growth made new: each entry is trained as by an AdamW that had it alone (SPARKLING)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from stackgrow.plan.stages import GrowStage
from stackgrow.recipe.keys import Model
from stackgrow.titan.model import Llama, model_args
from stackgrow.titan.new_rate import NewParameters

SOURCE = Model(
    family="llama2", dim=32, n_layers=2, n_heads=4, ffn_dim=48, vocab_size=61
)
WIDE = replace(SOURCE, dim=64, n_heads=8, n_kv_heads=8, ffn_dim=96)
DEEP = replace(SOURCE, n_layers=4)
MAPS = {"stacked": (0, 1, 0, 1), "in place": (0, 0, 1, 1)}


def build(model: Model) -> Llama:
    args = model_args(model, 11)
    args.max_seq_len = 16
    llama = Llama(args)
    with torch.no_grad():
        llama.init_weights()
    return llama


def grow_stage(target: Model, operator: str = "split", **keys: object) -> GrowStage:
    keys = {"layer_map": None, **keys}
    return GrowStage(1, SOURCE, target, operator, noise=0.0, seed=3, **keys)  # type: ignore[arg-type]


def test_new_are_the_rows_and_columns_that_copy_what_is_there() -> None:
    model = build(WIDE)
    for operator in ("split", "zero", "random", "shrink"):
        new = NewParameters(model, grow_stage(WIDE, operator))
        found = {id(piece.parameter): piece.is_new for piece in new.pieces}
        for name, parameter in model.named_parameters():
            is_old = torch.zeros(parameter.shape, dtype=torch.bool)
            is_old[tuple(slice(size) for size in SOURCE.tensors()[name])] = True
            assert torch.equal(found[id(parameter)], ~is_old), (operator, name)


@pytest.mark.parametrize("case", MAPS)
@pytest.mark.parametrize("operator", ["stack", "zero", "random"])
def test_new_are_the_layers_that_are_not_the_first_of_their_source(
    operator: str, case: str
) -> None:
    model = build(DEEP)
    layers = (2, 3) if case == "stacked" else (1, 3)
    new = NewParameters(model, grow_stage(DEEP, operator, layer_map=MAPS[case]))
    found = {id(piece.parameter): piece.is_new for piece in new.pieces}
    for name, parameter in model.named_parameters():
        is_new = name.startswith(tuple(f"layers.{layer}." for layer in layers))
        assert (id(parameter) in found) == is_new, name
        if is_new:
            assert found[id(parameter)].all()


@pytest.mark.parametrize("fused", [True, False])
def test_each_entry_is_trained_at_its_own_rate(fused: bool) -> None:
    """Against two plain AdamWs over all weights, one at either rate: the moments do not depend on the rate. To a
    float32 rounding of a weight for each step."""
    steps, old_rate, new_rate = 12, 1e-2, 2.5e-2
    model, at_old, at_new = build(WIDE), build(WIDE), build(WIDE)
    new = NewParameters(model, grow_stage(WIDE, shares="rms", norm="copied"))
    is_new = {id(piece.parameter): piece.is_new for piece in new.pieces}
    optimizers = [
        torch.optim.AdamW(m.parameters(), lr=lr, weight_decay=0.5, fused=fused)
        for m, lr in ((model, old_rate), (at_old, old_rate), (at_new, new_rate))
    ]
    rng = torch.Generator().manual_seed(0)
    models = [model, at_old, at_new]
    for _ in range(steps):
        for parameters in zip(*(m.parameters() for m in models), strict=True):
            gradient = torch.randn(parameters[0].shape, generator=rng)
            for parameter in parameters:
                parameter.grad = gradient.clone()
        with new.rate_times(new_rate / old_rate):
            optimizers[0].step()
        optimizers[1].step()
        optimizers[2].step()
    for mixed, old, fast in zip(*(m.parameters() for m in models), strict=True):
        want = torch.where(is_new[id(mixed)], fast, old)
        assert torch.equal(mixed[~is_new[id(mixed)]], old[~is_new[id(mixed)]])
        assert (mixed - want).abs().max() < steps * 2**-23 * want.abs().max()
        assert (fast - old).abs().max() > 0.01, "the rates are told apart"
    for name in ("exp_avg", "exp_avg_sq"):
        for mixed, old in zip(model.parameters(), at_old.parameters(), strict=True):
            assert torch.equal(
                optimizers[0].state[mixed][name], optimizers[1].state[old][name]
            )


def test_what_is_not_updated_stays() -> None:
    """A frozen parameter, as AdamW passes it over."""
    model = build(WIDE)
    new = NewParameters(model, grow_stage(WIDE))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    head: nn.Parameter = model.output.weight
    head.grad = torch.ones_like(head)
    with new.rate_times(1.3):
        optimizer.step()
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old) == (parameter is not head)
