"""Where the time goes from the last step of the base to the first step of the grown model.

python tools/bench_handover.py recipes/quickstart.toml
python tools/bench_handover.py recipes/paper/7b_300b_gstack.toml --set train.activation_checkpoint=full

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
from pathlib import Path
from typing import Any

import torch
from bench_gpu import device_name, random_store

from stackgrow.checkpoint import grow as growth
from stackgrow.recipe.load import load_recipe
from stackgrow.run import engine
from stackgrow.titan.checkpoint import StageCheckpoints
from stackgrow.titan.trainer import StageTrainer

BASE_STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a recipe with one growth")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--sequences", type=int, default=8, help="in one step, and in one micro-batch of it at most")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the temporary folder)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        report = measure(arguments.recipe, arguments.set, arguments.sequences, Path(folder))
    print(json.dumps(report, indent=1) if arguments.json else "\n".join(f"{k:<24}{v}" for k, v in report.items()))


def measure(file: str, sets: list[str], sequences: int, folder: Path) -> dict[str, Any]:
    recipe = load_recipe(file, sets)
    batch = sequences * recipe.data.seq_len
    random_store(folder / "store", recipe.model.vocab_size, 2**20)
    short = [f"data.path={folder / 'store'}", f"engine.folder={folder / 'run'}", "validation.sequences=0"]
    short += [f"train.global_batch_tokens={batch}", f"budget.tokens={(BASE_STEPS + 2) * batch}"]
    short += [f"growth[0].timing={BASE_STEPS} steps", "train.warmup=0 steps", "train.horizon=stage"]
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


class Stopwatch:
    """Notes when the functions that it times begin and end."""

    def __init__(self) -> None:
        self.events: list[tuple[str, float, float]] = []

    def time(self, owner: Any, function: str, name: str) -> None:
        plain: Callable[..., Any] = getattr(owner, function)

        @functools.wraps(plain)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = plain(*args, **kwargs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.events.append((name, start, time.perf_counter()))
            if name == "step" and any(event[0] == "grow" for event in self.events):
                raise FirstStepError
            return result

        setattr(owner, function, timed)

    def split(self) -> dict[str, float]:
        """Seconds of each part, from the end of the last base step on."""
        last_base = max(i for i, event in enumerate(self.events[:-1]) if event[0] == "step")
        start, end = self.events[last_base][2], self.events[-1][2]
        parts = dict.fromkeys(("save", "grow", "build", "load", "step"), 0.0)
        for name, began, ended in self.events[last_base + 1 :]:
            parts[name] += ended - began
        parts["first step"] = parts.pop("step")
        parts["rest"] = end - start - sum(parts.values())
        return {name: round(seconds, 3) for name, seconds in (parts | {"total": end - start}).items()}


if __name__ == "__main__":
    main()
