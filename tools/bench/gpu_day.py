"""All that waits for a GPU, in the order of its worth: ``make gpu``.

python tools/bench/gpu_day.py                           25 minutes: tests/gpu, then the first figures
python tools/bench/gpu_day.py                           again: what is left, and what failed
python tools/bench/gpu_day.py --minutes 240             a long round: the experiments, too
python tools/bench/gpu_day.py --list                    what there is, and what has a result; needs no GPU

Each job has a time limit and writes one file into --out (default: gpu-results) with its command, its output, the
device and the versions; gpu.md there is the table. A job that has succeeded is not run again. A run that is stopped at
its limit saves and goes on in the next round.
"""

import argparse
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
FIRST_ROUND_MINUTES = 25.0
GRACE_SECONDS = 60.0  # for a run to save, when its time is over
MACHINE = """
import json, torch
from importlib.metadata import version
print(json.dumps({
    "cuda": torch.cuda.is_available(),
    "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    "torch": torch.__version__,
    "torchtitan": version("torchtitan"),
}))
"""


@dataclass(frozen=True)
class Job:
    name: str
    minutes: float
    command: list[str]  # of Python's arguments
    needs: str = ""  # a folder that must be there
    remedy: str = ""  # how it gets there


def bench(name: str, minutes: float, *options: str) -> Job:
    return Job(name, minutes, ["tools/bench/gpu.py", *options])


def experiment(name: str, out: Path, data: Path, remedy: str) -> Job:
    command = ["tools/run_recipe.py", f"recipes/experiments/{name}.toml"]
    for assignment in (
        f"data.path={data}",
        f"run.folder={out / 'runs' / name}",
        "checkpoint.interval=500 steps",
    ):
        command += ["--set", assignment]
    return Job(name, 30, command, needs=str(data), remedy=remedy)


def jobs(out: Path) -> list[Job]:
    shape = ("--shapes", "1.1B", "--kernels", "sdpa")
    compiled = (*shape, "--modes", "compiled")
    code = out / "code"
    kernel = REPOSITORY / "data" / "kernel"
    python_files = ["--input", sysconfig.get_paths()["purelib"], "--pattern", "**/*.py"]
    prepare_code = [
        "tools/prepare_data.py",
        *python_files,
        "--train-tokenizer",
        "8192",
        "--out",
        str(code),
    ]
    experiments = []
    for operator in ("scratch", "stack", "zero", "random", "learn"):
        experiments.append(
            experiment(
                f"ratio_8x256_{operator}", out, code, "the job data_code makes it"
            )
        )
    for operator in ("scratch", "stack", "interleave", "zero", "random", "learn"):
        remedy = "python recipes/experiments/prepare_kernel.py"
        experiments.append(experiment(f"deep_24x64_{operator}", out, kernel, remedy))
    return [
        Job("tests", 8, ["-m", "pytest", "-q", "tests/gpu"]),
        bench("1.1B", 6, *shape, "--pair"),
        bench("1.1B_loss_chunk", 3, *compiled, "--loss-chunk", "2048"),
        bench("1.1B_selective", 3, *compiled, "--activation-checkpoint", "selective"),
        bench("1.1B_float8", 4, *compiled, "--precision", "float8"),
        bench(
            "1.1B_flash_attn",
            4,
            "--shapes",
            "1.1B",
            "--kernels",
            "flash_attn",
            "--modes",
            "compiled",
        ),
        bench("410M", 4, "--shapes", "410M", "--kernels", "sdpa", "--pair"),
        bench("1.9B", 6, "--shapes", "1.9B", "--kernels", "sdpa", "--pair"),
        bench("3B", 6, "--shapes", "3B", "--kernels", "sdpa", "--pair"),
        Job(
            "handover_7B",
            10,
            [
                "tools/bench/handover.py",
                "recipes/paper/7b_300b_gstack.toml",
                "--set",
                "train.activation_checkpoint=full",
                "--set",
                "train.loss_chunk=2048",
                "--json",
            ],
        ),
        Job("data_code", 10, prepare_code),
        *experiments,
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-results"), help="folder of the results"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=FIRST_ROUND_MINUTES,
        help="of this round (default: 25)",
    )
    parser.add_argument("--jobs", nargs="+", metavar="NAME", help="these alone")
    parser.add_argument(
        "--list", action="store_true", help="what there is, and what has a result"
    )
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    chosen = jobs(out)
    if arguments.jobs:
        unknown = set(arguments.jobs) - {job.name for job in chosen}
        if unknown:
            parser.error(
                f"no such job: {', '.join(sorted(unknown))}; --list names them"
            )
        chosen = [job for job in chosen if job.name in arguments.jobs]
    if arguments.list:
        for job in chosen:
            print(f"{job.name:<24}{job.minutes:>4g} min  {state(result_of(job, out))}")
        return 0

    machine = machine_facts()
    if not machine["cuda"]:
        print(
            f"gpu_day: needs a CUDA device, and torch {machine['torch']} sees none. On a machine with a GPU install a "
            "CUDA build of torch (2.11 to 2.15) and run this again; --list shows what it will do",
            file=sys.stderr,
        )
        return 2
    out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * arguments.minutes
    for job in in_order(chosen, out):
        left = ends - time.monotonic()
        if left < 60:
            break
        result = run(job, machine, min(60 * job.minutes, left))
        write_json(out / f"{job.name}.json", result)
        (out / "gpu.md").write_text(table(jobs(out), out), encoding="utf-8")
        print(f"{job.name:<24}{result['seconds']:>6.0f} s  {state(result)}", flush=True)
    print((out / "gpu.md").read_text(encoding="utf-8"))
    return 0


