"""What may change between two sessions of a run: recipe, data, and versions of packages."""

import json
from pathlib import Path

import pytest
from recipes_for_tests import RECIPE, plan_of

from stackgrow.errors import ChangedError
from stackgrow.plan.stages import Plan
from stackgrow.run.changed import changed_versions, refuse_changed
from stackgrow.run.engine import _open_stage
from stackgrow.run_folder import provenance


def recorded(folder: Path, monkeypatch: pytest.MonkeyPatch, then: dict[str, str], now: dict[str, str]) -> Path:
    sessions = [{"packages": {"torch": "1.0.0"}}, {"packages": then}]
    (folder / "provenance.json").write_text(json.dumps({"sessions": sessions}))
    monkeypatch.setattr(provenance, "versions", lambda: now)
    return folder


@pytest.mark.parametrize(
    ("then", "now", "told"),
    [
        ({"torch": "2.13.0"}, {"torch": "2.13.0"}, []),
        ({"torch": "2.13.0+cpu"}, {"torch": "2.13.1+cpu"}, ["torch 2.13.0+cpu -> 2.13.1+cpu"]),
        ({"torch": "2.13.0", "numpy": "1.26.0"}, {"torch": "2.13.0", "numpy": "2.0.0"}, ["numpy 1.26.0 -> 2.0.0"]),
        ({"torch": "2.13.0", "flash-attn": "2.7"}, {"torch": "2.13.0"}, ["flash-attn 2.7 -> none"]),
        ({"torch": "2.13.0"}, {"torch": "2.13.0", "flash-attn": "2.7"}, ["flash-attn none -> 2.7"]),
    ],
)
def test_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: dict, now: dict, told: list[str]) -> None:
    assert changed_versions(recorded(tmp_path, monkeypatch, then, now), accept=False) == told


@pytest.mark.parametrize("package", ["torch", "torchtitan"])
@pytest.mark.parametrize("version", ["2.12.0", "3.13.0"])
def test_refused_until_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, version: str) -> None:
    folder = recorded(tmp_path, monkeypatch, {package: "2.13.0"}, {package: version})
    with pytest.raises(ChangedError, match=rf"{package} 2\.13\.0 -> {version}.*--set run\.accept_versions=true"):
        changed_versions(folder, accept=False)
    assert changed_versions(folder, accept=True) == [f"{package} 2.13.0 -> {version}"]


def test_a_new_run_has_no_versions_to_keep(tmp_path: Path) -> None:
    assert changed_versions(tmp_path, accept=False) == []


def opened(folder: Path, plan: Plan, data: str = "data hash") -> Path:
    """A run folder in which every stage of ``plan`` has begun."""
    for stage in plan.stages:
        (folder / stage.name).mkdir(parents=True)
        _open_stage(plan, stage, folder / stage.name, plan.stage_hashes(data))
    return folder


def test_what_may_change_and_what_not(tmp_path: Path) -> None:
    """Keys that place and watch the work may; those that define what is computed may not, each named."""
    run = opened(tmp_path / "run", plan_of(tmp_path))
    for sets in ([], ["parallel.shard=2", "log.interval=1 steps", "train.micro_batch=2", "checkpoint.keep=7"]):
        plan = plan_of(tmp_path, RECIPE, sets)
        refuse_changed(plan, run, plan.stage_hashes("data hash"))
    for sets, told in (
        (["train.learning_rate=2e-3"], "train.learning_rate: 0.001 -> 0.002"),
        (["seed=8"], "seed: 7 -> 8"),
        (["model.ffn_dim=128"], "model.ffn_dim: 96 -> 128"),
        (["budget.tokens=90K"], "steps: "),
    ):
        plan = plan_of(tmp_path, RECIPE, sets)
        with pytest.raises(ChangedError, match=rf"stage-\d.* was made by another recipe: .*{told}"):
            refuse_changed(plan, run, plan.stage_hashes("data hash"))


def test_other_data_are_refused(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    with pytest.raises(ChangedError, match="made by another recipe: the data or a stage before it"):
        refuse_changed(plan, opened(tmp_path / "run", plan), plan.stage_hashes("other data"))
