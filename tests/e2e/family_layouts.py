"""Trains the base stage of one recipe after another, in the processes that it is started in; starting them takes longer.

python family_layouts.py RECIPE JOBS.json RESULTS.json        JOBS: name -> [[lost, the --set] of each session]

Every session of a job trains to the end. Before it as many of the newest checkpoints are lost as ``lost`` says, as after
a kill, and it goes on from the newest that is left. RESULTS: name -> of each session what records and last checkpoint
say after it, and the bytes that rank 0 held.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from stackgrow import seal
from stackgrow.data.loader import WindowDataset
from stackgrow.plan.resolve import make_plan
from stackgrow.plan.stages import Plan
from stackgrow.recipe.load import load_recipe
from stackgrow.run_folder.folder import METRICS, VALIDATION, RunFolder, StageFolder
from stackgrow.run_folder.lines import read_records
from stackgrow.titan import session
from stackgrow.titan.job import StageJob
from stackgrow.titan.shards import shard_of
from stackgrow.titan.trainer import StageTrainer, run_stage


def main(recipe_file: str, jobs_file: str, results_file: str) -> None:
    results: dict[str, list[dict[str, Any]]] = {}
    for name, sessions in json.loads(Path(jobs_file).read_text()).items():
        results[name] = []
        for lost, sets in sessions:
            plan = make_plan(load_recipe(recipe_file, sets))
            results[name].append(train(plan, lost))
    if dist.get_rank() == 0:
        Path(results_file).write_text(json.dumps(results))
    session.stop()


def train(plan: Plan, lost: int) -> dict[str, Any]:
    """One session. Returns what it leaves, which is rank 0's to say."""
    run = RunFolder(Path(plan.recipe.run.folder))
    if not dist.is_initialized():
        session.start(plan.recipe, run.logs)
    stage = plan.train_stages[0]
    folder = run.stage(stage.name)
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    lose(folder, lost)

    held: dict[str, int] = {}

    def note_bytes(trainer: StageTrainer) -> None:
        if trainer.step == stage.steps:
            held.update(bytes_held(trainer))

    data = WindowDataset.open(plan.recipe.data, plan.recipe.seed)
    job = StageJob(plan.recipe, stage, "hash", folder.path, data)
    job.after_step = note_bytes
    run_stage(job)
    return {**found_in(folder, stage.steps), "bytes": held}


def lose(folder: StageFolder, lost: int) -> None:
    """So many of the newest checkpoints of the sessions before."""
    dist.barrier()  # all have looked at them
    if dist.get_rank() == 0:
        newest_first = sorted(folder.sealed_steps(), reverse=True)
        for step in newest_first[:lost]:
            shutil.rmtree(folder.checkpoint(step))
    dist.barrier()


def found_in(folder: StageFolder, last_step: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for file in (METRICS, VALIDATION):
        records = read_records(folder.record_file(file))
        found[file] = [[record["step"], record["loss"]] for record in records]
    manifest = seal.read_seal(folder.checkpoint(last_step))
    assert manifest is not None
    found["tensors"] = {**manifest["tensors"], **manifest["moments"]}
    return found


def bytes_held(trainer: StageTrainer) -> dict[str, int]:
    """Of this rank: parameters, gradients and what the optimizer keeps of them."""
    weights = list(trainer.model_parts[0].parameters())
    gradients = [weight.grad for weight in weights]
    kept = []
    for optimizer in trainer.optimizers:
        for state in optimizer.state.values():
            kept += state.values()
    return {
        "parameters": sum(shard_of(tensor).local.nbytes for tensor in weights),
        "gradients": sum(shard_of(tensor).local.nbytes for tensor in gradients),
        "optimizer": sum(shard_of(tensor).local.nbytes for tensor in kept),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
