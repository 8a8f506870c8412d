"""Tokens per second, MFU and peak memory of the paper's shapes on one GPU, and the ratio to plain torchtitan.

python tools/bench/gpu.py --out bench.json                       every shape, sdpa and flash_attn, eager and compiled
python tools/bench/gpu.py --shapes 1.1B --kernels sdpa --modes compiled --pair
python tools/bench/gpu.py --small                                a tiny shape, on any machine

Each case is a process of its own: a stage of the recipe named in shapes.py on random tokens, one optimizer step at a
time, with half the micro-batch again where the memory does not suffice. MFU is tokens/s x (6 N + 12 L D S) / peak, N
without the input embedding, attention not halved, recomputation not counted (torchtitan's count), peak the data sheet's
dense bf16 rate. --pair adds plain torchtitan (its Trainer, model and loss, sdpa, compiled or not) on the same batches,
step by step in turns: the ratio is stackgrow's tokens/s over its. Memory is the most that tensors took, without
--pair's.
"""

import argparse
import dataclasses
import datetime
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

# Not torch, which each case loads in its own process.
from random_store import device_name
from shapes import MODES, SHAPES, Case, stage_of


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--kernels",
        nargs="+",
        choices=("sdpa", "flash_attn", "flex"),
        default=["sdpa", "flash_attn"],
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--precision", choices=("bf16", "float8"), default="bf16")
    parser.add_argument(
        "--activation-checkpoint", choices=("none", "selective", "full"), default="none"
    )
    parser.add_argument("--loss-chunk", type=int, default=0, metavar="TOKENS")
    parser.add_argument(
        "--micro-batch", type=int, default=16, help="sequences, at most (default: 16)"
    )
    parser.add_argument(
        "--step-tokens",
        type=int,
        default=2**16,
        help="in one optimizer step (default: 65536)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=10,
        help="measured, after three others (default: 10)",
    )
    parser.add_argument(
        "--pair", action="store_true", help="plain torchtitan beside each case"
    )
    parser.add_argument(
        "--small", action="store_true", help="a tiny shape instead of the paper's"
    )
    parser.add_argument(
        "--out", type=Path, help="JSON file, written anew after every case"
    )
    parser.add_argument(
        "--work", type=json.loads, help=argparse.SUPPRESS
    )  # one case, in this process
    arguments = parser.parse_args()
    if arguments.pair and arguments.steps < 2:
        parser.error("--pair needs --steps of at least 2, for quartiles")
    if arguments.work:
        print(json.dumps(measure(Case(**arguments.work))))
        return 0

    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(sys.argv),
        "cases": [],
    }
    for case in cases(arguments):
        result = measure_in_fresh_process(case)
        report |= result.pop("machine", {})
        record = dataclasses.asdict(case) | result
        report["cases"].append(record)
        print(json.dumps(record), file=sys.stderr, flush=True)
        if arguments.out:
            arguments.out.write_text(
                json.dumps(report, indent=1) + "\n", encoding="utf-8"
            )
    print(render(report))
    return 0


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    shapes = arguments.shapes
    step_tokens = arguments.step_tokens
    micro_batch = arguments.micro_batch
    if arguments.small:
        shapes = ["small"]
        step_tokens = 512
        micro_batch = 4
    for shape in shapes:
        for kernel in arguments.kernels:
            for mode in arguments.modes:
                case = Case(
                    shape=shape,
                    kernel=kernel,
                    mode=mode,
                    precision=arguments.precision,
                    activation_checkpoint=arguments.activation_checkpoint,
                    loss_chunk=arguments.loss_chunk,
                    step_tokens=step_tokens,
                    steps=arguments.steps,
                    micro_batch=micro_batch,
                    pair=False,
                )
                yield case
                if arguments.pair:
                    yield dataclasses.replace(
                        case, pair=True
                    )  # with the micro-batch that fitted


def measure_in_fresh_process(case: Case) -> dict[str, Any]:
    """The result; ``case.micro_batch`` is halved as long as memory is what the case lacks."""
    while True:
        command = [
            sys.executable,
            __file__,
            "--work",
            json.dumps(dataclasses.asdict(case)),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        if "OutOfMemoryError" not in done.stderr or case.micro_batch == 1:
            return {"error": last_message(done.stderr)}
        case.micro_batch //= 2


def last_message(errors: str) -> str:
    """The last line of a traceback that is not indented: the exception itself."""
    for line in reversed(errors.splitlines()):
        if line and not line.startswith(" "):
            return line[:300]
    return ""


def measure(case: Case) -> dict[str, Any]:
    """One case: tokens per second and what follows from it."""
    import torch
    from side_by_side import WARM_UP, TimedStage, compare, job_of, run
    from torchtitan.tools.utils import get_peak_flops

    from stackgrow.titan import device, session

    with tempfile.TemporaryDirectory() as folder:
        plan, stage = stage_of(
            case, steps=WARM_UP + case.steps + 1, folder=Path(folder)
        )
        for where, problem in device.problems(
            dataclasses.replace(plan, stages=(stage,))
        ):
            raise SystemExit(f"{where}: {problem}")
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        session.start(plan.recipe, Path(folder))
        job = job_of(plan, stage, Path(folder))
        if case.pair:
            compared = compare(job)
            result = {
                "ratio": compared["ratio"],
                "ratio_quartiles": compared["ratio_quartiles"],
            }
        else:
            trainer = run(job, {"stackgrow": TimedStage})["stackgrow"]
            rate = stage.train.global_batch_tokens / statistics.median(
                trainer.seconds[WARM_UP:]
            )
            flops = stage.flops_per_token + stage.attention_flops / stage.tokens
            result = {
                "tokens_per_second": round(rate, 1),
                "flops_per_token": flops,
                "mfu": None,
            }
            if torch.cuda.is_available():
                result["mfu"] = rate * flops / get_peak_flops(device_name())
            result["peak_gib"] = round(trainer.peak_gib, 2)
        session.stop()
    return {"machine": machine(case), **result}


def machine(case: Case) -> dict[str, str]:
    import torch

    facts = {
        "device": device_name(),
        "torch": torch.__version__,
        "torchtitan": version("torchtitan"),
    }
    if case.kernel == "flash_attn":
        facts["flash_attn"] = version("flash-attn")
    return facts


def render(report: dict[str, Any]) -> str:
    """The table for the README."""
    lines = [
        "| shape | precision | attention | mode | micro-batch | tokens/s | MFU | peak GiB | to torchtitan |",
        "|---" * 9 + "|",
    ]
    ratios = {}
    for case in report["cases"]:
        if case["pair"]:
            ratios[case["shape"], case["kernel"], case["mode"]] = case.get(
                "ratio", case.get("error")
            )
    for case in report["cases"]:
        if not case["pair"]:
            ratio = ratios.get((case["shape"], case["kernel"], case["mode"]), "")
            cells = table_cells(case, ratio)
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    names = ("device", "torch", "torchtitan", "flash_attn", "date")
    facts = [f"{name} {report[name]}" for name in names if name in report]
    return "\n".join([*lines, "", ", ".join(facts) + f"; `{report['command']}`"])


def table_cells(case: dict[str, Any], ratio: float | str) -> list[Any]:
    name = [
        case["shape"],
        case["precision"],
        case["kernel"],
        case["mode"],
        case["micro_batch"],
    ]
    if "error" in case:
        return [*name, case["error"], "", "", ""]
    mfu = f"{case['mfu']:.1%}" if case["mfu"] else ""
    return [*name, f"{case['tokens_per_second']:,.0f}", mfu, case["peak_gib"], ratio]


if __name__ == "__main__":
    sys.exit(main())
