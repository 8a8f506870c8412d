"""The Python API: ``import stackgrow``."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import stackgrow
from stackgrow.errors import DamagedError
from stackgrow.growth.rules import GrowthError
from stackgrow.process import signals
from stackgrow.recipe.keys import Model
from stackgrow.recipe.load import RecipeError

REPOSITORY = Path(__file__).parents[1]
RECIPES = REPOSITORY / "recipes"
SMALL = Model(family="llama2", dim=8, n_layers=2, n_heads=2, ffn_dim=16, vocab_size=11)
LARGE = Model(family="llama2", dim=8, n_layers=6, n_heads=2, ffn_dim=16, vocab_size=11)


def weights_that_name_their_layer() -> dict[str, torch.Tensor]:
    weights = {}
    for name, shape in SMALL.tensors().items():
        layer = int(name.split(".")[1]) if name.startswith("layers.") else 9
        weights[name] = torch.full(shape, float(layer))
    return weights


def test_layers_are_stacked_in_memory() -> None:
    grown = stackgrow.grow(
        weights_that_name_their_layer(), SMALL, LARGE, layer_map=[0, 1, 0, 1, 0, 1]
    )
    assert {
        name: tuple(tensor.shape) for name, tensor in grown.items()
    } == LARGE.tensors()
    for layer in range(6):
        assert grown[f"layers.{layer}.attention.wq.weight"].unique().tolist() == [
            layer % 2
        ]


def test_grown_layers_share_no_memory() -> None:
    grown = stackgrow.grow(
        weights_that_name_their_layer(), SMALL, LARGE, layer_map=[0, 1, 0, 1, 0, 1]
    )
    places = {tensor.data_ptr() for tensor in grown.values()}
    assert len(places) == len(grown)


def test_new_layers_of_zero_write_nothing_into_the_stream() -> None:
    grown = stackgrow.grow(
        weights_that_name_their_layer(),
        SMALL,
        LARGE,
        "zero",
        layer_map=[0, 1, 0, 1, 0, 1],
    )
    outputs = [
        grown[f"layers.{layer}.attention.wo.weight"].abs().sum().item()
        for layer in range(6)
    ]
    assert [bool(output) for output in outputs].count(
        True
    ) == 1  # that of layer 1: layer 0's weights are all 0 here


def test_a_missing_tensor_is_named() -> None:
    weights = weights_that_name_their_layer()
    del weights["norm.weight"]
    with pytest.raises(GrowthError, match=r"norm\.weight comes from norm\.weight"):
        stackgrow.grow(weights, SMALL, LARGE, layer_map=[0, 1, 0, 1, 0, 1])


def test_a_plan_is_made_without_torch() -> None:
    code = (
        "import sys, stackgrow; "
        "plan = [stackgrow.make_plan('recipes/quickstart.toml', ['budget.tokens=2M']) for _ in range(2)][1]; "
        "print(plan.recipe.budget.tokens, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["2000000", "False"], done.stderr


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match="is no run"):
        stackgrow.load_run(tmp_path)


def test_the_version_is_the_installed_one() -> None:
    assert stackgrow.__version__[0].isdigit()


def test_a_run_from_python_gives_the_signals_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    with pytest.raises(RecipeError):
        stackgrow.run_recipe(tmp_path / "missing.toml")
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before


def test_curves_of_another_name_are_refused(tmp_path: Path) -> None:
    run = stackgrow.Run(tmp_path, stackgrow.make_plan(RECIPES / "quickstart.toml"))
    with pytest.raises(ValueError, match='"train" or "validation"'):
        run.curves("validaton")  # type: ignore[arg-type]
