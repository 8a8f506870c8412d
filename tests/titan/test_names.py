"""One table renames tensors: a checkpoint has its names, whatever torchtitan calls them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from families_for_tests import TINY
from growth_for_tests import assert_same, llama, weights
from torchtitan.components.checkpoint import ModelWrapper
from torchtitan.components.optimizer import OptimizersContainer

from stackgrow.checkpoint.dcp import read_metadata
from stackgrow.recipe.keys import Model
from stackgrow.titan.names import RENAMED, StoredNames, stored_name, titan_name

# The pairs of torchtitan 0.3, the other way round: 0.2.2 has the names that checkpoints have.
OTHERS = {"attention.qkv_linear.wq": "attention.wq", "lm_head": "output"}


@pytest.fixture
def renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    for stored, titan in OTHERS.items():
        monkeypatch.setitem(RENAMED, stored, titan)


def states_of(model: Model, scale: float) -> dict[str, Any]:
    """What torchtitan's CheckpointManager has of a model, after a step."""
    network = llama(model, {name: w * scale for name, w in weights(model).items()})
    container = OptimizersContainer([network], torch.optim.AdamW, {"lr": 0.1})
    for weight in network.parameters():
        weight.grad = torch.full_like(weight, scale)
    container.step()
    parts = {"model": ModelWrapper(network), "optimizer": container}
    return {name: StoredNames(part) for name, part in parts.items()}


@pytest.mark.usefixtures("renamed")
@pytest.mark.parametrize(
    ("stored", "titan"),
    [
        ("layers.1.attention.qkv_linear.wq.bias", "layers.1.attention.wq.bias"),
        ("layers.1.attention.wk.weight", "layers.1.attention.wk.weight"),
        ("lm_head.weight", "output.weight"),
        ("state.lm_head.weight.exp_avg", "state.output.weight.exp_avg"),
    ],
)
def test_a_name_goes_there_and_back(stored: str, titan: str) -> None:
    assert titan_name(stored) == titan
    assert stored_name(titan) == stored


def test_what_wraps_a_layer_is_not_stored() -> None:
    wrapped = "layers.0._orig_mod.attention._checkpoint_wrapped_module.wq.weight"
    assert stored_name(wrapped) == "layers.0.attention.wq.weight"


@pytest.mark.usefixtures("renamed")
def test_weights_and_moments_are_saved_and_loaded_by_the_names_of_a_checkpoint(
    tmp_path: Path,
) -> None:
    model = TINY["qwen2"]
    saved, loaded = states_of(model, 1.0), states_of(model, 2.0)
    dcp.save(dict(saved), checkpoint_id=tmp_path / "step-1", no_dist=True)
    names = read_metadata(tmp_path / "step-1").state_dict_metadata
    assert "model.lm_head.weight" in names
    assert "optimizer.state.layers.0.attention.qkv_linear.wq.bias.exp_avg" in names
    assert not [name for name in names if "output" in name or "attention.wq" in name]

    dcp.load(dict(loaded), checkpoint_id=tmp_path / "step-1", no_dist=True)
    for part in ("model", "optimizer"):
        assert_same(tensors_of(loaded[part]), tensors_of(saved[part]))


def tensors_of(state: StoredNames) -> dict[str, torch.Tensor]:
    found = state.state_dict()
    return {name: v for name, v in found.items() if isinstance(v, torch.Tensor)}
