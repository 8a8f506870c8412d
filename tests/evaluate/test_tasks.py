"""Which tasks there are, what is told of those that there are not, and the paper's mean."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from stackgrow.evaluate import tasks
from stackgrow.evaluate.evaluation import _metrics, unchanged_generators
from stackgrow.recipe.keys import Eval

pytest.importorskip("lm_eval")

LOCAL = str(Path(__file__).with_name("tasks"))


def test_the_papers_tasks_are_lm_evals_and_have_their_metrics() -> None:
    manager = tasks._manager(tuple(tasks.KNOWN), "")
    assert set(tasks.KNOWN) <= set(manager.all_tasks)
    for name, (_, metric) in tasks.KNOWN.items():
        file = manager.task_index[name].yaml_path
        text = file.read_text() + (
            file.with_name("arc_easy.yaml").read_text()
            if name == "arc_challenge"
            else ""
        )
        assert f"metric: {metric}\n" in text, name
        assert ("metric: acc_norm" in text) == (metric == "acc_norm"), (
            "length-normalized wherever lm-eval has it"
        )
    assert tasks.task_names(["wikitext", "paper", "mine"]) == (
        "wikitext",
        *list(tasks.PAPER)[:-1],
        "mine",
    )


def test_the_7b_is_averaged_over_ten() -> None:
    assert tasks.task_names(["paper_7b"]) == (
        *tasks.PAPER,
        "hellaswag",
        "truthfulqa_mc2",
        "mmlu",
    )
    assert len(tasks.TEN) == 10
    results = {
        task: {tasks.KNOWN[task][1]: 0.1 * number}
        for number, task in enumerate(tasks.TEN)
    }
    assert tasks.mean(tasks.TEN, results) == pytest.approx(0.45)
    assert tasks.mean(tasks.SEVEN, results) == pytest.approx(0.3)


def test_mean_of_seven_is_that_of_figure_3() -> None:
    """G_stack's column: 52.80; a missing task leaves none."""
    values = dict(
        zip(tasks.SEVEN, (48.20, 29.18, 54.25, 28.87, 71.98, 81.1, 56.03), strict=True)
    )
    results = {
        task: {tasks.PAPER[task][1]: value, "acc_stderr": 1.0}
        for task, value in values.items()
    }
    mean = tasks.mean(tasks.SEVEN, {**results, "wikitext": {"word_perplexity": 16.73}})
    assert mean == pytest.approx(52.80, abs=0.005)
    assert (
        tasks.mean(tasks.SEVEN, {k: v for k, v in results.items() if k != "piqa"})
        is None
    )
    assert tasks.mean(tasks.TEN, results) is None


def scores(tasks_and_values: dict[str, float]) -> dict[str, dict[str, float]]:
    """As lm-eval gives them, each in its task's metric."""
    return {
        task: {tasks.KNOWN[task][1]: value} for task, value in tasks_and_values.items()
    }


def test_means_of_tables_6_and_7_are_the_papers() -> None:
    """Of G_stack's 7B at 130B tokens; of Samba, from scratch and stacked: to the digits of the tables."""
    values = (57.93, 35.24, 63.64, 26.88, 76.82, 85.9, 62.75, 65.85, 66.45, 36.40)
    table_6 = scores(dict(zip(tasks.TABLE_6, values, strict=True)))
    found = tasks.means(table_6)
    assert found.keys() == {"seven_task_mean", "table_6_mean"}
    assert found["table_6_mean"] == pytest.approx(57.79, abs=0.005)

    for values, printed in (
        ((36.41, 25.34, 43.77, 27.50, 67.36, 70.00), 45.06),
        ((38.44, 26.19, 44.95, 26.88, 67.95, 72.80), 46.20),
    ):
        found = tasks.means(scores(dict(zip(tasks.TABLE_7, values, strict=True))))
        assert found["seven_task_mean"] is None
        assert found["table_7_mean"] == pytest.approx(printed, abs=0.005)


def test_headline_is_the_metric_that_speaks_for_a_task() -> None:
    assert tasks.headline("winogrande", {"acc_norm": 1.0, "acc": 0.5}) == "acc"
    assert tasks.headline("other", {"acc": 0.5, "acc_norm": 1.0}) == "acc_norm"
    assert tasks.headline("other", {"f1": 0.5}) == "f1"
    assert tasks.headline("group", {}) == ""


CASES: dict[str, tuple[Callable[[], Eval], str, str]] = {
    "unknown": (lambda: Eval(tasks=("local_choise",), include=LOCAL), "eval.tasks", 'no "local_choise"; did you mean "local_choice"?'),
    "no folder": (lambda: Eval(tasks=("x",), include="nowhere"), "eval.include", "nowhere is not a folder"),
    "generates": (lambda: Eval(tasks=("local_generation",), include=LOCAL), "eval.tasks", '"local_generation" generates text'),
    "no data": (lambda: Eval(tasks=("local_absent",), include=LOCAL), "eval.tasks", "cannot be loaded (FileNotFoundError: texts.jsonl)"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_evaluated_is_told(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, where, what = CASES[case]
    from lm_eval.tasks import TaskManager

    if case == "unknown":  # indexing all of lm-eval takes half a minute

        def folders_only(
            include_path: str, include_defaults: bool = False
        ) -> TaskManager:
            return TaskManager(None, include_path, False)

        monkeypatch.setattr("lm_eval.tasks.TaskManager", folders_only)
    [(told_where, told)] = tasks.problems(make())
    assert told_where == where
    assert what in told


def test_missing_lm_eval_is_told_with_its_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    assert list(tasks.problems(Eval(tasks=("sciq",)))) == [
        (
            "eval.tasks",
            'need lm-eval, which is not installed: pip install "stackgrow[eval]", or train without benchmarks: remove '
            "[eval], or give --set eval.tasks=[]",
        )
    ]


def test_local_tasks_have_no_problems_and_need_no_index_of_all() -> None:
    names = ("local_choice", "local_last_word", "local_rolling")
    assert list(tasks.problems(Eval(tasks=names, include=LOCAL))) == []
    assert len(tasks._manager(names, LOCAL).all_tasks) < 10


def test_metrics_have_plain_names_and_the_standard_error_of_a_mean() -> None:
    values = {
        "alias": "x",
        "acc,none": 0.25,
        "acc_stderr,none": "N/A",
        "perplexity,none": 3.0,
        "em,strict": 1,
    }
    hits = [1.0] * 2 + [0.0] * 6
    error = float(np.std(hits, ddof=1) / np.sqrt(8))
    expected = {
        "acc": 0.25,
        "perplexity": 3.0,
        "em,strict": 1.0,
        "acc_stderr": pytest.approx(error),
        "examples": 8,
    }
    assert _metrics(values, 8) == expected
    json.dumps(_metrics(values, 8))
    assert _metrics({"alias": "a group without a mean"}, 8) == {}


def test_random_generators_are_left_as_they_were() -> None:
    before = (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.random.get_rng_state().tolist(),
    )
    with unchanged_generators():
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(1)
    assert before == (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.random.get_rng_state().tolist(),
    )
