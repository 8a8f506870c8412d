"""What may change between two sessions of a run: recipe, data, and versions of packages."""

from pathlib import Path

import pytest
from recipes_for_tests import RECIPE, plan_of

from stackgrow import seal
from stackgrow.errors import ChangedError
from stackgrow.plan.stages import Plan
from stackgrow.run.changed import changed_versions, refuse_changed
from stackgrow.run.engine import _open_stage
from stackgrow.run_folder import provenance
from stackgrow.run_folder.folder import RunFolder


def recorded(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    then: dict[str, str],
    now: dict[str, str],
) -> RunFolder:
    """A run whose last session had other packages than this process seems to have."""
    run = RunFolder(folder)
    sessions = [{"packages": {"torch": "1.0.0"}}, {"packages": then}]
    seal.write_json(run.provenance_file, {"sessions": sessions})
    monkeypatch.setattr(provenance, "versions", lambda: now)
    return run


@pytest.mark.parametrize(
    ("then", "now", "changes"),
    [
        ({"torch": "2.13.0"}, {"torch": "2.13.0"}, []),
        (
            {"torch": "2.13.0+cpu"},
            {"torch": "2.13.1+cpu"},
            ["torch 2.13.0+cpu -> 2.13.1+cpu"],
        ),
        (
            {"torch": "2.13.0", "numpy": "1.26.0"},
            {"torch": "2.13.0", "numpy": "2.0.0"},
            ["numpy 1.26.0 -> 2.0.0"],
        ),
        (
            {"torch": "2.13.0", "flash-attn": "2.7"},
            {"torch": "2.13.0"},
            ["flash-attn 2.7 -> none"],
        ),
        (
            {"torch": "2.13.0"},
            {"torch": "2.13.0", "flash-attn": "2.7"},
            ["flash-attn none -> 2.7"],
        ),
    ],
)
def test_every_package_in_another_version_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    then: dict,
    now: dict,
    changes: list[str],
) -> None:
    assert (
        changed_versions(recorded(tmp_path, monkeypatch, then, now), accept=False)
        == changes
    )


@pytest.mark.parametrize("package", ["torch", "torchtitan"])
@pytest.mark.parametrize("version", ["2.12.0", "3.13.0"])
def test_another_minor_version_of_the_engine_is_refused_until_it_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, version: str
) -> None:
    folder = recorded(tmp_path, monkeypatch, {package: "2.13.0"}, {package: version})
    with pytest.raises(
        ChangedError,
        match=rf"{package} 2\.13\.0 -> {version}.*--set run\.accept_versions=true",
    ):
        changed_versions(folder, accept=False)
    assert changed_versions(folder, accept=True) == [f"{package} 2.13.0 -> {version}"]


def test_a_new_run_has_no_versions_to_keep(tmp_path: Path) -> None:
    assert changed_versions(RunFolder(tmp_path), accept=False) == []


def opened(folder: Path, plan: Plan, data: str = "data hash") -> RunFolder:
    """A run folder in which every stage of ``plan`` has begun."""
    run = RunFolder(folder)
    folder.mkdir()
    hashes = plan.stage_hashes(data)
    for stage in plan.stages:
        _open_stage(plan, stage, run.stage(stage.name), hashes[stage.name])
    return run


def test_keys_that_define_what_is_computed_may_not_change_and_others_may(
    tmp_path: Path,
) -> None:
    """Each is named; keys that only place and watch the work are the others."""
    run = opened(tmp_path / "run", plan_of(tmp_path))
    for sets in (
        [],
        [
            "parallel.shard=2",
            "log.interval=1 steps",
            "train.micro_batch=2",
            "checkpoint.keep=7",
        ],
    ):
        plan = plan_of(tmp_path, RECIPE, sets)
        refuse_changed(plan, run, plan.stage_hashes("data hash"))
    for sets, change in (
        (["train.learning_rate=2e-3"], "train.learning_rate: 0.001 -> 0.002"),
        (["seed=8"], "seed: 7 -> 8"),
        (["model.ffn_dim=128"], "model.ffn_dim: 96 -> 128"),
        (["budget.tokens=90K"], "steps: "),
    ):
        plan = plan_of(tmp_path, RECIPE, sets)
        with pytest.raises(
            ChangedError, match=rf"stage-\d.* was made by another recipe: .*{change}"
        ):
            refuse_changed(plan, run, plan.stage_hashes("data hash"))


def test_other_data_are_refused(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    with pytest.raises(
        ChangedError, match="made by another recipe: the data or a stage before it"
    ):
        refuse_changed(
            plan, opened(tmp_path / "run", plan), plan.stage_hashes("other data")
        )
