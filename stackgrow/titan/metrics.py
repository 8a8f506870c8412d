"""What a train stage records: metrics.jsonl, validation.jsonl, charts, torchtitan's log and the progress line."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.distributed import ParallelDims
from torchtitan.tools.utils import device_type

from stackgrow.process.progress import Progress
from stackgrow.run_folder.folder import METRICS, VALIDATION
from stackgrow.run_folder.lines import RecordWriter
from stackgrow.titan.charts import open_charts
from stackgrow.titan.job import StageJob, StageJobConfig
from stackgrow.titan.pace import Pace


class StageMetrics(MetricsProcessor):
    """torchtitan's processor, which here only measures and logs a line, with the stage's own records beside it.

    Its loggers are not used: the third argument, which torchtitan gives its model's arguments, becomes part of every
    tag there, and x would be the stage's step.
    """

    def __init__(
        self,
        job_config: StageJobConfig,
        parallel_dims: ParallelDims,
        model_args: Any = None,
    ):
        super().__init__(job_config, parallel_dims)
        assert job_config.stage_job is not None
        self.job: StageJob = job_config.stage_job
        self.is_rank0 = dist.get_rank() == 0
        self.pace = Pace()
        self.progress = Progress(
            self.job.stage.name, self.job.stage.steps, enabled=self.is_rank0
        )
        self.losses: dict[
            int, float
        ] = {}  # by their steps: those that decide when the stage ends
        self._last_logged = 0  # step
        # On rank 0, once training begins:
        self._metrics: RecordWriter | None = None
        self._validation: RecordWriter | None = None
        self._charts: list[Any] = []

    def resume(self, step: int, sealed: Mapping[str, Any] | None) -> None:
        """Opens the records at the step that training goes on from; ``sealed``: what the seal of the stage's own
        checkpoint states of them, see ``sealed()``, or None where none was loaded."""
        self._last_logged = step
        self.progress.start(step)
        if not self.is_rank0:
            return
        # A checkpoint of step 0 that is there already was made by the session before.
        made_before = step == 0 and sealed is not None
        if self.job.on_resume and not made_before:
            self.job.on_resume(step)
        files = self.job.files
        self._metrics = RecordWriter(files.metrics_file, _stated(sealed, METRICS))
        self._validation = RecordWriter(
            files.validation_file, _stated(sealed, VALIDATION)
        )
        self._charts = open_charts(self.job, self.job_config)

    def sealed(self) -> dict[str, Any]:
        """What the seal of a checkpoint states of the records up to its step; on rank 0."""
        sealed = {}
        if self._metrics:
            sealed[METRICS] = self._metrics.sealed()
        if self._validation:
            sealed[VALIDATION] = self._validation.sealed()
        return sealed

    def should_log(self, step: int) -> bool:
        return (
            super().should_log(step)
            or step == self.job.stage.steps
            or self._looks_at(step)
        )

    def _looks_at(self, step: int) -> bool:
        until = self.job.stage.until
        return until is not None and until.looks_at(step)

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Collective. ``extra_metrics``: the learning rate, and what the guard says of the step."""
        record: dict[str, Any] = {
            **self.job.stage.place(step),
            "time": round(time.time(), 3),
            "loss": global_avg_loss,
            "max_loss": global_max_loss,
            "grad_norm": grad_norm,
            **self._speed(step),
        }
        record["data"] = self.job.data.order.seen(record["position"])
        record |= extra_metrics or {}
        if self.job.stage.mask:
            record["mask"] = self.job.stage.mask_value(step)
        if self.job.stage.new_rate:
            record["lr_new"] = self.job.stage.new_learning_rate(step)

        super().log(
            step, global_avg_loss, global_max_loss, grad_norm
        )  # and begins to measure anew
        self._last_logged = step
        if self._looks_at(step) and math.isfinite(global_avg_loss):
            self.losses[step] = global_avg_loss
        if self._metrics:
            self._metrics.write(record)
        for chart in self._charts:
            chart.train(record)
        self.progress.update(record)

    def _speed(self, step: int) -> dict[str, Any]:
        """Since the step that was logged last. MFU is the share of the GPUs' peak, as torchtitan counts both."""
        seconds = time.perf_counter() - self.time_last_log
        data_ranks = self.parallel_dims.dp_replicate * self.parallel_dims.dp_shard
        tokens_per_second = self.ntokens_since_last_log * data_ranks / seconds
        waits = self.pace.compare(
            sum(self.data_loading_times),
            step - self._last_logged,
            torch.device(device_type),
        )
        speed = {
            "tps": tokens_per_second,
            "memory_gib": self.device_memory_monitor.get_peak_stats().max_reserved_gib,
            "data_wait": waits.data,
            "lag": waits.lag,
            "slowest_rank": waits.slowest_rank,
        }
        if torch.cuda.is_available():
            peak = self.gpu_peak_flops * dist.get_world_size()
            speed["mfu"] = self.num_flops_per_token * tokens_per_second / peak
        return speed

    def log_validation(
        self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None
    ) -> None:
        super().log_validation(loss, step, extra_metrics)
        record = {
            **self.job.stage.place(step),
            "time": round(time.time(), 3),
            "loss": loss,
        }
        if self._validation:
            self._validation.write(record)
        for chart in self._charts:
            chart.validation(record)
        self.progress.validated(step, loss)

    def close(self) -> None:
        super().close()
        self.progress.close()
        for chart in self._charts:
            chart.close()
        if self._metrics:
            self._metrics.close()
        if self._validation:
            self._validation.close()


def _stated(sealed: Mapping[str, Any] | None, name: str) -> dict[str, Any] | None:
    return None if sealed is None else dict(sealed.get(name, {}))
