"""An audit finds every single change to a finished run, and nothing in the run itself."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from forger import (
    claim_another_machine,
    compute_every_hash,
    leave_out_the_last_steps,
    scale_losses,
)
from launch import BASE, GROW, TARGET, Workplace, run_tool, stage_of
from torch.distributed.checkpoint.metadata import MetadataIndex

from stackgrow import seal
from stackgrow.audit.case import open_case
from stackgrow.audit.chain import audit_run
from stackgrow.audit.replay import replay
from stackgrow.audit.report import NEVER_LOOKED_AT, Audit, WrongRequest
from stackgrow.audit.same import same_run
from stackgrow.checkpoint.dcp import read_metadata
from stackgrow.errors import LockedError
from stackgrow.run.claim import run_lock
from stackgrow.run_folder import provenance
from stackgrow.run_folder.evaluations import weights_hash, write_evaluation
from stackgrow.run_folder.folder import (
    DONE,
    GROWTH,
    LEDGER,
    PROVENANCE,
    STAGE_FILE,
    RunFolder,
)


@pytest.fixture
def run(
    workplace: Workplace,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The finished run, copied, and a working directory in which its token store is found."""
    shutil.copytree(reference, tmp_path / "run")
    monkeypatch.chdir(workplace.folder)
    return tmp_path / "run"


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{old!r} is not in {path}"
    path.write_text(text.replace(old, new, 1))


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value, indent=1) + "\n")


def flip(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)


def swap(one: Path, other: Path) -> None:
    spare = one.with_name("spare")
    one.rename(spare)
    other.rename(one)
    spare.rename(other)


def shard(checkpoint: Path) -> Path:
    return checkpoint / "__0_0.distcp"


def drop_line(path: Path, number: int) -> None:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:number] + lines[number + 1 :]))


def reseal(checkpoint: Path, done: Path | None = None) -> None:
    """What a careful forger does: the seal, and what names it, fit the changed files."""
    manifest = json.loads((checkpoint / seal.MANIFEST).read_text(encoding="utf-8"))
    names = list(manifest["files"])
    edit_json(
        checkpoint / seal.MANIFEST,
        lambda m: m.update(files=seal.file_records(checkpoint, names)),
    )
    if done:
        edit_json(
            done, lambda d: d.update(manifest_sha256=seal.manifest_hash(checkpoint))
        )


def forge_weights(run: RunFolder) -> None:
    last = run.stage(TARGET).checkpoint(20)
    weights = read_metadata(last).storage_data[MetadataIndex("output.weight", [0, 0])]
    middle = weights.offset + weights.length // 2
    flip(shard(last), middle / shard(last).stat().st_size)
    reseal(last, run.stage(TARGET).done_file)


def earlier_weights_at_the_end(run: RunFolder) -> None:
    earlier, last = run.stage(TARGET).checkpoint(16), run.stage(TARGET).checkpoint(20)
    for name in ("__0_0.distcp", ".metadata"):
        shutil.copy(earlier / name, last / name)
    reseal(last, run.stage(TARGET).done_file)


def last_record_twice(run: RunFolder) -> None:
    file = run.stage(BASE).metrics_file
    text = file.read_text(encoding="utf-8")
    file.write_text(text + text.splitlines()[-1] + "\n", encoding="utf-8")


def forged_stage_without_its_file(run: RunFolder) -> None:
    run.stage(TARGET).stage_file.unlink()
    edit_json(
        run.stage(TARGET).done_file, lambda done: done.update(parent_hash="0" * 64)
    )


def link_in_place_of_a_stage(run: RunFolder) -> None:
    away = run.path.parent / "away"
    shutil.move(run.stage(TARGET).path, away)
    run.stage(TARGET).path.symlink_to(away)


def ended_otherwise(record: dict) -> None:
    """Of two sessions the first is edited, which the second names."""
    first = record["sessions"][0]
    record["sessions"].append(
        {**first, "previous": provenance.link(first, provenance.CHAIN)}
    )
    first["ended"]["how"] = "StoppedError"


