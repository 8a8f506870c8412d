"""What stages find out as they run: the end that the loss calls for, and the weights of a base from elsewhere."""

import json
import shutil
from pathlib import Path

import pytest
from launch import Workplace, assert_audited, losses, records, weights

from stackgrow.checkpoint.dcp import is_model_key, read_metadata
from stackgrow.checkpoint.hf import export_hf
from stackgrow.plan.resolve import make_plan
from stackgrow.recipe.load import load_recipe
from stackgrow.run_folder.folder import GROWTH, METRICS, VALIDATION, RunFolder
from stackgrow.run_folder.found import plan_of_run

BASE, TARGET = "stage-0-train-2L", "stage-2-train-4L"
# Between step 8, up to which the loss fell by 110K per billion tokens, and step 33; by 57.6K up to step 9.
SLOPE = [
    "growth[0].timing={loss_slope=84000,min='8 steps',max='30Ki'}", "train.horizon=stage",
    "train.batch_warmup=['256 for 2 steps','512 for 3 steps']", "log.interval=7 steps",
]  # fmt: skip
SUMMATION_ORDER = 2e-6  # float32, as in test_parallel.py


@pytest.fixture(scope="module")
def runs(workplace: Workplace, reference: Path) -> Path:
    """The undisturbed run whose growth the loss decides, and runs from the reference's base, in the two formats."""
    base = RunFolder(reference).stage(BASE).checkpoint(20)
    model = make_plan(load_recipe(workplace.folder / "tiny.toml")).train_stages[0].model
    export_hf(base, workplace.folder / "llama", model)
    start = ["growth[0].timing=start", "base.position=320", "budget.tokens=20Ki"]
    jobs: list = [("tiny.toml", [*SLOPE, "run.folder=slope"])]
    for name, folder in (("dcp", base), ("hf", "llama")):
        jobs.append(
            ("tiny.toml", [*start, f"base.from={folder}", f"run.folder=from_{name}"])
        )
    jobs.append(("tiny.toml", ["base.from=llama", "run.folder=from_hf", *start]))
    (workplace.folder / "found.txt").write_text(workplace.run_all(jobs))
    return workplace.folder


def test_growth_comes_when_the_loss_calls_for_it(runs: Path) -> None:
    output = (runs / "found.txt").read_text()
    assert "Traceback" not in output, output
    found = json.loads(RunFolder(runs / "slope").stage(BASE).found_file.read_text())
    rows = records(runs / "slope")
    seen = {step: row for (stage, step), row in rows.items() if stage == BASE}
    assert_audited(runs / "slope")
    assert 8 < found["found"] == max(seen) < 33, (
        "between its bounds, and neither of them"
    )
    plan = plan_of_run(runs / "slope")
    assert [s.steps for s in plan.train_stages] == [
        found["found"],
        max(s for stage, s in rows if stage == TARGET),
    ]
    # Decided by the losses that the run logged, at its first chance: independently of stackgrow's own fit.
    for step in range(8, found["found"] + 1):
        x, y = zip(
            *[
                (seen[s]["tokens"] / 1e9, seen[s]["loss"])
                for s in range(step - 3, step + 1)
            ],
            strict=True,
        )
        fall = -sum((a - sum(x) / 4) * b for a, b in zip(x, y, strict=True)) / sum(
            (a - sum(x) / 4) ** 2 for a in x
        )
        assert (fall < 84000) == (step == found["found"])


def test_batches_grow_and_the_books_balance(runs: Path) -> None:
    rows = records(runs / "slope")
    assert [row["tokens"] for (stage, _), row in rows.items() if stage == BASE][:7] == [
        256, 512, 1024, 1536, 2048, 3072, 4096,
    ]  # fmt: skip
    assert all(row["position"] * 64 == row["tokens"] for row in rows.values())
    ledger = json.loads(RunFolder(runs / "slope").ledger_file.read_text())
    assert ledger["total"]["tokens"] == list(rows.values())[-1]["tokens"] <= 40 * 1024


def test_killed_before_and_after_the_decision(
    workplace: Workplace, runs: Path, tmp_path: Path
) -> None:
    run, sets = tmp_path / "run", [*SLOPE, f"run.folder={tmp_path}/run"]
    workplace.kill_at("train.step 7", *sets)  # after the first checkpoint
    assert not RunFolder(run).stage(BASE).found_file.exists()
    workplace.kill_at("found 1", *sets)
    assert RunFolder(run).stage(BASE).found_file.exists()
    assert not RunFolder(run).stage(BASE).done_file.exists()
    workplace.run(*sets)
    reference = runs / "slope"
    assert (
        RunFolder(run).stage(BASE).found_file.read_text()
        == RunFolder(reference).stage(BASE).found_file.read_text()
    )
    for name in (METRICS, VALIDATION):
        assert losses(run, name) == losses(reference, name)
    last = max(step for stage, step in losses(run) if stage == TARGET)
    assert weights(RunFolder(run).stage(TARGET).checkpoint(last)) == weights(
        RunFolder(reference).stage(TARGET).checkpoint(last)
    )


