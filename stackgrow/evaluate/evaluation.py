"""The benchmarks of a run's checkpoints, on the run's own ranks: results into <run>/eval/*.json and TensorBoard."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from stackgrow import seal
from stackgrow.data.loader import WindowDataset
from stackgrow.data.store import StoreError, read_manifest
from stackgrow.data.tokenizer import store_tokenizer
from stackgrow.errors import DamagedError
from stackgrow.evaluate import tasks
from stackgrow.plan.checks import world_problems
from stackgrow.plan.stages import TrainStage
from stackgrow.process.logs import log_to
from stackgrow.process.ranks import from_rank0
from stackgrow.recipe.keys import Eval, Recipe
from stackgrow.recipe.load import RecipeError
from stackgrow.run_folder.choose import Chosen, choose, tokenizer_of
from stackgrow.run_folder.evaluations import (
    read_evaluation,
    weights_hash,
    write_evaluation,
)
from stackgrow.run_folder.folder import EVAL, RunFolder

if TYPE_CHECKING:
    from stackgrow.evaluate.lm import Score
    from stackgrow.titan.job import StageJob
    from stackgrow.titan.trainer import StageTrainer


@dataclass(frozen=True)
class Evaluation:
    """What [eval] wants of one train stage, which has hash ``stage_hash``, in run folder ``folder``."""

    recipe: Recipe
    stage_hash: str
    folder: Path

    @property
    def wanted(self) -> Eval:
        assert self.recipe.eval is not None
        return self.recipe.eval

    def after_step(self, trainer: StageTrainer) -> None:
        """Runs the benchmarks that [eval] has for the step that the trainer has made."""
        from stackgrow.evaluate.scorer import score
        from stackgrow.titan import session

        stage = trainer.stage_job.stage
        step = trainer.step
        if self.due(stage, step):
            session.at(f"{stage.name}, benchmarks after step {step}")
            self.run(
                stage,
                step,
                partial(score, trainer, batch=self.wanted.batch),
                _weights_hash(trainer),
            )

    def due(self, stage: TrainStage, step: int) -> bool:
        """Whether the stage is to be evaluated after ``step`` and has not been. Every rank must call it."""
        interval = self.wanted.interval
        at_interval = (
            interval is not None and step > 0 and step % stage.every(interval) == 0
        )
        evaluates_end = self.wanted.after == "each" or stage.model == self.recipe.model
        at_end = evaluates_end and step == stage.steps
        if not at_interval and not at_end:
            return False
        file = self._file(_checkpoint_name(stage, step))
        asked = from_rank0(lambda: self._before(file).get("asked", []))
        return not set(self._names) <= set(asked)

    def run(
        self,
        stage: TrainStage,
        step: int,
        score: Score,
        weights: str,
        grown: str | None = None,
    ) -> None:
        """Runs the tasks and writes their results for the weights with the hash ``weights``; ``grown`` names the grow
        stage whose output was loaded. Other tasks' results for the same weights stay. Collective; no random generator
        is left changed."""
        results = self._results(score, stage.seq_len)
        if dist.get_rank() != 0:
            return
        name = grown or stage.name
        file = self._file(grown or _checkpoint_name(stage, step))
        before = self._before(file)
        all_results = {**before.get("tasks", {}), **results}
        record = {
            **stage.place(step),
            "stage": name,
            "stage_hash": self.stage_hash,
            "weights": weights,
            "asked": sorted({*before.get("asked", []), *self._names}),
            "limit": self.wanted.limit,
            "tasks": all_results,
            **tasks.means(all_results),
        }
        write_evaluation(file, record)
        if self.recipe.log.tensorboard:
            _to_tensorboard(
                RunFolder(self.folder).stage(name).tensorboard / EVAL,
                results,
                record["tokens"],
            )
        print(f"{name}  step {step}  {_headlines(results)}", flush=True)

    @property
    def _names(self) -> tuple[str, ...]:
        return tasks.task_names(self.wanted.tasks)

    def _before(self, file: Path) -> dict[str, Any]:
        """Earlier results for the same weights."""
        try:
            record = read_evaluation(file)
        except DamagedError:
            return {}  # which this evaluation replaces
        return record if record.get("stage_hash") == self.stage_hash else {}

    def _file(self, checkpoint: str) -> Path:
        return RunFolder(self.folder).eval_file(checkpoint, self.wanted.limit)

    def _results(self, score: Score, max_length: int) -> dict[str, dict[str, float]]:
        """{task: {metric: value}} of all tasks, on every rank."""
        from lm_eval.evaluator import evaluate

        from stackgrow.evaluate.lm import StageLM

        manifest = read_manifest(self.recipe.data.stores[0][0])
        lm = StageLM(score, store_tokenizer(manifest), max_length)
        loaded = tasks.load_tasks(self._names, self.wanted.include)
        limit = self.wanted.limit or None
        # lm-eval's progress bars come from every rank; its warnings are in the logs.
        with unchanged_generators(), contextlib.redirect_stderr(io.StringIO()):
            found = evaluate(
                lm, loaded, limit=limit, bootstrap_iters=0, log_samples=False
            )
        assert found is not None
        results = {}
        for task, values in found["results"].items():
            counts = found["n-samples"].get(
                task, {"effective": 0}
            )  # a group has none of its own
            results[task] = _metrics(values, counts["effective"])
        return results


def _checkpoint_name(stage: TrainStage, step: int) -> str:
    return f"{stage.name}-{seal.step_name(step)}"


def _headlines(results: Mapping[str, Mapping[str, float]]) -> str:
    """Of each task the metric that speaks for it: "sciq acc_norm 0.8110, ..."."""
    parts = []
    for task, metrics in results.items():
        name = tasks.headline(task, metrics)
        if name:
            parts.append(f"{task} {name} {metrics[name]:.4f}")
    return ", ".join(parts)


@contextlib.contextmanager
def unchanged_generators() -> Iterator[None]:
    """Training goes on as if nothing had drawn random numbers in between, or seeded, as some tasks do."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)