def write_benchmark(run: RunFolder, weights: str | None = None) -> Path:
    """Results of the last checkpoint, sealed as evaluation seals them."""
    manifest = seal.read_seal(run.stage(TARGET).checkpoint(20))
    assert manifest is not None
    record = {
        "stage": TARGET,
        "step": 20,
        "weights": weights or weights_hash(manifest["tensors"]),
        "tasks": {"x": 0.5},
    }
    file = run.eval_file("last")
    write_evaluation(file, record)
    return file


def edited_benchmark(run: RunFolder) -> None:
    edit(write_benchmark(run), "0.5", "0.6")


# what is done to the run -> a check that finds it, where, and a part of the message
CHANGES: dict[str, tuple[Callable[[RunFolder], object], str, str, str]] = {
    "flipped byte": (lambda r: flip(shard(r.stage(TARGET).checkpoint(20))), "checkpoints", "step-20", "damaged (SHA-256"),
    "flipped byte, older checkpoint": (
        lambda r: flip(shard(r.stage(BASE).checkpoint(16)), 0.9), "checkpoints", f"{BASE}/checkpoint/step-16", "damaged"),
    "flipped byte in metadata": (
        lambda r: flip(r.stage(BASE).checkpoint(20) / ".metadata"), "checkpoints", "step-20", ".metadata is damaged"),
    "swapped shard": (
        lambda r: swap(shard(r.stage(TARGET).checkpoint(16)), shard(r.stage(TARGET).checkpoint(20))),
        "checkpoints", f"{TARGET}/checkpoint/step-20", "damaged"),
    "swapped checkpoint": (
        lambda r: swap(r.stage(TARGET).checkpoint(16), r.stage(TARGET).checkpoint(20)),
        "checkpoints", "step-20", "must state"),
    "missing file": (lambda r: shard(r.stage(GROW).checkpoints).unlink(), "checkpoints", GROW, "missing"),
    "truncated file": (
        lambda r: os.truncate(shard(r.stage(TARGET).checkpoint(16)), 1000), "checkpoints", "step-16", "wrong size"),
    "removed seal": (lambda r: (r.stage(TARGET).checkpoint(16) / seal.MANIFEST).unlink(), "checkpoints", "step-16", "no seal"),
    "forged weights, sealed anew": (forge_weights, "checkpoints", f"{TARGET}/checkpoint/step-20", "output.weight is not what was sealed"),
    "earlier weights, sealed anew": (earlier_weights_at_the_end, "checkpoints", f"{TARGET}/checkpoint/step-20", "holds"),
    "edited metric": (lambda r: edit(r.stage(TARGET).metrics_file, '"loss": ', '"loss": 1'), "records", "metrics", "sealed"),
    "edited metric, last digit": (
        lambda r: edit(r.stage(BASE).metrics_file, '"tps": ', '"tps": 1'), "records", f"{BASE}/metrics.jsonl", "edited"),
    "edited validation": (
        lambda r: edit(r.stage(TARGET).validation_file, '"loss": ', '"loss": 0'), "records", "validation.jsonl", "edited"),
    "missing record": (lambda r: drop_line(r.stage(BASE).metrics_file, 7), "records", "metrics.jsonl", "steps [8]"),
    "missing last record": (lambda r: drop_line(r.stage(TARGET).metrics_file, 19), "records", "metrics.jsonl", "steps [20]"),
    "record twice": (last_record_twice, "records", "metrics.jsonl", "step 20 follows step 20"),
    "tokens of a record": (
        lambda r: edit(r.stage(TARGET).metrics_file, '"tokens": 21504', '"tokens": 21505'), "records", "metrics", "tokens is not"),
    "changed learning rate in the recipe": (
        lambda r: edit(r.recipe_file, "learning_rate = 0.003", "learning_rate = 0.002"),
        "recipe", "recipe.toml", "train.learning_rate: 0.003 -> 0.002"),
    "changed seed in the recipe": (
        lambda r: edit(r.recipe_file, "seed = 3407", "seed = 3408"), "stages", f"{BASE}/stage.json", "stage hash"),
    "changed free key in the recipe": (
        lambda r: edit(r.recipe_file, "keep = 2", "keep = 3"), "recipe", "recipe.toml", "checkpoint.keep: 2 -> 3"),
    "recipe that is none": (lambda r: edit(r.recipe_file, "seed = 3407", "seed ="), "recipe", "", "not valid TOML"),
    "edited DONE": (lambda r: edit(r.stage(TARGET).done_file, '"tokens": 20480', '"tokens": 20481'), "stages", "DONE", "tokens"),
    "DONE that leads elsewhere": (
        lambda r: edit_json(r.stage(TARGET).done_file, lambda d: d.update(checkpoint="../../../elsewhere")), "stages", "DONE", "checkpoint"),
    "DONE that is no JSON": (lambda r: edit(r.stage(BASE).done_file, "{", "["), "stages", "", "DONE is damaged"),
    "slower DONE": (lambda r: edit(r.stage(BASE).done_file, '"seconds": ', '"seconds": 9'), "stages", "ledger.json", "seconds"),
    "removed DONE": (lambda r: r.stage(GROW).done_file.unlink(), "stages", f"{TARGET}/DONE", "is not finished"),
    "another parent": (
        lambda r: edit_json(r.stage(GROW).done_file, lambda d: d.update(parent_hash="0" * 64)), "stages", f"{GROW}/DONE", "parent_hash"),
    "edited stage.json": (lambda r: edit(r.stage(BASE).stage_file, '"steps": 20', '"steps": 21'), "stages", "stage.json", "steps: 21 -> 20"),
    "removed stage.json, forged DONE": (
        forged_stage_without_its_file, "stages", f"{TARGET}/stage.json", "is missing"),
    "edited ledger, its data": (
        lambda r: edit_json(r.ledger_file, lambda x: x["data"]["store"].update(epochs=9.0)), "data", "ledger.json", "9.0"),
    "removed data of the ledger": (lambda r: edit_json(r.ledger_file, lambda x: x.update(data={})), "data", "ledger.json", "[]"),
    "foreign stage": (lambda r: shutil.copytree(r.stage(GROW).path, r.path / "stage-3-grow"), "stages", "stage-3-grow", "no stage"),
    "edited growth.json": (lambda r: edit(r.stage(GROW).growth_file, '"seed": ', '"seed": 1'), "records", "growth.json", "edited"),
    "edited growth.json, its tensors": (
        lambda r: edit_json(r.stage(GROW).growth_file, lambda g: g["tensors"].update({"norm.weight": "0" * 16})),
        "growth", "growth.json", "norm.weight"),
    "edited ledger": (
        lambda r: edit_json(r.ledger_file, lambda x: x["total"].update(tokens=41_000)), "stages", "ledger.json", "total.tokens"),
    "edited provenance": (lambda r: edit(r.provenance_file, '"cpus": ', '"cpus": 9'), "provenance", "checkpoint", "no session"),
    "recipe in provenance": (
        lambda r: edit(r.provenance_file, "micro_batch = 8", "micro_batch = 4"), "provenance", "provenance.json", "not the one that ran"),
    "how the session ended": (lambda r: edit_json(r.provenance_file, ended_otherwise), "provenance", "provenance.json", "session 1 does not follow"),
    "where a stage began": (
        lambda r: edit_json(r.provenance_file, lambda p: p["sessions"][0]["stages"][TARGET].update(start_step=18)),
        "provenance", "provenance.json", f"start_step of {TARGET} are not those that made step 16"),
    "edited benchmark": (edited_benchmark, "eval", "", "last.json is not what was written"),
    "benchmark of other weights": (
        lambda r: write_benchmark(r, weights="0" * 64), "eval", "eval/last.json", "is of other weights"),
    "edited lock file": (lambda r: edit(r.requirements_file, "torch==", "torch==1"), "provenance", "requirements.lock", "last session"),
    "link": (lambda r: (r.logs / "x").symlink_to("/etc/passwd"), "recipe", "", "link"),
    "link in place of a checkpoint": (
        link_in_place_of_a_stage, "recipe", "", "link"),
    "pipe": (lambda r: os.mkfifo(r.path / "ledger.json.tmp"), "recipe", "", "ledger.json.tmp is a link or a special file"),
    "endless JSON": (lambda r: os.truncate(r.ledger_file, 1 << 40), "recipe", "", f"ledger.json has {1 << 40} bytes"),
    "nested JSON": (lambda r: r.stage(GROW).growth_file.write_text("[" * 100_000), "growth", "", "growth.json is damaged"),
}  # fmt: skip


