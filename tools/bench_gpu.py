"""Tokens per second, MFU and peak memory of the paper's shapes on one GPU, and the ratio to plain torchtitan.

python tools/bench_gpu.py --out bench.json                       every shape, sdpa and flash_attn, eager and compiled
python tools/bench_gpu.py --shapes 1.1B --kernels sdpa --modes compiled --pair
python tools/bench_gpu.py --small                                a tiny shape, on any machine

Each case is a process of its own: a stage of the recipe named below on random tokens, one optimizer step at a time,
with half the micro-batch again where the memory does not suffice. MFU is tokens/s x (6 N + 12 L D S) / peak, N without
the input embedding, attention not halved, recomputation not counted (torchtitan's count), peak the data sheet's dense
bf16 rate. --pair adds plain torchtitan (its Trainer, model and loss, sdpa, compiled or not) on the same batches, step
by step in turns: the ratio is stackgrow's tokens/s over its. Memory is the most that tensors took, without --pair's.
"""

import argparse
import dataclasses
import datetime
import hashlib
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from stackgrow.plan.resolve import make_plan
from stackgrow.plan.stages import Plan, TrainStage
from stackgrow.recipe.keys import Model

# Not torch, which each case loads in its own process.
from stackgrow.recipe.load import load_recipe

# name: recipe, stage of it that trains the shape
SHAPES = {
    "410M": ("paper/410m_750b_scratch", 0),
    "1.1B": ("paper/1.1b_100b_scratch", 0),
    "3B": ("paper/3b_300b_scratch", 0),
    "1.9B": ("paper/7b_300b_gstack", 0),  # the 7B's base
}
SMALL = Model(family="llama2", dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=176, vocab_size=512)
MODES = {"eager": False, "compiled": True}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--kernels", nargs="+", choices=("sdpa", "flash_attn", "flex"), default=["sdpa", "flash_attn"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--precision", choices=("bf16", "float8"), default="bf16")
    parser.add_argument("--activation-checkpoint", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--loss-chunk", type=int, default=0, metavar="TOKENS")
    parser.add_argument("--micro-batch", type=int, default=16, help="sequences, at most (default: 16)")
    parser.add_argument("--step-tokens", type=int, default=2**16, help="in one optimizer step (default: 65536)")
    parser.add_argument("--steps", type=int, default=10, help="measured, after three others (default: 10)")
    parser.add_argument("--pair", action="store_true", help="plain torchtitan beside each case")
    parser.add_argument("--small", action="store_true", help="a tiny shape instead of the paper's")
    parser.add_argument("--out", type=Path, help="JSON file, written anew after every case")
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)  # one case, in this process
    arguments = parser.parse_args()
    if arguments.pair and arguments.steps < 2:
        parser.error("--pair needs --steps of at least 2, for quartiles")
    if arguments.work:
        print(json.dumps(work(**arguments.work)))
        return 0
    report: dict[str, Any] = {"date": datetime.date.today().isoformat(), "command": " ".join(sys.argv), "cases": []}
    for case in cases(arguments):
        result = measured(case)
        report |= result.pop("machine", {})
        report["cases"].append(case | result)
        print(json.dumps(case | result), file=sys.stderr, flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(render(report))
    return 0


def cases(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    names = ("precision", "activation_checkpoint", "loss_chunk", "step_tokens", "steps", "micro_batch")
    common = {name: getattr(arguments, name) for name in names}
    if arguments.small:
        common |= {"step_tokens": 512, "micro_batch": 4}
    for shape in ["small"] if arguments.small else arguments.shapes:
        for kernel in arguments.kernels:
            for mode in arguments.modes:
                case = {"shape": shape, "kernel": kernel, "mode": mode, **common, "pair": False}
                yield case
                if arguments.pair:
                    yield case | {"pair": True}  # with the micro-batch that fitted


def measured(case: dict[str, Any]) -> dict[str, Any]:
    """The case in a fresh process; with half the micro-batch as long as memory is what it lacks."""
    while True:
        command = [sys.executable, __file__, "--work", json.dumps(case)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        last = next((line for line in reversed(done.stderr.splitlines()) if line and not line.startswith(" ")), "")
        if "OutOfMemoryError" not in done.stderr or case["micro_batch"] == 1:
            return {"error": last[:300]}
        case["micro_batch"] //= 2


def work(pair: bool, steps: int, **case: Any) -> dict[str, Any]:
    """One case: tokens per second and what follows from it."""
    import bench_overhead as side_by_side  # imports torch
    import torch
    from torchtitan.tools.utils import get_peak_flops

    from stackgrow.titan import device, session

    with tempfile.TemporaryDirectory() as folder:
        plan, stage = stage_of(**case, steps=side_by_side.WARM_UP + steps + 1, folder=Path(folder))
        if problems := list(device.problems(dataclasses.replace(plan, stages=(stage,)))):
            raise SystemExit(f"{problems[0][0]}: {problems[0][1]}")
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        session.start(plan.recipe, Path(folder))
        job = side_by_side.job_of(plan, stage, Path(folder))
        machine = {"device": device_name(), "torch": torch.__version__, "torchtitan": version("torchtitan")}
        if case["kernel"] == "flash_attn":
            machine["flash_attn"] = version("flash-attn")
        result: dict[str, Any] = {"machine": machine}
        if pair:
            compared = side_by_side.compare(job)
            session.stop()
            return result | {name: compared[name] for name in ("ratio", "ratio_quartiles")}
        trainer = side_by_side.run(job, {"stackgrow": side_by_side.TimedStage})["stackgrow"]
        tokens = stage.train.global_batch_tokens / statistics.median(trainer.seconds[side_by_side.WARM_UP :])
        flops = stage.flops_per_token + stage.attention_flops / stage.tokens
        mfu = tokens * flops / get_peak_flops(device_name()) if torch.cuda.is_available() else None
        session.stop()
        result |= {"tokens_per_second": round(tokens, 1), "flops_per_token": flops, "mfu": mfu}
        return result | {"peak_gib": round(trainer.peak_gib, 2)}


def stage_of(
    shape: str,
    kernel: str,
    mode: str,
    precision: str,
    activation_checkpoint: str,
    loss_chunk: int,
    step_tokens: int,
    micro_batch: int,
    steps: int,
    folder: Path,
) -> tuple[Plan, TrainStage]:
    """The stage that trains the shape, on random tokens."""
    name, index = SHAPES.get(shape, SHAPES["410M"])
    recipe = Path(__file__).parents[1] / "recipes" / f"{name}.toml"
    sets = [f"data.path={folder / 'store'}", "validation.sequences=0", "log.interval=10 steps"]
    plan = make_plan(load_recipe(recipe, [*sets, *(["data.seq_len=64"] if shape == "small" else [])]), recipe)
    stage = plan.train_stages[index]
    options: dict[str, Any] = {
        "compile": MODES[mode],
        "precision": precision,
        "attention": kernel,
        "activation_checkpoint": activation_checkpoint,
    }
    options |= {"loss_chunk": loss_chunk, "global_batch_tokens": step_tokens, "micro_batch": micro_batch}
    stage = dataclasses.replace(stage, steps=steps, train=dataclasses.replace(stage.train, **options))
    if shape == "small":
        stage = dataclasses.replace(stage, model=SMALL)
    random_store(folder / "store", stage.model.vocab_size, max(2**20, 4 * stage.seq_len))
    return plan, stage


def random_store(folder: Path, vocabulary: int, tokens: int) -> None:
    """A token store of random ids: what they are does not change the time that they take."""
    folder.mkdir()
    splits = {}
    for i, split in enumerate(("train", "validation")):
        path = folder / f"{split}-00000.npy"
        np.save(path, np.random.default_rng(i).integers(0, vocabulary, tokens).astype(np.uint16))
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        shard = {"file": path.name, "tokens": tokens, "documents": 1, "sha256": sha256, "bytes": path.stat().st_size}
        splits[split] = {"tokens": tokens, "documents": 1, "shards": [shard]}
    (folder / "tokenizer.model").write_bytes(b"")
    tokenizer = {"file": "tokenizer.model", "sha256": hashlib.sha256(b"").hexdigest()}
    manifest = {"format": 1, "dtype": "uint16", "vocab_size": vocabulary, "bos_id": 1, "splits": splits}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": tokenizer}), encoding="utf-8")


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def render(report: dict[str, Any]) -> str:
    """The table for the README."""
    lines = [
        "| shape | precision | attention | mode | micro-batch | tokens/s | MFU | peak GiB | to torchtitan |",
        "|---" * 9 + "|",
    ]
    ratios = {
        (c["shape"], c["kernel"], c["mode"]): c.get("ratio", c.get("error")) for c in report["cases"] if c["pair"]
    }
    for c in report["cases"]:
        if c["pair"]:
            continue
        cells = [c["shape"], c["precision"], c["kernel"], c["mode"], c["micro_batch"]]
        if "error" in c:
            cells += [c["error"], "", ""]
        else:
            mfu = f"{c['mfu']:.1%}" if c["mfu"] else ""
            cells += [f"{c['tokens_per_second']:,.0f}", mfu, c["peak_gib"]]
        cells.append("" if "error" in c else ratios.get((c["shape"], c["kernel"], c["mode"]), ""))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    facts = [f"{k} {report[k]}" for k in ("device", "torch", "torchtitan", "flash_attn", "date") if k in report]
    return "\n".join([*lines, "", ", ".join(facts) + f"; `{report['command']}`"])


if __name__ == "__main__":
    sys.exit(main())
