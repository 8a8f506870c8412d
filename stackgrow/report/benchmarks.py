"""The benchmarks of runs: of each task the metric that speaks for it, its standard error, and what guessing gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackgrow.errors import DamagedError
from stackgrow.evaluate.tasks import MEANS, SEVEN, headline
from stackgrow.run_folder.evaluations import read_evaluation
from stackgrow.run_folder.folder import RunFolder

MEAN = "mean of seven"
TITLES = {  # of the means in a record
    "seven_task_mean": MEAN,
    "ten_task_mean": "mean of ten",
    "table_6_mean": "mean of Table 6",
    "table_7_mean": "mean of Table 7",
}
# One over the number of answers that a question offers; of Lambada's last word there is nothing to choose from.
CHANCE = {
    "lambada_openai": 0.0,
    "arc_challenge": 0.25,
    "arc_easy": 0.25,
    "logiqa": 0.25,
    "piqa": 0.5,
    "sciq": 0.25,
    "winogrande": 0.5,
    "hellaswag": 0.25,
    "mmlu": 0.25,
    "boolq": 0.5,
    "openbookqa": 0.25,
}


@dataclass(frozen=True)
class Score:
    """The value of a metric and its standard error over the task's examples, where that is known."""

    value: float
    error: float | None = None

    def __str__(self) -> str:
        if self.error is None:
            return f"{self.value:.4f}"
        return f"{self.value:.4f} ± {self.error:.4f}"


Scores = dict[str, Score]  # by "task metric", such as "sciq acc_norm"


def last_scores(run: Path) -> Scores:
    """The scores of the checkpoint that saw the most tokens; {} where none was evaluated."""
    record = _last_record(run)
    if record is None:
        return {}
    scores = {}
    for task, metrics in record["tasks"].items():
        metric = headline(task, metrics)
        if metric:
            scores[f"{task} {metric}"] = Score(
                metrics[metric], metrics.get(f"{metric}_stderr")
            )
    for name, title in TITLES.items():
        if record.get(name) is not None:
            scores[title] = Score(record[name])
    return scores


def _last_record(run: Path) -> dict[str, Any] | None:
    """Of the results for one checkpoint, those of all examples come after those of a try on a few."""
    records = []
    for file in RunFolder(run).eval_files():
        record = read_evaluation(file)
        _check(record, file)
        records.append(record)
    return max(
        records,
        key=lambda record: (record["tokens"], record["step"], not record.get("limit")),
        default=None,
    )


def _check(record: Any, file: Path) -> None:
    """DamagedError for what holds no results: a stranger's file may hold anything."""
    numbers = []
    if isinstance(record, dict):
        numbers = [record.get("tokens"), record.get("step")]
        numbers += [record.get(name) or 0.0 for name in MEANS]
        tasks = record.get("tasks")
        for metrics in tasks.values() if isinstance(tasks, dict) else [None]:
            numbers += metrics.values() if isinstance(metrics, dict) else [None]
    if not numbers or not all(isinstance(number, int | float) for number in numbers):
        raise DamagedError(
            f"{file} holds no results of benchmarks; restore it or remove it"
        )


def chance(benchmark: str) -> float | None:
    """What guessing gives on ``benchmark``, "task metric"; None where it is not known."""
    if benchmark == MEAN:
        return sum(CHANCE[task] for task in SEVEN) / len(SEVEN)
    task, _, metric = benchmark.rpartition(" ")
    return CHANCE.get(task) if metric.startswith("acc") else None


def benchmark_rows(evaluations: Mapping[str, Scores]) -> list[tuple[str, ...]]:
    """A run a line, a benchmark a column; the first line is the head, and the last what guessing gives, where that is
    known of any."""
    names: list[str] = []
    for scores in evaluations.values():
        names += [name for name in scores if name not in names]
    rows = [("run", *names)]
    for run, scores in evaluations.items():
        cells = [str(scores[name]) if name in scores else "-" for name in names]
        rows.append((run, *cells))
    guesses = [chance(name) for name in names]
    if any(guess is not None for guess in guesses):
        rows.append(
            ("chance", *("-" if guess is None else f"{guess:.4f}" for guess in guesses))
        )
    return rows
