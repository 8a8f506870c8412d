"""What a stage costs beside plain torchtitan. (What growth costs: growth.py.)

python tools/bench/overhead.py                      one process
torchrun --standalone --nproc-per-node 2 tools/bench/overhead.py

Trains the same model on the same batches, with torchtitan's own Trainer and as a stackgrow stage (data from a token
store, metrics, progress), step by step in turns. Of other families:

python tools/bench/overhead.py --set model.family=llama3 --set model.n_kv_heads=2
python tools/bench/overhead.py --set model.family=qwen3 --set model.n_kv_heads=2 --set model.head_dim=64 \\
    --set model.tie_embeddings=true
"""

import argparse
import dataclasses
import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
from side_by_side import WARM_UP, compare, job_of, plain_model

from stackgrow.plan.resolve import make_plan
from stackgrow.recipe.load import load_recipe
from stackgrow.titan import session


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--recipe",
        default="recipes/quickstart.toml",
        help="its last stage's model and batch are used",
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=60, help="steps of each trainer")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps must be at least 2, for quartiles")
    plan = make_plan(
        load_recipe(arguments.recipe, [*arguments.set, "validation.sequences=0"]),
        arguments.recipe,
    )
    try:
        plain_model(plan.train_stages[-1].model, plan.recipe.seed)
    except ValueError as unknown:
        parser.error(str(unknown))
    with tempfile.TemporaryDirectory() as folder:
        session.start(plan.recipe, Path(folder))
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        stage = dataclasses.replace(
            plan.train_stages[-1], steps=WARM_UP + arguments.steps + 1
        )
        report = compare(job_of(plan, stage, Path(folder)))
        if dist.get_rank() == 0:
            print(json.dumps(report, indent=1) if arguments.json else render(report))
        dist.barrier()
    session.stop()


def render(report: dict[str, Any]) -> str:
    return "\n".join(
        f"{name.replace('_', ' '):<34}{value}" for name, value in report.items()
    )


if __name__ == "__main__":
    main()
