"""lm-eval's tasks: the paper's, those that a recipe names, and the checks before anything starts. No torch.

The paper calls its metric "Acc" and does not say which. Its Table 3 stands beside TinyLlama's results, which are
length-normalized (acc_norm), and its Pythia-1B has the acc_norm of that model, not its acc (ARC-e 47.26, SciQ 77.3).
So it is acc_norm here where lm-eval has one. The average is the plain mean of the seven accuracies (Figure 16),
Wikitext's perplexity apart.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from stackgrow.growth import own
from stackgrow.recipe.keys import Eval
from stackgrow.recipe.load import Problem, is_set

# Task: its folder in lm-eval, its metric.
PAPER = {
    "lambada_openai": ("lambada", "acc"),
    "arc_challenge": ("arc", "acc_norm"),
    "arc_easy": ("arc", "acc_norm"),
    "logiqa": ("logiqa", "acc_norm"),
    "piqa": ("piqa", "acc_norm"),
    "sciq": ("sciq", "acc_norm"),
    "winogrande": ("winogrande", "acc"),
    "wikitext": ("wikitext", "word_perplexity"),
}
SEVEN = [task for task, (_, metric) in PAPER.items() if metric != "word_perplexity"]
# What the average of the paper's 7B takes beside the seven (Figures 5b and 19). The paper does not say which of
# TruthfulQA's scores it is: the one here is that of the leaderboards of its time.
MORE_OF_THE_7B = {
    "hellaswag": ("hellaswag", "acc_norm"),
    "truthfulqa_mc2": ("truthfulqa", "acc"),
    "mmlu": ("mmlu/default", "acc"),
}
TEN = [*SEVEN, *MORE_OF_THE_7B]
# What Table 6, of a 7B after 130B tokens, has beside those.
MORE_OF_TABLE_6 = {
    "boolq": ("super_glue/boolq", "acc"),
    "openbookqa": ("openbookqa", "acc_norm"),
}
TABLE_6 = [*SEVEN, "hellaswag", *MORE_OF_TABLE_6]
TABLE_7 = [task for task in SEVEN if task != "winogrande"]  # of Samba
KNOWN = {**PAPER, **MORE_OF_THE_7B, **MORE_OF_TABLE_6}
# Names in [eval] tasks that stand for several.
SETS = {
    "paper": list(PAPER),
    "paper_7b": [*PAPER, *MORE_OF_THE_7B],
    "paper_table_6": [*TABLE_6, "wikitext"],
    "paper_table_7": TABLE_7,
}
# The means that the paper states, by their names in a record: the first always, others where all their tasks are there.
MEANS = {
    "seven_task_mean": SEVEN,
    "ten_task_mean": TEN,
    "table_6_mean": TABLE_6,
    "table_7_mean": TABLE_7,
}
HEADLINES = (
    "acc_norm",
    "acc",
    "word_perplexity",
)  # of any other task, the first that it has


def headline(task: str, metrics: Mapping[str, float]) -> str:
    """The metric that speaks for a task; "" for a group that has none."""
    candidates = list(HEADLINES)
    if task in KNOWN:
        candidates.insert(0, KNOWN[task][1])
    candidates += metrics
    for name in candidates:
        if name in metrics:
            return name
    return ""


def mean(
    tasks: Sequence[str], results: Mapping[str, Mapping[str, float]]
) -> float | None:
    """The plain mean of the accuracies of ``tasks``, one of MEANS, as a fraction; None unless all are there."""
    if not all(task in results for task in tasks):
        return None
    return sum(results[task][KNOWN[task][1]] for task in tasks) / len(tasks)


def means(results: Mapping[str, Mapping[str, float]]) -> dict[str, float | None]:
    """The paper's means of ``results``. Table 7's six are part of the seven, and averaged only where these are not."""
    found = {"seven_task_mean": mean(SEVEN, results)}
    for name, tasks in MEANS.items():
        value = mean(tasks, results)
        is_part_of_seven = tasks == TABLE_7 and found["seven_task_mean"] is not None
        if value is not None and not is_part_of_seven:
            found[name] = value
    return found


def task_names(tasks: Sequence[str]) -> tuple[str, ...]:
    """``tasks`` with the names of SETS written out, each once."""
    names: dict[str, None] = {}
    for task in tasks:
        names.update(dict.fromkeys(SETS.get(task, [task])))
    return tuple(names)


def trust_problems(wanted: Eval | None, sets: Sequence[str]) -> Iterator[Problem]:
    """A task file can hold code ("!function"), and one that a recipe or a run names may be a stranger's. It runs where
    the user has named its folder, or given --trust."""
    if (
        wanted is None
        or not wanted.include
        or own.trusted()
        or is_set("eval.include", sets)
    ):
        return
    rule = "names task files, which can contain code; read them, then give --set eval.include=... or --trust"
    yield "eval.include", f'"{wanted.include}" {rule}'


def problems(wanted: Eval) -> Iterator[Problem]:
    """Why the tasks cannot be run; those that can are loaded, which brings their data to this machine."""
    if importlib.util.find_spec("lm_eval") is None:
        yield (
            "eval.tasks",
            'need lm-eval, which is not installed: pip install "stackgrow[eval]", or train without benchmarks: remove '
            "[eval], or give --set eval.tasks=[]",
        )
        return
    if wanted.include and not Path(wanted.include).is_dir():
        yield "eval.include", f"{wanted.include} is not a folder"
        return
    names = task_names(wanted.tasks)
    known = _manager(names, wanted.include).all_tasks
    unknown = [name for name in names if name not in known]
    for name in unknown:
        close = difflib.get_close_matches(name, [*known, *KNOWN, *SETS], n=1)
        suggestion = f'; did you mean "{close[0]}"?' if close else ""
        yield "eval.tasks", f'lm-eval has no "{name}"{suggestion}'
    if unknown:
        return
    try:
        loaded = load_tasks(names, wanted.include)["tasks"]
    except Exception as error:  # whatever a hub, a file or a task's own code raises
        yield (
            "eval.tasks",
            f"cannot be loaded ({type(error).__name__}: {error}); is its data on this machine? "
            "--set eval.tasks=[] trains without benchmarks",
        )
        return
    for name, task in loaded.items():
        if task.OUTPUT_TYPE == "generate_until":
            yield (
                "eval.tasks",
                f'"{name}" generates text; only tasks that score given text are supported',
            )


@lru_cache
def load_tasks(names: tuple[str, ...], include: str) -> Any:
    """lm-eval's own loaded tasks and groups, without few-shot examples where they do not state a number."""
    loaded = _manager(names, include).load(list(names))
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)  # as lm-eval's own command does
    return loaded


@lru_cache
def _manager(names: tuple[str, ...], include: str) -> Any:
    """lm-eval's task manager. It takes half a minute to index all its 14,000 tasks, so it is shown the folders that
    are needed where those are known."""
    from lm_eval import tasks

    folders = [include] if include else []
    own = tasks.TaskManager(include_path=folders, include_defaults=False).all_tasks
    rest = set(names) - set(own)
    if not rest <= KNOWN.keys():
        return tasks.TaskManager(include_path=folders)
    theirs = {str(Path(tasks.__file__).parent / KNOWN[name][0]) for name in rest}
    return tasks.TaskManager(
        include_path=[*sorted(theirs), *folders], include_defaults=False
    )
