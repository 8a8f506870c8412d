"""Where the time goes from the last step of the base to the first step of the grown model.

python tools/bench/handover.py recipes/quickstart.toml
python tools/bench/handover.py recipes/paper/7b_300b_gstack.toml --set train.activation_checkpoint=full

Runs the recipe as tools/run_recipe.py does, on random tokens, three steps of the base and one of the grown model, and
stops there. The parts: save (the base's last checkpoint, hashed and sealed), grow, build (the model on its device,
random weights, optimizer), load (with its proof), first step; the rest is what lies between. The disk needs room for
one checkpoint of the base, 12 bytes per parameter.
"""

import argparse
import contextlib
import functools
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from random_store import device_name, random_store

from stackgrow.checkpoint import grow as growth
from stackgrow.recipe.load import load_recipe
from stackgrow.run import engine
from stackgrow.titan.checkpoint import StageCheckpoints
from stackgrow.titan.trainer import StageTrainer

BASE_STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a recipe with one growth")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--sequences",
        type=int,
        default=8,
        help="in one step, and in one micro-batch of it at most",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="on the disk to measure (default: the temporary folder)",
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        report = measure(
            arguments.recipe, arguments.set, arguments.sequences, Path(folder)
        )
    if arguments.json:
        print(json.dumps(report, indent=1))
        return
    for name, value in report.items():
        print(f"{name:<24}{value}")


def measure(file: str, sets: list[str], sequences: int, folder: Path) -> dict[str, Any]:
    recipe = load_recipe(file, sets)
    batch = sequences * recipe.data.seq_len
    random_store(folder / "store", recipe.model.vocab_size, 2**20)
    short = [
        f"data.path={folder / 'store'}",
        f"run.folder={folder / 'run'}",
        "validation.sequences=0",
        f"train.global_batch_tokens={batch}",
        f"budget.tokens={(BASE_STEPS + 2) * batch}",
        f"growth[0].timing={BASE_STEPS} steps",
        "train.warmup=0 steps",
        "train.horizon=stage",
    ]
    watch = Stopwatch()
    watch.time(StageTrainer, "__init__", "build")
    watch.time(StageTrainer, "train_step", "step")
    watch.time(StageCheckpoints, "load", "load")
    watch.time(StageCheckpoints, "save", "save")
    watch.time(growth, "grow", "grow")
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            engine.run(file, [*sets, *short])
    except FirstStepError:
        return {"device": device_name(), "recipe": recipe.name, **watch.split()}
    raise SystemExit("the run ended before the grown model's first step")


class FirstStepError(Exception):
    """The grown model has made its first step: the rest of the run is of no interest."""


@dataclass(frozen=True)
class Event:
    """One call of a function that is timed, on the clock of time.perf_counter."""

    name: str
    began: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began


class Stopwatch:
    """Notes when the functions that it times begin and end."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def time(self, owner: Any, function: str, name: str) -> None:
        plain: Callable[..., Any] = getattr(owner, function)

        @functools.wraps(plain)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = plain(*args, **kwargs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.events.append(Event(name, began, time.perf_counter()))
            if name == "step" and self.has_grown():
                raise FirstStepError
            return result

        setattr(owner, function, timed)

    def has_grown(self) -> bool:
        return any(event.name == "grow" for event in self.events)

    def split(self) -> dict[str, float]:
        """Seconds of each part, from the end of the last base step on."""
        base_steps = [
            i for i, event in enumerate(self.events[:-1]) if event.name == "step"
        ]
        last_base_step = base_steps[-1]
        total = self.events[-1].ended - self.events[last_base_step].ended
        parts = dict.fromkeys(("save", "grow", "build", "load", "step"), 0.0)
        for event in self.events[last_base_step + 1 :]:
            parts[event.name] += event.seconds
        parts["first step"] = parts.pop("step")
        parts["rest"] = total - sum(parts.values())
        parts["total"] = total
        return {name: round(seconds, 3) for name, seconds in parts.items()}


if __name__ == "__main__":
    main()
