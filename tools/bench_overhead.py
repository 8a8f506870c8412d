"""What a stage costs beside plain torchtitan, and what growth costs beside nothing.

python tools/bench_overhead.py                      one process
torchrun --standalone --nproc-per-node 2 tools/bench_overhead.py

Trains the same model on the same batches, with torchtitan's own Trainer and as a stackgrow stage (data from a token
store, metrics, progress), step by step in turns. Then grows a checkpoint by stacking and counts the bytes.
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
import torch.distributed.checkpoint as dcp
from torchtitan.config import JobConfig
from torchtitan.protocols import train_spec
from torchtitan.train import Trainer

from stackgrow.data.loader import WindowDataset
from stackgrow.growth.convert import grow_checkpoint
from stackgrow.growth.depth import depth_rules, stack_map
from stackgrow.load import load_recipe
from stackgrow.recipe import Model
from stackgrow.resolve import make_plan
from stackgrow.titan import job as jobs
from stackgrow.titan import session
from stackgrow.titan.trainer import StageTrainer

GROWN = Model(family="llama2", dim=768, n_layers=8, n_heads=12, ffn_dim=2048, vocab_size=32000)
WARM_UP = 3  # steps before the clock starts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/quickstart.toml", help="its last stage's model and batch are used")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=60, help="steps of each trainer")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    plan = make_plan(load_recipe(arguments.recipe, [*arguments.set, "validation.sequences=0"]), arguments.recipe)
    with tempfile.TemporaryDirectory() as folder:
        session.start(plan.recipe, Path(folder))
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        stage = dataclasses.replace(plan.train_stages[-1], index=0, steps=WARM_UP + arguments.steps + 1)
        data = WindowDataset.open(plan.recipe.data, plan.recipe.seed)
        report = compare(jobs.StageJob(plan.recipe, stage, "bench", Path(folder), data, None))
        if dist.get_rank() == 0:
            report |= measure_growth(Path(folder))
            print(json.dumps(report, indent=1) if arguments.json else render(report))
        dist.barrier()
    session.stop()


def compare(job: jobs.StageJob) -> dict[str, Any]:
    """Tokens per second over all ranks. The two trainers take turns after every step, so that whatever slows the
    machine for longer than a step meets both; the ratio is the median over pairs of neighbouring steps."""
    with contextlib.redirect_stdout(io.StringIO()):
        turns = Turns()
        trainers = {"torchtitan": PlainTrainer(job, turns), "stackgrow": TimedStage(job, turns)}
        threads = [threading.Thread(target=trainer.train) for trainer in trainers.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    # The last step carries the final checkpoint.
    seconds = {name: trainer.seconds[WARM_UP:-1] for name, trainer in trainers.items()}
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
        self.turns, self.seconds, self.started = turns, list[float](), 0.0
        turns.join(self)

    def train(self) -> None:
        self.turns.wait(self)  # loading and validating are collective, too
        super().train()

    def should_continue_training(self) -> bool:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if self.step:
            self.seconds.append(time.perf_counter() - self.started)
        goes_on = super().should_continue_training()
        self.turns.hand_over(self, leave=not goes_on)
        self.started = time.perf_counter()
        return goes_on


class TimedStage(Timed, StageTrainer):
    """A stackgrow stage."""

    def __init__(self, job: jobs.StageJob, turns: Turns):
        super().__init__(job)
        self.take_turns(turns)


class PlainTrainer(Timed):
    """torchtitan's own Trainer, model, metrics and checkpoint manager, on batches that are already in memory."""

    def __init__(self, job: jobs.StageJob, turns: Turns):
        config = jobs.job_config(job)
        plain = JobConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(JobConfig)})
        plain.model = dataclasses.replace(plain.model, name="plain")
        plain.checkpoint = dataclasses.replace(jobs.checkpoint_config(job), folder="plain")
        loader = jobs._build_loader
        spec = jobs._train_spec()
        memory = InMemory(job, loader, config)
        train_spec._extra_train_specs["plain"] = dataclasses.replace(
            spec, build_dataloader_fn=memory.build, build_metrics_processor_fn=None
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


def measure_growth(folder: Path) -> dict[str, Any]:
    """Stacks a 100M-parameter float32 checkpoint four times over."""
    target = dataclasses.replace(GROWN, n_layers=4 * GROWN.n_layers)
    state = {name: torch.randn(shape) for name, shape in GROWN.tensors().items()}
    dcp.save(state, checkpoint_id=str(folder / "source"), no_dist=True)
    rules = depth_rules(stack_map(GROWN.n_layers, target.n_layers), GROWN, target)
    record = grow_checkpoint(folder / "source", folder / "grown", rules)
    metadata = (folder / "grown" / ".metadata").stat().st_size
    return {
        "growth_source_parameters": GROWN.parameters(),
        "growth_target_parameters": target.parameters(),
        "growth_seconds": round(record["seconds"], 4),
        "growth_weight_bytes_written": record["bytes_written"] - metadata,
        "growth_metadata_bytes": metadata,
    }


def render(report: dict[str, Any]) -> str:
    return "\n".join(f"{name.replace('_', ' '):<34}{value}" for name, value in report.items())


if __name__ == "__main__":
    main()
