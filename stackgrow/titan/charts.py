"""What a person watches while a run trains: TensorBoard and Weights & Biases, from the records of a stage.

x is where the whole run is, in tokens: the stages, each in a folder of its own, lie one after another in one chart, and
what growth does to the curve is seen. The loss is there a second time over GFLOPs, to compare runs of unequal models.

TensorBoard's file is made from metrics.jsonl and validation.jsonl, which are the truth. A resumed stage writes it anew,
so that no step is in it twice and none is missing that a killed process had not flushed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.writer import FileWriter
from torchtitan.components.metrics import WandBLogger

from stackgrow.recipe.write import canonical_hash
from stackgrow.run_folder.folder import EVAL
from stackgrow.run_folder.lines import read_records
from stackgrow.titan.job import StageJob, StageJobConfig

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 30
# Key of a record -> tag: TensorBoard puts tags that share what is before the slash under one heading.
TRAIN_TAGS = {
    "loss": "loss/train",
    "max_loss": "loss/worst_rank",
    "grad_norm": "train/grad_norm",
    "lr": "train/learning_rate",
    "mask": "train/growth_mask",
    "tps": "speed/tokens_per_second",
    "mfu": "speed/mfu",
    "data_wait": "speed/data_wait_seconds",
    "lag": "speed/slowest_rank_lag_seconds",
    "memory_gib": "speed/memory_gib",
}
VALIDATION_TAGS = {"loss": "loss/validation"}
TRAIN_LOSS_BY_FLOPS = "loss_by_gflops/train"
VALIDATION_LOSS_BY_FLOPS = "loss_by_gflops/validation"


class Point(NamedTuple):
    tag: str
    x: int
    value: float


def train_points(record: Mapping[str, Any]) -> list[Point]:
    """What a record of metrics.jsonl shows."""
    return _points(record, TRAIN_TAGS, TRAIN_LOSS_BY_FLOPS)


def validation_points(record: Mapping[str, Any]) -> list[Point]:
    """What a record of validation.jsonl shows."""
    return _points(record, VALIDATION_TAGS, VALIDATION_LOSS_BY_FLOPS)


def _points(
    record: Mapping[str, Any], tags: Mapping[str, str], loss_by_flops: str
) -> list[Point]:
    points = [Point(loss_by_flops, round(record["flops"] / 1e9), record["loss"])]
    for key, tag in tags.items():
        if record.get(key) is not None:
            points.append(Point(tag, record["tokens"], record[key]))
    return points


class TensorBoard:
    """The event file of one stage, in ``StageFolder.tensorboard``."""

    def __init__(self, job: StageJob):
        files = job.files
        for earlier in files.tensorboard.rglob("events.out.tfevents.*"):
            if earlier.parent.name != EVAL:  # benchmarks have a file of their own
                earlier.unlink()
        self.writer = FileWriter(str(files.tensorboard), flush_secs=FLUSH_SECONDS)
        for record in read_records(files.metrics_file):
            self.train(record)
        for record in read_records(files.validation_file):
            self.validation(record)

    def train(self, record: Mapping[str, Any]) -> None:
        self._write(record, train_points(record))

    def validation(self, record: Mapping[str, Any]) -> None:
        self._write(record, validation_points(record))

    def _write(self, record: Mapping[str, Any], points: list[Point]) -> None:
        values: dict[
            int, list[Summary.Value]
        ] = {}  # at each x: one event holds them all, and costs as much as one
        for point in points:
            values.setdefault(point.x, []).append(
                Summary.Value(tag=point.tag, simple_value=point.value)
            )
        for x, of_x in values.items():
            self.writer.add_summary(Summary(value=of_x), x, record.get("time"))

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """The stage as a run of wandb, in the group of the recipe's name, through torchtitan's logger.

    The variables WANDB_PROJECT, WANDB_RUN_GROUP and so on are the user's. A resumed stage goes on with its wandb run,
    which passes over the steps that it has.
    """

    def __init__(self, job: StageJob, config: StageJobConfig):
        folder = str(job.folder.absolute())
        defaults = {
            "WANDB_PROJECT": "stackgrow",
            "WANDB_RUN_GROUP": job.recipe.name,
            "WANDB_RUN_NAME": f"{job.recipe.name} {job.stage.name}",
            "WANDB_RUN_ID": canonical_hash([folder, job.stage_hash])[:16],
            "WANDB_RESUME": "allow",
        }
        ours = {
            name: value for name, value in defaults.items() if name not in os.environ
        }
        os.environ.update(ours)
        try:
            self.logger = WandBLogger(folder, config)
        finally:
            for name in ours:  # the next stage has its own
                del os.environ[name]

    def train(self, record: Mapping[str, Any]) -> None:
        self._write(record, TRAIN_TAGS)

    def validation(self, record: Mapping[str, Any]) -> None:
        self._write(record, VALIDATION_TAGS)

    def _write(self, record: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        values = {
            tag: record[key] for key, tag in tags.items() if record.get(key) is not None
        }
        values["gflops"] = record["flops"] / 1e9  # to be chosen as x
        self.logger.log(values, record["tokens"])

    def close(self) -> None:
        self.logger.close()


def open_charts(
    job: StageJob, config: StageJobConfig
) -> list[TensorBoard | WeightsAndBiases]:
    """What the recipe's [log] asks for, at the step that training goes on from; on rank 0."""
    charts: list[TensorBoard | WeightsAndBiases] = []
    if job.recipe.log.tensorboard:
        charts.append(TensorBoard(job))
    if job.recipe.log.wandb:
        try:
            charts.append(WeightsAndBiases(job, config))
        except Exception as error:  # whatever wandb raises: training does not need it
            logger.warning(
                "Nothing is sent to wandb (%s): run `wandb login`, or set WANDB_MODE=offline",
                error,
            )
    return charts
