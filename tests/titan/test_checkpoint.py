"""A checkpoint that does not fit the model exactly is refused: DCP alone would drop layers without a word."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from stackgrow.errors import DamagedError
from stackgrow.recipe.keys import Model
from stackgrow.titan.checkpoint import check_same_tensors


def weights(
    model: Model, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros(shape, dtype=dtype) for name, shape in model.tensors().items()
    }


@pytest.fixture
def saved(small: Model, tmp_path: Path) -> Path:
    state = {
        **weights(small),
        "optimizer": {"state.norm.weight.step": torch.tensor(3.0)},
        "train_state": {"step": 3},
    }
    dcp.save(state, checkpoint_id=str(tmp_path / "step-3"))
    return tmp_path / "step-3"


def test_equal_tensors_pass(small: Model, saved: Path) -> None:
    check_same_tensors(saved, weights(small))


def test_dcp_loads_a_part_of_a_deeper_model_in_silence(
    small: Model, saved: Path
) -> None:
    shallower = weights(dataclasses.replace(small, n_layers=2))
    dcp.load(shallower, checkpoint_id=str(saved))  # raises nothing
    assert shallower.keys() < weights(small).keys(), "the other layers are left out"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layers": 2}, "layers.2.attention.wq.weight is not in the model"),
        ({"n_layers": 4}, "layers.3.attention.wq.weight is missing"),
        ({"ffn_dim": 177}, r"feed_forward.w1.weight is \(\(176, 64\)"),
    ],
)
def test_other_geometry_is_refused(
    small: Model, saved: Path, change: dict, message: str
) -> None:
    with pytest.raises(DamagedError, match=message):
        check_same_tensors(saved, weights(dataclasses.replace(small, **change)))


def test_other_dtype_is_refused(small: Model, saved: Path) -> None:
    with pytest.raises(DamagedError, match=r"torch\.float32.*torch\.bfloat16"):
        check_same_tensors(saved, weights(small, torch.bfloat16))