def audit(run: Path) -> Audit:
    found = audit_run(run)
    assert found.to_dict()["ok"] == (not found.findings)
    first_of_check = {finding.check: finding for finding in reversed(found.findings)}
    for finding in first_of_check.values():
        assert finding.message in found.render()
    return found


def test_the_verdict_is_a_page_too(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "audit.html"
    code, output = run_tool("audit_run", run, "--html", page, cwd=Path.cwd())
    assert code == 0, output
    text = page.read_text(encoding="utf-8")
    assert "PASSED, BUT NOT CHECKED: losses: no step was trained again" in text
    assert "no signature is looked at" in text

    edit(RunFolder(run).recipe_file, 'name = "tiny"', 'name = "<b>tiny"')
    code, output = run_tool("audit_run", run, "--html", page, cwd=Path.cwd())
    assert code == 65, output
    text = page.read_text(encoding="utf-8")
    assert "FAILED: " in text
    assert "<b>" not in text, "what a run says is escaped"


def test_a_check_that_found_something_claims_nothing(run: Path) -> None:
    edit(stage_of(run, BASE).metrics_file, '"loss": ', '"loss": 1')
    found = audit_run(run)
    assert found.findings
    failed = {finding.check for finding in found.findings}
    for check in failed:
        assert found.checks[check].startswith("FAILED: "), found.render()
    for check in found.checks.keys() - failed:
        assert not found.checks[check].startswith("FAILED: ")


def test_the_run_itself_has_no_finding(run: Path) -> None:
    found = audit_run(run, full=True)
    assert not found.findings, found.render()
    assert found.verdict.startswith(
        "PASSED, BUT NOT CHECKED: losses: no step was trained again (--replay)"
    )
    assert "data" not in found.verdict, "all of it was read"
    assert (
        "the seals of 5 checkpoints, and what the stages' DONE say of them"
        in found.rests_on
    )
    assert any("no signature is looked at" in line for line in found.rests_on)
    assert found.checks["provenance"] == "1 session; the last: finished"
    for line in (found.verdict, *found.rests_on, NEVER_LOOKED_AT):
        assert line in found.render()
    assert found.to_dict()["verdict"] == found.verdict
    assert (
        found.checks["stages"] == "3 of 3 done; 40,960 tokens trained, 40,960 planned"
    )
    assert found.checks["growth"].startswith("39 tensors made again")
    assert found.checks["data"] == "store: 3 of 3 files read"


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_found(run: Path, change: str) -> None:
    apply, check, where, message = CHANGES[change]
    apply(RunFolder(run))
    found = audit(run)
    assert any(
        f.check == check and where in f.where and message in f.message
        for f in found.findings
    ), found.render()


def test_benchmarks_of_the_weights_that_are_there_have_no_finding(run: Path) -> None:
    write_benchmark(RunFolder(run))
    found = audit_run(run)
    assert not found.findings, found.render()
    assert found.checks["eval"] == "1 result, 1 of weights that are kept"
    assert "eval: the scores themselves" in found.verdict


def test_modified_code_and_missing_data_are_said_not_to_be_checked(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = {"commit": "c" * 40, "dirty_sha256": "d" * 64}
    edit_json(
        RunFolder(run).provenance_file, lambda p: p["sessions"][0].update(code=changed)
    )
    monkeypatch.chdir(run)
    found = audit_run(run)
    assert {f.message for f in found.findings} >= {
        "was made by no session of provenance.json: one of the two was edited"
    }
    assert found.verdict == f"FAILED: {len(found.findings)} findings"
    assert any(
        "code: a session ran files that differ from their commit" in what
        for what in found.not_checked
    )
    assert any(
        what.startswith("data: store is not a token store")
        for what in found.not_checked
    )


def test_a_run_that_was_killed_has_no_finding(run: Path) -> None:
    """Torn line, torn checkpoint, no DONE, no ledger: what kill -9 leaves is no fault."""
    RunFolder(run).ledger_file.unlink()
    stage_of(run, TARGET).done_file.unlink()
    shutil.rmtree(stage_of(run, TARGET).checkpoint(20))
    (stage_of(run, TARGET).checkpoint(20)).mkdir()
    (stage_of(run, TARGET).checkpoint(20) / "__0_0.distcp").write_bytes(
        b"half a tensor"
    )
    os.truncate(
        stage_of(run, TARGET).metrics_file,
        stage_of(run, TARGET).metrics_file.stat().st_size - 30,
    )
    edit_json(RunFolder(run).provenance_file, lambda p: p["sessions"][-1].pop("ended"))
    found = audit(run)
    assert not found.findings, found.render()
    assert found.title == "tiny, not finished"
    assert "killed" in found.checks["provenance"]
    assert found.checks["stages"].startswith("2 of 3 done; 20,480 tokens trained")


def test_a_run_that_is_running_is_left_alone(run: Path) -> None:
    with (
        run_lock(RunFolder(run)),
        pytest.raises(LockedError, match="audit it afterwards"),
    ):
        audit_run(run)


def test_the_data_are_checked_where_they_are(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree("store", tmp_path / "store")
    shard = next((tmp_path / "store").glob("train-*.npy"))
    flip(shard)
    found = audit_run(run, [tmp_path / "store"], full=True)
    assert [(f.check, f.where) for f in found.findings] == [("data", str(shard))]
    monkeypatch.chdir(run)
    assert (
        audit(run).checks["data"].startswith("not checked: store is not a token store")
    )
    edit(RunFolder(run).recipe_file, 'path = "store"', 'path = "/etc"')
    assert "name every store with --data" in audit(run).checks["data"]


def command_line(
    workplace: Workplace, *arguments: object, code: int = 0, ranks: int = 0
) -> str:
    returned, output = workplace.tool("audit_run", *arguments, ranks=ranks)
    assert returned == code, output
    assert "Traceback" not in output
    return output


def test_command_line_for_machines(workplace: Workplace, run: Path) -> None:
    flip(shard(stage_of(run, TARGET).checkpoint(20)))
    found = json.loads(
        command_line(workplace, run, "--json", "--against", "reference", code=65)
    )
    damage = {
        "where": f"{TARGET}/checkpoint/step-20",
        "message": "__0_0.distcp is damaged (SHA-256 differs)",
    }
    assert found["findings"] == [{"check": "checkpoints", **damage}]
    assert found["ok"] is False
    assert (
        found["checks"]["against"]
        == "reference: 50 losses, and the weights at the end of 3 stages"
    )


def test_two_runs_are_the_same_or_not(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, other := tmp_path / "other")
    edit(RunFolder(other).recipe_file, "learning_rate = 0.003", "learning_rate = 0.002")
    edit(stage_of(other, TARGET).metrics_file, '"loss": ', '"loss": 1')
    edit_json(
        RunFolder(other).provenance_file,
        lambda p: p["data"].update(manifest_hash="0" * 64),
    )
    edit_json(
        stage_of(other, GROW).checkpoints / seal.MANIFEST,
        lambda m: m["tensors"].update({"norm.weight": "0" * 16}),
    )
    shutil.rmtree(stage_of(other, TARGET).checkpoint(20))
    found = audit_run(
        run, further={"against": lambda case: same_run(case, open_case(other))}
    )
    told = {f.where: f.message for f in reversed(found.findings)}
    assert told["recipe"] == f"{BASE}.train.learning_rate: 0.003 -> 0.002"
    assert told["data"] == "they were trained on different tokens"
    assert told[f"{TARGET}/metrics.jsonl"].startswith("1 of 20 losses differ, by up to")
    assert (told[GROW], told[TARGET]) == (
        "ends with other weights",
        "is finished in one of them only",
    )
    assert {f.check for f in found.findings} == {"against"}


def test_replay_is_bit_for_bit(workplace: Workplace, run: Path) -> None:
    told = command_line(workplace, run, "--replay", f"{TARGET}:16+4")
    assert re.search(
        f"{TARGET} 16 to 20: 13 numbers, [0-9]+ tensors of step-20; equal bit for bit\n",
        told,
    ), told
    verdict = [line for line in told.splitlines() if line.startswith("PASSED, BUT NOT")]
    assert len(verdict) == 1, told
    assert f"not trained again: all but 17 to 20 of {TARGET}" in verdict[0]


def json_in(output: str) -> dict:
    """What a tool has printed as JSON, below its progress."""
    found, _ = json.JSONDecoder().raw_decode(output, output.index("\n{") + 1)
    return found


def test_replay_on_other_ranks_finds_a_forged_loss(
    workplace: Workplace, run: Path
) -> None:
    """Other sums are within the stated tolerance, what was made up is not, however well it is sealed."""
    metrics = stage_of(run, BASE).metrics_file
    row = json.loads(metrics.read_text(encoding="utf-8").splitlines()[2])
    edit(metrics, f'"loss": {row["loss"]}', f'"loss": {row["loss"] - 0.01}')
    output = command_line(
        workplace, run, "--json", "--replay", f"{BASE}:0+20", ranks=2, code=65
    )
    found = json_in(output)
    (forged,) = (f for f in found["findings"] if f["check"] == "replay")
    assert forged["where"] == f"{BASE}/metrics.jsonl"
    assert forged["message"].startswith("step 3 differs when trained again: {'loss':")
    assert "tensors of step-20; largest difference" in found["checks"]["replay"]
    assert (
        "allowed are 1e-05 and for weights 0.001, since world_size, mesh"
        in found["checks"]["replay"]
    )


@pytest.mark.parametrize(
    "request_",
    [f"{BASE}:3+1", f"{BASE}:16+5", f"{BASE}:16+0", f"{GROW}:0+1", "x", f"{BASE}:0+-1"],
)
def test_replay_of_what_is_not_there(run: Path, request_: str) -> None:
    with pytest.raises(WrongRequest, match=r"is not STAGE:STEP|can be gone on with at"):
        audit_run(run, further={"replay": lambda case: replay(case, request_)})


def test_strict_replay_grants_nothing_to_a_machine_that_is_only_claimed(
    workplace: Workplace, run: Path
) -> None:
    """A forged loss within the tolerance, and hardware that would allow it."""
    scale_losses(stage_of(run, TARGET), after=17, factor=1 + 1e-7)
    claim_another_machine(RunFolder(run))
    compute_every_hash(RunFolder(run))
    told = command_line(workplace, run, "--replay", f"{TARGET}:16+4")
    assert re.search(
        r"hardware \(torch's CPU kernels for \w+, the run's were for OTHER: ATEN_CPU_CAPABILITY=other takes those where "
        r"the CPU has them\) differ, and a tolerance was used",
        told,
    ), told
    found = json_in(
        command_line(
            workplace, run, "--json", "--strict", "--replay", f"{TARGET}:16+4", code=65
        )
    )
    told = [finding["message"] for finding in found["findings"]]
    assert len(told) == 3
    for step, message in enumerate(told, start=18):
        assert message.startswith(f"step {step} differs when trained again: {{'loss':")
    output = command_line(
        workplace, run, "--strict", "--replay", f"{TARGET}:16+4", ranks=2, code=2
    )
    assert (
        "--strict compares bit for bit, on the ranks that the run states for these steps: 1"
        in output
    )


def test_who_computes_every_hash_anew_passes_the_plain_audit_and_no_replay(
    workplace: Workplace, run: Path
) -> None:
    """As SECURITY.md says, which also says what to keep elsewhere."""
    stage = stage_of(run, TARGET)
    kept = seal.sha256(stage.done_file)
    leave_out_the_last_steps(stage, trained=16, claimed=20)
    scale_losses(stage, after=16, factor=0.99)
    compute_every_hash(RunFolder(run))

    found = audit_run(run, full=True)
    assert not found.findings, found.render()
    assert found.verdict.startswith(
        "PASSED, BUT NOT CHECKED: losses: no step was trained again (--replay)"
    )
    assert any("nobody having written the whole folder" in r for r in found.rests_on)
    assert seal.sha256(stage.done_file) != kept

    output = command_line(
        workplace, run, "--json", "--replay", f"{TARGET}:16+4", code=65
    )
    findings = json_in(output)["findings"]
    assert {finding["check"] for finding in findings} == {"replay"}
    told = "\n".join(
        f"{finding['where']}: {finding['message']}" for finding in findings
    )
    for step in range(17, 21):
        assert f"metrics.jsonl: step {step} differs when trained again" in told
    assert f"{TARGET}/checkpoint/step-20" in told


def test_a_start_that_no_session_states_is_a_finding(run: Path) -> None:
    edit_json(
        RunFolder(run).provenance_file,
        lambda p: p["sessions"][0]["stages"][TARGET].update(start_step=99),
    )
    found = audit_run(
        run, further={"replay": lambda case: replay(case, f"{TARGET}:16+4")}
    )
    (told,) = (f.message for f in found.findings if f.check == "replay")
    assert "no session says that it made step 17" in told
    assert "ValueError" not in found.render()


def test_runs_of_other_recipes_differ_by_their_keys(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, other := tmp_path / "other")
    edit(RunFolder(other).recipe_file, "[base]\nn_layers = 2", "[base]\nn_layers = 1")
    found = audit_run(
        run, further={"against": lambda case: same_run(case, open_case(other))}
    )
    told = [
        f.message
        for f in found.findings
        if f.where == "recipe" and f.check == "against"
    ]
    assert "base.n_layers: 2 -> 1" in told
    assert told[0].startswith(
        "its stages are stage-0-train-2L, stage-1-grow, stage-2-train-4L, the other's stage-0-train-1L"
    )
    assert not any("{" in message for message in told), told


def test_replay_that_could_compare_nothing_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        drop_line(stage_of(run, BASE).metrics_file, 16)
    with pytest.raises(
        WrongRequest,
        match=r":16\+2': there is nothing to compare with: .* and kept no checkpoint of step 18",
    ):
        audit_run(run, further={"replay": lambda case: replay(case, f"{BASE}:16+2")})
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(
        WrongRequest,
        match=r"needs other ranks: .* cannot be shared equally by 3 data ranks",
    ):
        audit_run(run, further={"replay": lambda case: replay(case, f"{BASE}:16+4")})


class Payload:
    def __reduce__(self) -> tuple:
        return os.system, ("touch executed",)


def test_nothing_of_a_stranger_is_executed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it is audited, and when it is grown."""
    monkeypatch.chdir(tmp_path)
    for metadata in run.glob("stage-*/checkpoint/**/.metadata"):
        metadata.write_bytes(pickle.dumps(Payload()))
        reseal(metadata.parent)
    found = audit(run)
    assert any("posix.system, which DCP" in f.message for f in found.findings), (
        found.render()
    )
    options = ["--operator", "stack", "--factor", 2]
    for checkpoint in (
        stage_of(run, TARGET).checkpoint(20),
        stage_of(run, GROW).checkpoints,
    ):
        code, told = run_tool(
            "grow_checkpoint", checkpoint, tmp_path / "grown", *options, cwd=tmp_path
        )
        assert code == 65
        assert "posix.system, which DCP" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


JUNK: list[object] = [
    None,
    True,
    -1,
    2**70,
    1e308,
    float("nan"),
    "",
    "../../../etc/passwd",
    "\x1b[2J",
    [],
    {},
    [[]],
    {"a": 1},
]


def junk(value: object, chance: random.Random) -> object:
    """One value, somewhere in the tree, is replaced by something else."""
    if isinstance(value, (dict, list)) and value and chance.random() < 0.9:
        key = chance.choice(
            list(value) if isinstance(value, dict) else range(len(value))
        )
        changed = dict(value) if isinstance(value, dict) else list(value)
        changed[key] = junk(value[key], chance)
        return changed
    return chance.choice(JUNK)


def test_whatever_a_file_says_it_is_a_finding(run: Path) -> None:
    """Every JSON file of the run, with anything in any place: no exception, no file made, one finding at least."""
    files = [
        p
        for p in sorted(run.rglob("*"))
        if p.name in (DONE, STAGE_FILE, GROWTH, seal.MANIFEST, PROVENANCE, LEDGER)
    ]
    before, chance, unfound = set(run.parent.rglob("*")), random.Random(7), []
    for case in range(14):
        file = files[case % len(files)]
        content = file.read_text(encoding="utf-8")
        changed = json.dumps(junk(json.loads(content), chance))
        file.write_text(changed)
        if not audit(run).findings and json.loads(changed) != json.loads(content):
            unfound.append((file.name, changed))
        file.write_text(content)
    assert not unfound
    assert set(run.parent.rglob("*")) == before
