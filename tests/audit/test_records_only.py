"""Records that were kept without their run: what an audit, and a list of runs, says of them."""

import json
import shutil
from pathlib import Path

import pytest

from stackgrow.audit.case import open_case
from stackgrow.audit.chain import audit_run
from stackgrow.audit.replay import replay
from stackgrow.audit.report import Audit, WrongRequest
from stackgrow.audit.same import same_run
from stackgrow.run_folder.folder import RunFolder
from stackgrow.run_folder.state import RECORDS_ONLY, state_of

RESULTS = Path(__file__).parents[2] / "recipes" / "experiments" / "results"
KEPT = sorted(path for path in RESULTS.iterdir() if path.is_dir())


@pytest.mark.parametrize("run", KEPT, ids=lambda run: run.name)
def test_kept_records_are_those_of_their_recipe(run: Path) -> None:
    audit = audit_run(run)
    assert audit.findings == []
    assert audit.verdict.startswith("PASSED, BUT NOT CHECKED: ")
    assert "the losses in the records: the checkpoints" in audit.verdict
    assert audit.title.endswith("records that were kept without their run")
    assert state_of(run).state == RECORDS_ONLY


@pytest.fixture
def copy(tmp_path: Path) -> RunFolder:
    """Records with two sessions."""
    shutil.copytree(RESULTS / "deep_24x32_stack-1", tmp_path / "run")
    return RunFolder(tmp_path / "run")


def test_what_is_not_as_the_recipe_has_it_is_found(copy: RunFolder) -> None:
    file = copy.stages()[0].metrics_file
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    third = json.loads(lines[2])
    third["tokens"] += 1
    lines[2] = json.dumps(third) + "\n"
    file.write_text("".join(lines), encoding="utf-8")
    (finding,) = audit_run(copy.path).findings
    assert finding.check == "records"
    assert finding.message == (f"step {third['step']}: tokens is not what the plan has")


def test_an_edited_session_is_found(copy: RunFolder) -> None:
    record = copy.provenance()
    record["sessions"][0]["hardware"]["cpus"] = 64
    copy.provenance_file.write_text(json.dumps(record), encoding="utf-8")
    (finding,) = audit_run(copy.path).findings
    assert "session 1 does not follow the one before it" in finding.message


def test_an_edited_recipe_is_found(copy: RunFolder) -> None:
    text = copy.recipe_file.read_text(encoding="utf-8")
    assert "beta1 = 0.9" in text
    edited = text.replace("beta1 = 0.9", "beta1 = 0.8")
    copy.recipe_file.write_text(edited, encoding="utf-8")
    found = audit_run(copy.path).findings
    assert any("is not the recipe of any session" in one.message for one in found)


def test_a_run_with_checkpoints_is_no_kept_record_whatever_it_says(
    copy: RunFolder,
) -> None:
    copy.stages()[0].checkpoints.mkdir()
    assert not copy.holds_records_only()
    assert state_of(copy.path).state != RECORDS_ONLY


def test_records_are_compared_by_their_losses_alone(copy: RunFolder) -> None:
    kept = RESULTS / "deep_24x32_stack-1"

    def against(other: Path) -> Audit:
        return audit_run(
            copy.path,
            further={"against": lambda case: same_run(case, open_case(other))},
        )

    equal = against(kept)
    assert equal.findings == []
    assert equal.checks["against"] == f"{kept}: 360 losses"
    assert any("end with the same weights" in what for what in equal.not_checked)
    other_seed = against(RESULTS / "deep_24x32_stack-2").findings
    assert {finding.check for finding in other_seed} == {"against"}
    assert any("losses differ" in finding.message for finding in other_seed)


def refusal(run: Path, request: str, *data: Path) -> str:
    with pytest.raises(WrongRequest) as refused:
        audit_run(run, data, further={"replay": lambda case: replay(case, request)})
    assert refused.value.exit_code == 2
    return str(refused.value)


def test_records_whose_sessions_were_not_kept_are_not_replayed() -> None:
    run = RESULTS / "ratio_8x64_scratch-1"
    assert RunFolder(run).provenance()["sessions"] == []
    told = refusal(run, "stage-0-train-8L:0+1")
    assert f"{run} are records alone, their sessions were not kept" in told


def test_a_stage_whose_input_was_not_kept_is_not_replayed(copy: RunFolder) -> None:
    told = refusal(copy.path, "stage-2-train-24L:0+200")
    assert "the weights that stage-2-train-24L begins with were not kept" in told


def test_a_replay_reads_no_store_that_only_the_recipe_names(
    copy: RunFolder, tmp_path: Path
) -> None:
    """And a store that is not here is no fault of the run."""
    told = refusal(copy.path, "stage-0-train-6L:0+1")
    assert "leaves the working directory; name every store with --data" in told
    told = refusal(copy.path, "stage-0-train-6L:0+1", tmp_path / "absent")
    assert f"nothing can be trained again: {tmp_path}/absent is not a token" in told