def _weights_hash(trainer: StageTrainer) -> str:
    """Collective."""
    from stackgrow.titan.shards import fingerprints

    return weights_hash(fingerprints(trainer.checkpointer.weights()))


def _metrics(values: Mapping[str, Any], examples: int) -> dict[str, float]:
    """lm-eval's {"acc,none": 0.5, ...} with plain names, the number of examples, and accuracies' standard errors; of
    a group that has no mean, nothing."""
    metrics: dict[str, float] = {}
    for name, value in values.items():
        is_metric = (
            isinstance(value, (int, float)) and "," in name and "_stderr" not in name
        )
        if is_metric:
            metrics[name.removesuffix(",none")] = float(value)
    if not metrics:
        return {}
    for name, value in list(metrics.items()):
        if name.startswith("acc") and examples > 1:
            metrics[f"{name}_stderr"] = math.sqrt(value * (1 - value) / (examples - 1))
    metrics["examples"] = examples
    return metrics


def _to_tensorboard(
    folder: Path, results: Mapping[str, Mapping[str, float]], tokens: int
) -> None:
    """x is as in titan/charts.py."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for task, metrics in results.items():
            for name, value in metrics.items():
                writer.add_scalar(f"eval/{task}/{name}", value, tokens)


def evaluate_run(
    path: Path,
    *,
    stage: str | None = None,
    step: int | None = None,
    sets: Sequence[str] = (),
    **options: Any,
) -> None:
    """Evaluates a checkpoint of a run on the ranks that there are: the last of the last finished stage, or of
    ``stage``, or that of ``step``; or ``path`` is the checkpoint's own. ``sets`` change free keys of the recipe,
    ``options`` those of its [eval], which is the paper's tasks where there is none.

    Raises:
        RecipeError: tasks that there are not, or ranks that the model cannot be laid out on.
        RunError: no such checkpoint, or a damaged one, or no place where results can be written.
    """
    from stackgrow.titan import session
    from stackgrow.titan.job import StageJob

    chosen = choose(path, stage, step, sets)
    if chosen is None:
        raise DamagedError(f"{path} is neither a run nor a checkpoint of one; name one")
    folder = RunFolder(chosen.run)
    recipe = chosen.plan.recipe
    train_stage = chosen.train_stage
    grown = None if chosen.stage is train_stage else chosen.stage.name
    wanted = dataclasses.replace(recipe.eval or Eval(tasks=("paper",)), **options)

    # The tasks' data may be long in coming, and the scores longer.
    name = grown or _checkpoint_name(train_stage, chosen.step)
    results = folder.eval_file(name, wanted.limit)
    seal.require_writable(results if folder.eval.exists() else folder.eval)
    _check(chosen, wanted, trusted="include" in options, sets=sets)
    try:
        data = WindowDataset.open(recipe.data, recipe.seed)
    except StoreError as error:
        raise RecipeError(folder.recipe_file, [("data", str(error))]) from error
    tokenizer_of(recipe, chosen.run)  # that it is the run's store
    stage_hash = chosen.plan.stage_hashes(data.order.data_hash)[train_stage.name]

    log_to(folder.log_file(int(os.environ.get("RANK", "0")), "evaluate"))
    session.start(recipe, folder.logs)
    try:
        # The results go to TensorBoard, and nothing of a training that is none.
        quiet = dataclasses.replace(
            recipe, log=dataclasses.replace(recipe.log, tensorboard=False)
        )
        job = StageJob(
            quiet, train_stage, stage_hash, folder.stage(train_stage.name).path, data
        )
        evaluation = Evaluation(
            dataclasses.replace(recipe, eval=wanted), stage_hash, chosen.run
        )
        evaluate_checkpoint(evaluation, job, chosen.path, chosen.step, grown)
    finally:
        session.stop()


def _check(chosen: Chosen, wanted: Eval, *, trusted: bool, sets: Sequence[str]) -> None:
    """Raises RecipeError with all that prevents the evaluation. ``trusted``: the user has named the task files."""
    from stackgrow.titan import device

    plan = chosen.plan
    recipe_file = RunFolder(chosen.run).recipe_file
    train_stage = chosen.train_stage
    if train_stage.model != chosen.model or train_stage.learns_maps:
        what = '"start" grows the imported model before any stage trains it; export it and use lm_eval'
        raise RecipeError(recipe_file, [("growth[0].timing", what)])
    if not trusted:
        untrusted = list(tasks.trust_problems(wanted, sets))
        if untrusted:
            raise RecipeError(recipe_file, untrusted)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    problems = [
        *world_problems(plan, world_size),
        *device.problems(plan),
        *tasks.problems(wanted),
    ]
    if problems:
        raise RecipeError(recipe_file, problems)


def evaluate_checkpoint(
    evaluation: Evaluation,
    job: StageJob,
    checkpoint: Path,
    step: int,
    grown: str | None,
) -> None:
    """Runs ``evaluation`` on ``checkpoint``, which was saved at ``step`` of the job's stage or is its input, made by
    grow stage ``grown``."""
    from stackgrow.evaluate.scorer import score
    from stackgrow.titan.trainer import StageTrainer, free

    trainer = StageTrainer(job)
    try:
        trainer.checkpointer.load_weights(checkpoint)
        trainer.step = step
        trainer.set_mask()
        weights = _weights_hash(trainer)
        evaluation.run(
            job.stage,
            step,
            partial(score, trainer, batch=evaluation.wanted.batch),
            weights,
            grown,
        )
    finally:
        trainer.close()
    del trainer
    free()
