"""Equal values are pickled once and unpickled once, and the files are DCP's own."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from stackgrow.checkpoint.dcp import SafePlanner, SafeReader
from stackgrow.checkpoint.save_planner import OnceEachPlanner


def optimizer_state(parameters: int) -> dict[str, Any]:
    """As torchtitan lays it out: values that are equal beside each parameter, and some that only look alike."""
    state: dict[str, Any] = {}
    for i in range(parameters):
        state[f"state.{i}.exp_avg"] = torch.full((3, 4), float(i))
        state[f"param_groups.{i}.lr"] = 3e-3
        state[f"param_groups.{i}.betas"] = (0.9, 0.95)
        state[f"param_groups.{i}.amsgrad"] = False
        state[f"param_groups.{i}.foreach"] = None
    look_alike = {"zero": 0, "0.0": 0.0, "-0.0": -0.0, "one": 1, "true": True, "1": "1"}
    look_alike |= {"(1,)": (1,), "(True,)": (True,), "list": [1, 2], "other": [2, 1]}
    return {"optimizer": state, **look_alike}


def test_the_files_are_those_of_dcps_own_planner(tmp_path: Path) -> None:
    state = optimizer_state(5)
    for name, planner in (("dcp", None), ("once each", OnceEachPlanner())):
        dcp.save(state, checkpoint_id=tmp_path / name, planner=planner, no_dist=True)
    files = sorted(path.name for path in (tmp_path / "dcp").glob("*.distcp"))
    assert files
    for name in files:
        expected = (tmp_path / "dcp" / name).read_bytes()
        assert (tmp_path / "once each" / name).read_bytes() == expected


def test_as_many_values_are_pickled_as_are_different(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pickled: list[object] = []
    save = torch.save

    def counted(value: object, file: io.BytesIO) -> None:
        if not isinstance(value, torch.Tensor):
            pickled.append(value)
        save(value, file)

    monkeypatch.setattr(torch, "save", counted)
    dcp.save(
        optimizer_state(50),
        checkpoint_id=tmp_path / "step-1",
        planner=OnceEachPlanner(),
        no_dist=True,
    )
    # Of each parameter's four values, 8 that look alike, and two lists.
    assert len(pickled) == 4 + 8 + 2


def test_as_many_values_are_unpickled_as_are_different(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = optimizer_state(20)
    dcp.save(state, checkpoint_id=tmp_path / "step-1", no_dist=True)
    into: dict[str, Any] = dict.fromkeys(state, "nothing yet")
    into["optimizer"] = {}
    for name, value in state["optimizer"].items():
        is_tensor = isinstance(value, torch.Tensor)
        into["optimizer"][name] = torch.zeros(3, 4) if is_tensor else "nothing yet"
    unpickled: list[object] = []
    load = torch.load

    def counted(file: io.BytesIO, **options: Any) -> object:
        loaded = load(file, **options)
        if not isinstance(loaded, torch.Tensor):
            unpickled.append(loaded)
        return loaded

    monkeypatch.setattr(torch, "load", counted)
    reader, planner = SafeReader(tmp_path / "step-1"), SafePlanner()
    dcp.load(into, storage_reader=reader, planner=planner, no_dist=True)
    assert len(unpickled) == 4 + 8 + 2
    assert repr(into) == repr(state), "0, 0.0, -0.0 and False are told apart"
