"""Benchmarks of real runs, against lm-eval's own backend for Hugging Face models on the exported model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from launch import RECIPE, REPOSITORY, Workplace, environment, losses
from warm import Warm

from stackgrow import seal
from stackgrow.checkpoint.export import export_run
from stackgrow.evaluate.tasks import load_tasks
from stackgrow.run_folder.evaluations import weights_hash, write_evaluation
from stackgrow.run_folder.folder import TENSORBOARD, VALIDATION, RunFolder

pytest.importorskip("lm_eval")

BASE, GROW, TARGET = "stage-0-train-2L", "stage-1-grow", "stage-2-train-4L"
TASKS = ("local_choice", "local_last_word", "local_rolling")
LOCAL = str(REPOSITORY / "tests" / "evaluate" / "tasks")
LAYOUTS = {1: ["parallel.shard=-1"], 2: ["parallel.shard=2", "parallel.tensor=2"]}
# Contexts and continuations: usual ones, without a context, with blanks at the seam, of one token, and longer than
# the 64 tokens that the model sees.
LONG = "import json\n" * 60
REQUESTS: dict[str, list[list[str]]] = {
    "loglikelihood": [
        ["def f(x):", " return x"], ["", "import json"], ["", " leading"], ["import ", "os"], ["a \n ", "b"],
        ["x = ", "1"], [LONG, " for"], [LONG, "import json\n" * 6], ["def f(x):", " return x"], ["naïve 日本", "😀"],
    ],
    "loglikelihood_rolling": [["x"], ["def f(x):\n    return x"], [LONG], [""], [" two  spaces "], [LONG + "\tend"]],
}  # fmt: skip


def exported(
    workplace: Workplace,
    source: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    **options: Any,
) -> Any:
    """lm-eval's own backend on the export of a run."""
    from lm_eval.models.huggingface import HFLM

    monkeypatch.chdir(workplace.folder)
    export_run(source, folder, **options)
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=3)


