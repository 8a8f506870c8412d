"""A base model from elsewhere is compared with the recipe before anything starts: one test per message."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from recipes_for_tests import RECIPE, plan_of

from stackgrow import seal
from stackgrow.checkpoint.hf import export_hf
from stackgrow.checkpoint.take_over import import_problems, take_over
from stackgrow.plan.stages import ImportStage


@pytest.fixture
def stage(tmp_path: Path) -> ImportStage:
    """The import of the base in ``tmp_path / "dcp"``, a bare checkpoint with an optimizer beside the model."""
    plan = plan_of(tmp_path, RECIPE, [f"base.from={tmp_path}/dcp", "base.position=5"])
    stage = plan.stages[0]
    assert isinstance(stage, ImportStage)
    save(tmp_path / "dcp", stage)
    return stage


def save(folder: Path, stage: ImportStage, dtype: torch.dtype = torch.float32) -> None:
    state = {
        name: torch.randn(shape, dtype=dtype)
        for name, shape in stage.source.tensors().items()
    }
    state["optimizer.step"] = torch.zeros(3)
    dcp.save(state, checkpoint_id=folder, no_dist=True)


def message(stage: ImportStage, folder: Path) -> str:
    ((where, what),) = import_problems(replace(stage, folder=str(folder)))
    assert where == "base.from"
    assert str(folder) in what or "bfloat16" in what
    return what


def test_a_bare_checkpoint_fits_and_is_linked(
    stage: ImportStage, tmp_path: Path
) -> None:
    assert import_problems(stage) == []
    digest = take_over(stage, tmp_path / "run", rank=0, world_size=1)
    assert digest == take_over(stage, tmp_path / "run", rank=0, world_size=1), (
        "which does nothing then"
    )
    linked = [file.name for file in (tmp_path / "run").glob("*.distcp")]
    assert linked
    assert all(
        (tmp_path / "run" / name).samefile(tmp_path / "dcp" / name) for name in linked
    )
    assert '"position": 5' in (tmp_path / "run" / seal.MANIFEST).read_text()
    save(tmp_path / "other", stage)
    assert digest != take_over(
        replace(stage, folder=str(tmp_path / "other")), tmp_path / "run2", 0, 1
    )


def test_a_sealed_checkpoint_and_a_hugging_face_folder_fit(
    stage: ImportStage, tmp_path: Path
) -> None:
    take_over(stage, tmp_path / "sealed", rank=0, world_size=1)
    export_hf(tmp_path / "dcp", tmp_path / "hf", stage.source)
    for folder in ("sealed", "hf"):
        assert import_problems(replace(stage, folder=str(tmp_path / folder))) == []


def test_a_source_of_another_geometry_is_refused_by_its_keys(
    stage: ImportStage, tmp_path: Path
) -> None:
    export_hf(tmp_path / "dcp", tmp_path / "hf", stage.source)
    deeper = replace(stage, source=replace(stage.source, n_layers=3, norm_eps=1e-6))
    what = message(deeper, tmp_path / "hf")
    assert (
        "is not the base model: n_layers is 2, in the recipe 3; norm_eps is 1e-05, in the recipe 1e-06"
        in what
    )
    assert "n_layers is 2, in the recipe 3" in message(deeper, tmp_path / "dcp")


def test_weights_in_bfloat16_are_refused(stage: ImportStage, tmp_path: Path) -> None:
    save(tmp_path / "half", stage, torch.bfloat16)
    assert "its weights are torch.bfloat16, and a run keeps float32" in message(
        stage, tmp_path / "half"
    )


def test_no_folder_and_no_model(stage: ImportStage, tmp_path: Path) -> None:
    assert (
        "is no folder; name a Hugging Face model folder or a DCP checkpoint"
        in message(stage, tmp_path / "nothing")
    )
    (tmp_path / "empty").mkdir()
    assert "is not a complete DCP checkpoint" in message(stage, tmp_path / "empty")