def test_other_degrees_of_parallelism_in_each_stage(
    workplace: Workplace, runs: Path, tmp_path: Path
) -> None:
    """The base on FSDP, the target on tensor parallelism, with batches that grow: the same steps and losses, up to a
    kill after some of the target's."""
    layout = [
        "base.parallel.shard=2",
        "growth[0].parallel.tensor=2",
        f"run.folder={tmp_path}/run",
    ]
    workplace.kill_at("train.step 20", *SLOPE, *layout, warm_ranks=2)
    for name in (METRICS, VALIDATION):
        found, expected = losses(tmp_path / "run", name), losses(runs / "slope", name)
        assert list(found) == list(expected)[: len(found)]
        assert {stage for stage, _ in found} == {BASE, TARGET}
        assert max(abs(found[k] / expected[k] - 1) for k in found) < SUMMATION_ORDER
    stages = [s.name for s in plan_of_run(tmp_path / "run").train_stages]
    split = {}
    for stage in stages:
        folder = RunFolder(tmp_path / "run").stage(stage)
        split[stage] = _chunks(folder.checkpoint(folder.sealed_steps()[0]))
    # Rows over two ranks throughout; tensor parallelism splits columns of these.
    assert split == {stages[0]: (88, 64), stages[1]: (64, 88)}


def _chunks(checkpoint: Path) -> tuple[int, ...]:
    """The shape of the first stored piece: of w1 [176, 64] under FSDP, of w2 [64, 176] under tensor parallelism."""
    entries = read_metadata(checkpoint).state_dict_metadata
    pieces = {
        name: tuple(e.chunks[0].sizes)
        for name, e in entries.items()
        if is_model_key(name)
    }
    whole = {"w1": (176, 64), "w2": (64, 176)}
    first, second = (pieces[f"layers.0.feed_forward.{name}.weight"] for name in whole)
    return second if second[1] == 88 else first


@pytest.mark.parametrize("name", ["dcp", "hf"])
def test_a_base_from_elsewhere_goes_on_as_its_own_run_did(
    runs: Path, reference: Path, name: str
) -> None:
    run, first = runs / f"from_{name}", "stage-0-import-2L"
    assert weights(RunFolder(run).stage(first).checkpoints) == {
        k: v
        for k, v in weights(RunFolder(reference).stage(BASE).checkpoint(20)).items()
        if is_model_key(k)
    }
    found, expected = losses(run), losses(reference)
    assert found == {key: loss for key, loss in expected.items() if key[0] == TARGET}, (
        "bit for bit, on the same data"
    )
    assert [r["position"] for r in records(run).values()] == [
        320 + 16 * i for i in range(1, 21)
    ]
    weights_hash = json.loads(RunFolder(run).stage(first).found_file.read_text())[
        "found"
    ]
    sessions = json.loads(RunFolder(run).provenance_file.read_text())["sessions"]
    assert sessions[0]["stages"][first]["weights_hash"] == weights_hash
    source = json.loads((RunFolder(run).stage(first).checkpoints / GROWTH).read_text())[
        "source"
    ]
    assert ("files" in source) == (name == "hf"), "the SHA-256 of what was converted"
    ledger = json.loads(RunFolder(run).ledger_file.read_text())
    assert ledger["total"]["tokens"] == 20 * 1024
    assert_audited(run)


def test_what_is_wrong_with_what_was_found_is_told(
    runs: Path, workplace: Workplace, tmp_path: Path
) -> None:
    shutil.copytree(runs / "slope", tmp_path / "run")
    file = RunFolder(tmp_path / "run").stage(BASE).found_file
    for value, told in (
        ("x", "'x' is nothing that the stage finds"),
        (None, "None is nothing that the stage finds"),
    ):
        file.write_text(json.dumps({**json.loads(file.read_text()), "found": value}))
        assert told in workplace.run(*SLOPE, f"run.folder={tmp_path}/run", code=65)


def test_an_imported_base_that_grows_at_once_cannot_be_evaluated(
    runs: Path, workplace: Workplace
) -> None:
    code, told = workplace.tool(
        "evaluate", runs / "from_hf", "--stage", "stage-0-import-2L"
    )
    assert code == 2
    assert (
        'growth[0].timing: "start" grows the imported model before any stage trains it; export it'
        in told
    )


def test_a_base_is_taken_over_once(runs: Path) -> None:
    assert (runs / "found.txt").read_text().count("stage-0-import-2L  done before") == 1
