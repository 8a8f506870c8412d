"""What a train stage records: torchtitan's metrics, metrics.jsonl, validation.jsonl and the progress line."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.distributed import ParallelDims

from stackgrow.process.progress import Progress
from stackgrow.run_folder.folder import METRICS, VALIDATION
from stackgrow.run_folder.lines import RecordWriter


class StageMetrics(MetricsProcessor):
    """torchtitan's processor (TensorBoard, log) with the stage's own records beside it."""

    def __init__(self, job_config: Any, parallel_dims: ParallelDims, *args: Any, **kwargs: Any):
        super().__init__(job_config, parallel_dims, *args, **kwargs)
        self.job = job_config.stage_job
        self.rank0 = dist.get_rank() == 0
        self.progress = Progress(self.job.stage.name, self.job.stage.steps, enabled=self.rank0)
        self.losses: dict[int, float] = {}  # by their steps: those that decide when the stage ends
        self._metrics: RecordWriter | None = None
        self._validation: RecordWriter | None = None

    def resume(self, step: int, sealed: Mapping[str, Any] | None) -> None:
        """Opens the records at the step that training goes on from; ``sealed``: what the seal of the stage's own
        checkpoint states of them, see ``sealed()``, or None where none was loaded."""
        self.progress.start(step)
        if self.rank0:
            if self.job.on_resume:
                self.job.on_resume(step)
            self._metrics = RecordWriter(self.job.folder / METRICS, _stated(sealed, METRICS))
            self._validation = RecordWriter(self.job.folder / VALIDATION, _stated(sealed, VALIDATION))

    def sealed(self) -> dict[str, Any]:
        """What the seal of a checkpoint states of the records up to its step; on rank 0."""
        writers = {METRICS: self._metrics, VALIDATION: self._validation}
        return {name: writer.sealed() for name, writer in writers.items() if writer}

    def should_log(self, step: int) -> bool:
        return super().should_log(step) or step == self.job.stage.steps or self._looks_at(step)

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
        seconds = time.perf_counter() - self.time_last_log
        parallel = self.parallel_dims
        tps = self.ntokens_since_last_log * parallel.dp_replicate * parallel.dp_shard / seconds
        record: dict[str, Any] = {
            **self.job.stage.place(step),
            "loss": global_avg_loss,
            "max_loss": global_max_loss,
            "grad_norm": grad_norm,
            "tps": tps,
            "memory_gib": self.device_memory_monitor.get_peak_stats().max_reserved_gib,
        }
        record["data"] = self.job.data.order.seen(record["position"])
        record |= extra_metrics or {}
        if self.job.stage.mask:
            record["mask"] = self.job.stage.mask_value(step)
        shown = {name: record[name] for name in ("tokens", "lr", "mask") if name in record}
        super().log(step, global_avg_loss, global_max_loss, grad_norm, shown)
        if self._metrics:
            self._metrics.write(record)
        if self._looks_at(step) and math.isfinite(global_avg_loss):
            self.losses[step] = global_avg_loss
        self.progress.update(record)

    def log_validation(self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None) -> None:
        super().log_validation(loss, step, extra_metrics)
        if self._validation:
            self._validation.write({**self.job.stage.place(step), "loss": loss})
        self.progress.validated(step, loss)

    def close(self) -> None:
        super().close()
        self.progress.close()
        for writer in (self._metrics, self._validation):
            if writer:
                writer.close()


def _stated(sealed: Mapping[str, Any] | None, name: str) -> dict[str, Any] | None:
    return None if sealed is None else dict(sealed.get(name, {}))
