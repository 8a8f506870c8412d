"""What a stage costs beside plain torchtitan. (What growth costs: bench_growth.py.)

python tools/bench_overhead.py                      one process
torchrun --standalone --nproc-per-node 2 tools/bench_overhead.py

Trains the same model on the same batches, with torchtitan's own Trainer and as a stackgrow stage (data from a token
store, metrics, progress), step by step in turns.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import logging
import statistics
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import stackgrow.titan  # noqa: F401  (the device comes before torchtitan)

# isort: split
import torch
import torch.distributed as dist
from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.config import JobConfig
from torchtitan.models.llama3 import Transformer
from torchtitan.protocols import train_spec
from torchtitan.train import Trainer

from stackgrow.data.loader import WindowDataset
from stackgrow.plan.resolve import make_plan
from stackgrow.plan.stages import Plan, TrainStage
from stackgrow.recipe.load import load_recipe
from stackgrow.titan import job as jobs
from stackgrow.titan import session
from stackgrow.titan.checkpoint import checkpoint_config
from stackgrow.titan.model import model_args, parallelize
from stackgrow.titan.trainer import StageTrainer

WARM_UP = 3  # steps before the clock starts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/quickstart.toml", help="its last stage's model and batch are used")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=60, help="steps of each trainer")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps must be at least 2, for quartiles")
    plan = make_plan(load_recipe(arguments.recipe, [*arguments.set, "validation.sequences=0"]), arguments.recipe)
    with tempfile.TemporaryDirectory() as folder:
        session.start(plan.recipe, Path(folder))
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        stage = dataclasses.replace(plan.train_stages[-1], steps=WARM_UP + arguments.steps + 1)
        report = compare(job_of(plan, stage, Path(folder)))
        if dist.get_rank() == 0:
            print(json.dumps(report, indent=1) if arguments.json else render(report))
        dist.barrier()
    session.stop()


def job_of(plan: Plan, stage: TrainStage, folder: Path) -> jobs.StageJob:
    """The stage by itself, from random weights and the first token on."""
    stage = dataclasses.replace(stage, index=0, start_tokens=0, start_sequences=0, start_flops=0.0, mask=None)
    data = WindowDataset.open(plan.recipe.data, plan.recipe.seed)
    return jobs.StageJob(plan.recipe, stage, "bench", folder, data, None)


def compare(job: jobs.StageJob) -> dict[str, Any]:
    """Tokens per second over all ranks. The two trainers take turns after every step, so that whatever slows the
    machine for longer than a step meets both; the ratio is the median over pairs of neighbouring steps."""
    trainers = run(job, {"torchtitan": PlainTrainer, "stackgrow": TimedStage})
    seconds = {name: trainer.seconds[WARM_UP:] for name, trainer in trainers.items()}
    rates = {name: job.stage.train.global_batch_tokens / statistics.median(s) for name, s in seconds.items()}
    ratios = [theirs / ours for ours, theirs in zip(seconds["stackgrow"], seconds["torchtitan"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "ranks": dist.get_world_size(),
        "steps": len(ratios),
        **{f"{name}_tokens_per_second": round(rate, 1) for name, rate in rates.items()},
        "ratio": round(quartiles[1], 4),
        "ratio_quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
    }


def run(job: jobs.StageJob, kinds: dict[str, "type[PlainTrainer] | type[TimedStage]"]) -> dict[str, "Timed"]:
    """Trains the job to the step before its last, which would write the final checkpoint, once by each kind."""
    turns, failures = Turns(), list[BaseException]()

    def train(trainer: Timed) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_device(trainer.device)  # a new thread's is the first
        try:
            trainer.train()
        except BaseException as failure:  # of a thread: raised below, when the other has had its turn
            failures.append(failure)
            turns.hand_over(trainer, leave=True)

    with contextlib.redirect_stdout(io.StringIO()):
        trainers = {name: kind(job, turns) for name, kind in kinds.items()}
        threads = [threading.Thread(target=train, args=[trainer]) for trainer in trainers.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    return trainers


class Turns:
    """Lets one of two threads run at a time; each hands over after a step."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.members: list[object] = []
        self.now: object = None

    def join(self, member: object) -> None:
        self.members.append(member)
        self.now = self.members[0]

    def wait(self, member: object) -> None:
        with self.condition:
            self.condition.wait_for(lambda: self.now is member)

    def hand_over(self, member: object, *, leave: bool = False) -> None:
        """Wakes the other and waits for the turn to come back."""
        with self.condition:
            self.now = next((m for m in self.members if m is not member), member)
            if leave:
                self.members.remove(member)
            self.condition.notify_all()
            self.condition.wait_for(lambda: leave or self.now is member)


class Timed(Trainer):
    """Measures every step, with all that the loop does around it, and hands over after it."""

    def take_turns(self, turns: Turns) -> None:
        self.turns, self.seconds, self.started, self.peak_gib = turns, list[float](), 0.0, 0.0
        turns.join(self)

    def train(self) -> None:
        self.turns.wait(self)  # loading and validating are collective, too
        super().train()

    def should_continue_training(self) -> bool:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if self.step:
            self.seconds.append(time.perf_counter() - self.started)
            peak = self.metrics_processor.device_memory_monitor.get_peak_stats().max_active_gib
            self.peak_gib = max(self.peak_gib, peak)
        goes_on = self.step < self.job_config.training.steps - 1
        self.turns.hand_over(self, leave=not goes_on)
        self.started = time.perf_counter()
        return goes_on


class TimedStage(Timed, StageTrainer):
    """A stackgrow stage."""

    def __init__(self, job: jobs.StageJob, turns: Turns):
        super().__init__(job)
        self.take_turns(turns)


class PlainTrainer(Timed):
    """torchtitan's own Trainer, model, loss, metrics and checkpoint manager, on batches that are in memory already."""

    def __init__(self, job: jobs.StageJob, turns: Turns):
        config = jobs.job_config(job)
        plain = JobConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(JobConfig)})
        plain.model = dataclasses.replace(plain.model, name="plain")
        plain.checkpoint = dataclasses.replace(checkpoint_config(job), folder="plain")
        loader = jobs._build_loader
        spec = jobs._train_spec()
        memory = InMemory(job, loader, config)
        arguments = model_args(job.stage.model, job.recipe.seed)
        train_spec._extra_train_specs["plain"] = dataclasses.replace(
            spec,
            model_cls=Transformer,
            model_args={job.stage.name: arguments},
            parallelize_fn=parallelize,
            build_loss_fn=build_cross_entropy_loss,
            build_dataloader_fn=memory.build,
            build_metrics_processor_fn=None,
        )
        super().__init__(plain)
        self.take_turns(turns)


class InMemory:
    """The stage's own batches, read before the clock starts."""

    def __init__(self, job: jobs.StageJob, loader: Any, config: Any):
        self.job, self.loader, self.config = job, loader, config

    def build(self, *, dp_world_size: int, dp_rank: int, **_: Any) -> "InMemory":
        batches = iter(self.loader(dp_world_size=dp_world_size, dp_rank=dp_rank, job_config=self.config))
        per_step = self.job.stage.batch_sequences // (self.job.micro_batch * dp_world_size)
        self.batches = [next(batches) for _ in range(self.job.stage.steps * per_step)]
        return self

    def __iter__(self) -> Any:
        return iter(self.batches)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Never resumed."""


def render(report: dict[str, Any]) -> str:
    return "\n".join(f"{name.replace('_', ' '):<34}{value}" for name, value in report.items())


if __name__ == "__main__":
    main()