@pytest.mark.parametrize("ranks", [1, 2])
def test_loglikelihoods_are_those_of_the_exported_model(
    workplace: Workplace,
    reference: Path,
    tmp_path: Path,
    ranks: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lm_eval.api.instance import Instance

    (tmp_path / "requests.json").write_text(json.dumps(REQUESTS))
    script = REPOSITORY / "tests" / "e2e" / "loglikelihoods.py"
    arguments = (
        reference,
        tmp_path / "requests.json",
        tmp_path / "results.json",
        *LAYOUTS[ranks],
    )
    process = Warm(
        script, list(map(str, arguments)), workplace.folder, environment(), ranks
    )
    assert process.wait(200) == 0, process.output()
    ours = json.loads((tmp_path / "results.json").read_text())
    theirs = exported(workplace, reference, tmp_path / "hf", monkeypatch)
    for kind, requests in REQUESTS.items():
        expected = getattr(theirs, kind)(
            [Instance(kind, {}, tuple(r), 0) for r in requests]
        )
        for layout in LAYOUTS[ranks]:
            for request, mine, wanted in zip(
                requests, ours[layout][kind], expected, strict=True
            ):
                # lm-eval sums in float32, which a text of 480 tokens feels.
                assert mine == pytest.approx(wanted, abs=1e-4, rel=1e-6), (
                    layout,
                    request,
                )
    distinct = {
        round(value, 3) for value, _ in ours[LAYOUTS[ranks][0]]["loglikelihood"]
    }
    assert len(distinct) == len(REQUESTS["loglikelihood"]) - 1, (
        "one request is there twice"
    )


def metrics(lm: Any) -> dict[str, dict[str, float]]:
    """What lm-eval makes of its own backend."""
    from lm_eval.evaluator import evaluate

    found = evaluate(lm, load_tasks(TASKS, LOCAL), bootstrap_iters=0, log_samples=False)
    return {
        task: {k.split(",")[0]: v for k, v in values.items()}
        for task, values in found["results"].items()
    }


def assert_same_metrics(
    record: Mapping[str, Any], expected: Mapping[str, Mapping[str, float]]
) -> None:
    assert record["tasks"].keys() == expected.keys()
    for task, values in record["tasks"].items():
        for name, value in values.items():
            if name != "examples" and not name.endswith("_stderr"):
                assert value == pytest.approx(expected[task][name], rel=1e-4), (
                    task,
                    name,
                )


def test_evaluation_within_a_run_changes_nothing_and_is_done_again_where_it_is_missing(
    workplace: Workplace,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    sets = [
        f"eval.tasks={json.dumps(TASKS)}",
        f"eval.include={LOCAL}",
        "eval.interval=10 steps",
        "eval.batch=5",
    ]
    sets += ["eval.after=each", f"run.folder={run}"]
    output = workplace.run(*sets)
    assert losses(run) == losses(reference)
    assert losses(run, VALIDATION) == losses(reference, VALIDATION)
    files = {
        f"{stage}-step-{step}.json" for stage in (BASE, TARGET) for step in (10, 20)
    }
    assert {f.name for f in RunFolder(run).eval.iterdir()} == files
    for name in files:
        assert (
            f"{name.partition('-step')[0]}  step {name[-7:-5]}  local_choice acc_norm 0."
            in output
        )

    record = seal.read_json(RunFolder(run).eval_file(f"{TARGET}-step-20"))
    assert record is not None
    assert_same_metrics(
        record, metrics(exported(workplace, run, tmp_path / "hf", monkeypatch))
    )
    assert (
        record["stage"],
        record["step"],
        record["tokens"],
        record["seven_task_mean"],
    ) == (TARGET, 20, 40960, None)
    p, n = (
        record["tasks"]["local_choice"]["acc"],
        record["tasks"]["local_choice"]["examples"],
    )
    assert (n, record["tasks"]["local_choice"]["acc_stderr"]) == (
        30,
        pytest.approx((p * (1 - p) / 29) ** 0.5),
    )
    written = [f.read_bytes() for f in run.glob("stage-2*/tb/eval/events*")]
    assert any(b"eval/local_rolling/word_perplexity" in content for content in written)

    # As if killed between the last save and the end of the evaluation: the same command does it, and trains nothing.
    # So it does where fewer tasks were asked for then.
    unsealed = {name: value for name, value in record.items() if name != "sha256"}
    for before in (
        None,
        {**unsealed, "asked": [TASKS[0]], "tasks": {TASKS[0]: {"acc": 0.0}}},
    ):
        RunFolder(run).stage(TARGET).done_file.unlink()
        RunFolder(run).eval_file(f"{TARGET}-step-20").unlink()
        if before:
            write_evaluation(RunFolder(run).eval_file(f"{TARGET}-step-20"), before)
        assert f"{TARGET}  step 20  local_choice" in workplace.run(*sets)
        assert seal.read_json(RunFolder(run).eval_file(f"{TARGET}-step-20")) == record


def test_tool_evaluates_a_grown_checkpoint_and_adds_to_its_results(
    workplace: Workplace,
    reference_fsdp: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grown = RunFolder(reference_fsdp).stage(GROW).checkpoints
    before = {
        p: p.stat().st_mtime_ns
        for p in reference_fsdp.glob("stage-*/**/*")
        if p.is_file()
    }
    code, output = workplace.tool(
        "evaluate", grown, "--include", LOCAL, "--tasks", *TASKS[:2], ranks=2
    )
    assert (code, output.count(f"{GROW}  step 0  local_choice acc_norm 0.")) == (
        0,
        1,
    ), output
    assert "Running loglikelihood" not in output, "progress bars come from every rank"
    code, output = workplace.tool(
        "evaluate",
        reference_fsdp,
        "--stage",
        GROW,
        "--include",
        LOCAL,
        "--tasks",
        TASKS[2],
    )
    assert code == 0, output
    record = seal.read_json(RunFolder(reference_fsdp).eval_file(GROW))
    assert record is not None
    grown_weights = seal.read_seal(grown)
    assert grown_weights is not None
    assert record["weights"] == weights_hash(grown_weights["tensors"])
    assert_same_metrics(
        record, metrics(exported(workplace, grown, tmp_path / "hf", monkeypatch))
    )
    assert record["tokens"] == 20480
    code, output = workplace.tool(
        "evaluate", grown, "--include", LOCAL, "--tasks", TASKS[0], "--limit", 3
    )
    assert code == 0, output
    assert seal.read_json(RunFolder(reference_fsdp).eval_file(GROW)) == record, (
        "a try replaces no result"
    )
    tried = seal.read_json(RunFolder(reference_fsdp).eval_file(GROW, 3))
    assert tried is not None
    assert (tried["tasks"][TASKS[0]]["examples"], tried["tasks"].keys()) == (
        3,
        {TASKS[0]},
    )
    after = {
        p: p.stat().st_mtime_ns
        for p in reference_fsdp.glob("stage-*/**/*")
        if p.is_file() and TENSORBOARD not in p.parts
    }
    assert after == {p: t for p, t in before.items() if p in after}, (
        "nothing of the run itself is touched"
    )

    wrong = workplace.tool(
        "evaluate", reference_fsdp, "--include", LOCAL, "--tasks", "local_generation"
    )
    assert wrong[0] == 2
    assert 'eval.tasks: "local_generation" generates text' in wrong[1]
    code, told = workplace.tool("evaluate", reference_fsdp, "--limit", 0)
    assert (code, "0 is not a number of at least 1" in told) == (2, True)
    code, told = workplace.tool("evaluate", grown, "--stage", BASE)
    assert (code, "is a checkpoint already; leave out --stage and --step" in told) == (
        65,
        True,
    )
    code, told = workplace.tool("evaluate", "store")
    assert (code, "neither a run nor a checkpoint of one" in told) == (65, True)


def test_results_that_cannot_be_written_are_told_before_any_task_is_loaded(
    workplace: Workplace, reference: Path, tmp_path: Path
) -> None:
    shutil.copytree(reference, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    results = run.eval_file(f"{TARGET}-step-20")

    def told() -> str:
        code, output = workplace.tool(
            "evaluate", run.path, "--include", LOCAL, "--tasks", "local_absent"
        )
        assert code == 74, output
        (line,) = output.splitlines()
        return line

    run.eval.touch()
    assert f"{results} cannot be written: {run.eval} is no folder" in told()
    run.eval.unlink()
    results.mkdir(parents=True)
    assert f"{results} cannot be written: it is a folder" in told()
    assert not run.log_file(0, "evaluate").exists()


def test_task_files_that_a_recipe_or_a_run_names_are_not_run_unasked(
    workplace: Workplace, reference: Path, tmp_path: Path
) -> None:
    """They can be code; a folder that the user names on the command line is the user's."""
    planted, mark = workplace.folder / "planted", tmp_path / "executed"
    planted.mkdir()
    (planted / "task.yaml").write_text(
        "task: planted\ncustom_dataset: !function code.run\n", encoding="utf-8"
    )
    (planted / "code.py").write_text(
        f"open({str(mark)!r}, 'w').close()\nrun = None\n", encoding="utf-8"
    )
    table = '\n[eval]\ntasks = ["planted"]\ninclude = "planted"\n'
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    file = RunFolder(run).recipe_file
    file.write_text(file.read_text(encoding="utf-8") + table, encoding="utf-8")
    (workplace.folder / "planted.toml").write_text(RECIPE + table, encoding="utf-8")

    for code, output in (
        workplace.tool("evaluate", run),
        workplace.tool(
            "run_recipe", "planted.toml", "--set", f"run.folder={tmp_path}/new"
        ),
    ):
        assert code == 2, output
        assert (
            'eval.include: "planted" names task files, which can contain code' in output
        )
        assert "Traceback" not in output
    assert not mark.exists()
    workplace.tool("evaluate", run, "--set", "eval.include=planted")
    assert mark.exists(), "it was named"