def machine_facts() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", MACHINE], check=True, capture_output=True, text=True
    )
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True
    )
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    facts["python"] = sys.version.split()[0]
    facts["commit"] = commit.stdout.strip()
    return facts


def in_order(chosen: list[Job], out: Path) -> list[Job]:
    """What has no result yet, then what was stopped at its limit, then what failed."""
    ranked = {"waits": 0, "unfinished": 1, "failed": 2}
    left = [job for job in chosen if state(result_of(job, out)) != "done"]
    return sorted(
        left, key=lambda job: ranked[state(result_of(job, out)).split(":")[0]]
    )


def state(result: dict[str, Any] | None) -> str:
    if result is None:
        return "waits"
    if result["exit_code"] == 0:
        return "done"
    if result["timed_out"]:
        return "unfinished"
    return f"failed: {result['last_line']}"


def result_of(job: Job, out: Path) -> dict[str, Any] | None:
    file = out / f"{job.name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def run(job: Job, machine: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The job in processes of its own. One that lasts too long is asked to stop, as by Slurm, and then killed."""
    result: dict[str, Any] = {
        "job": job.name,
        "command": shlex.join(["python", *job.command]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(
            timespec="seconds"
        ),
        **machine,
    }
    if job.needs and not Path(job.needs).exists():
        message = f"{job.needs} is not there: {job.remedy}"
        return {
            **result,
            "exit_code": 2,
            "timed_out": False,
            "seconds": 0.0,
            "last_line": message,
            "output": "",
        }
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *job.command],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    timed_out = False
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        timed_out = True
        os.killpg(process.pid, signal.SIGTERM)
        try:
            output, _ = process.communicate(timeout=GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
    lines = output.strip().splitlines() or [""]
    return {
        **result,
        "exit_code": process.returncode,
        "timed_out": timed_out,
        "seconds": round(time.monotonic() - started, 1),
        "last_line": lines[-1][:200],
        "output": output[-20000:],
    }


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Whole or not at all: this may be stopped at any moment."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


def table(all_jobs: list[Job], out: Path) -> str:
    """Of the jobs that have a result, what it says: their own tables, or their last line."""
    parts = []
    for job in all_jobs:
        result = result_of(job, out)
        if result is None:
            continue
        facts = f"{result['device']}, torch {result['torch']}, torchtitan {result['torchtitan']}, {result['date']}"
        parts += [
            f"## {job.name}: {state(result)}",
            "",
            f"`{result['command']}` ({facts})",
            "",
        ]
        rows = [line for line in result["output"].splitlines() if line.startswith("|")]
        parts += rows or [result["last_line"]]
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
