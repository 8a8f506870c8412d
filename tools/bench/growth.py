"""What growing a checkpoint costs, beside copying the same bytes.

python tools/bench/growth.py                 needs about 40 GB of free disk
python tools/bench/growth.py --small         a few seconds

Sources are float32 DCP checkpoints, generated tensor by tensor. Each growth runs in a fresh process, one after the
other with `cp` of the tensors that it made, on the same disk; both end when the bytes are on the disk (fsync), and cp
finds its source in memory where that is large enough. Zeros of one shape are written once, whatever the number of
tensors that hold them: cp then copies the files as often as the tensors are more than what was written. Medians.
The peak is the process's largest resident set, Python and torch included. A stack writes metadata alone: nothing to cp.
"""

import argparse
import dataclasses
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Not torch: what this process held when it starts another counts as the other's peak.
from stackgrow.growth.depth import stack_map
from stackgrow.growth.operators import growth_rules
from stackgrow.growth.rules import Alias, Rules
from stackgrow.recipe.keys import Model

WIDE = Model(
    family="llama2", dim=4096, n_layers=8, n_heads=32, ffn_dim=11008, vocab_size=32000
)  # 1.88B
ONE_B = Model(
    family="llama2",
    dim=2048,
    n_layers=22,
    n_heads=32,
    n_kv_heads=4,
    ffn_dim=5632,
    vocab_size=32000,
)  # 1.10B
SMALL = Model(
    family="llama2",
    dim=128,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    ffn_dim=352,
    vocab_size=512,
)


@dataclass(frozen=True)
class Case:
    operator: str
    source: Model
    deeper: int = 1  # how many times as many layers
    wider: int = 1  # how many times as wide


CASES = {
    "stack": Case("stack", WIDE, deeper=4),
    "zero-depth": Case("zero", ONE_B, deeper=2),
    "split-width": Case("split", ONE_B, wider=2),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="models of test size")
    parser.add_argument(
        "--folder",
        type=Path,
        help="on the disk to measure (default: the temporary folder)",
    )
    parser.add_argument(
        "--runs", type=int, default=3, help="of each growth, and of cp (default: 3)"
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--work", choices=["generate", "grow"], help=argparse.SUPPRESS
    )  # one fresh process
    arguments = parser.parse_args()
    if arguments.work == "generate":
        generate(
            growth_of(arguments.cases[0], arguments.small).source, arguments.folder
        )
        return 0
    if arguments.work == "grow":
        print(
            json.dumps(
                grow(
                    growth_of(arguments.cases[0], arguments.small).rules,
                    arguments.folder,
                )
            )
        )
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        need = max(disk_bytes(case, arguments.small) for case in arguments.cases)
        free = shutil.disk_usage(folder).free
        if free < need:
            print(
                f"bench/growth: {folder} has {free / 1e9:.1f} GB free, and {need / 1e9:.1f} GB are needed"
            )
            return 1
        report = [
            measure(case, arguments.small, Path(folder), arguments.runs)
            for case in arguments.cases
        ]
    print(json.dumps(report, indent=1) if arguments.json else render(report))
    return 0


@dataclass(frozen=True)
class Growth:
    source: Model
    target: Model
    rules: Rules

    @property
    def made_bytes(self) -> int:
        """Of the float32 tensors that are no Alias."""
        total = 0
        for name, rule in self.rules.targets.items():
            if not isinstance(rule, Alias):
                total += 4 * math.prod(self.rules.target_shapes[name])
        return total


def growth_of(name: str, small: bool) -> Growth:
    case = CASES[name]
    source = SMALL if small else case.source
    widths = {
        width: case.wider * getattr(source, width)
        for width in ("dim", "n_heads", "n_kv_heads", "ffn_dim")
    }
    target = dataclasses.replace(
        source, n_layers=case.deeper * source.n_layers, **widths
    )
    layer_map = None
    if case.deeper > 1:
        layer_map = stack_map(source.n_layers, target.n_layers)
    return Growth(
        source, target, growth_rules(case.operator, source, target, layer_map)
    )


def disk_bytes(case: str, small: bool) -> int:
    """The source, what is written, and its copy, with a tenth to spare."""
    growth = growth_of(case, small)
    return int(1.1 * (4 * growth.source.parameters() + 2 * growth.made_bytes))


def measure(case: str, small: bool, folder: Path, runs: int) -> dict[str, Any]:
    growth = growth_of(case, small)
    source_folder = folder / f"source-{growth.source.n_layers}x{growth.source.dim}"
    if not source_folder.exists():
        for other in folder.iterdir():
            shutil.rmtree(other)
        in_fresh_process("generate", case, small, source_folder)

    records = []
    copies = []
    weights = 0  # bytes written
    for _ in range(runs):
        shutil.rmtree(folder / "grown", ignore_errors=True)
        record = json.loads(in_fresh_process("grow", case, small, source_folder))
        records.append(record)
        weights = record["bytes_written"] - record["metadata_bytes"]
        if weights:
            written = [
                file
                for file in (folder / "grown").iterdir()
                if file.name not in record["linked_files"]
            ]
            copies.append(
                copy(written, folder / "copy", times=round(growth.made_bytes / weights))
            )

    report = {
        "case": case,
        "source_parameters": growth.source.parameters(),
        "target_parameters": growth.target.parameters(),
        "seconds": statistics.median(record["seconds"] for record in records),
        "all_seconds": [record["seconds"] for record in records],
        "weight_bytes_made": growth.made_bytes,
        "weight_bytes_written": weights,
        "metadata_bytes_written": records[0]["metadata_bytes"],
        "peak_bytes": max(record["peak_bytes"] for record in records),
        "cp_seconds": None,
        "all_cp_seconds": None,
        "ratio": None,
    }
    if copies:
        report["cp_seconds"] = statistics.median(copies)
        report["all_cp_seconds"] = copies
        report["ratio"] = report["seconds"] / report["cp_seconds"]
    return report


def in_fresh_process(work: str, case: str, small: bool, folder: Path) -> str:
    """What it prints. ``folder`` is the source's, to "generate" or to "grow"."""
    command = [
        sys.executable,
        __file__,
        "--work",
        work,
        "--folder",
        str(folder),
        "--cases",
        case,
    ]
    if small:
        command.append("--small")
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def copy(files: list[Path], target: Path, times: int) -> float:
    """Seconds for cp of the files, and for the disk to have them."""
    for file in files:
        read_into_memory(file)
    target.mkdir()
    folders = [target / str(i) for i in range(times)]
    started = time.perf_counter()
    for folder in folders:
        folder.mkdir()
        subprocess.run(["cp", *map(str, files), str(folder)], check=True)
    for folder in folders:
        for path in [*folder.iterdir(), folder]:
            sync(path)
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def read_into_memory(file: Path) -> None:
    with file.open("rb") as stream:
        while stream.read(1 << 22):
            pass


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def grow(rules: Rules, source_folder: Path) -> dict[str, Any]:
    """Grows the checkpoint into the folder "grown" beside it; what that took."""
    from stackgrow.checkpoint.convert import grow_checkpoint

    grown = source_folder.with_name("grown")
    record = grow_checkpoint(source_folder, grown, rules)
    return {
        "seconds": record["seconds"],
        "bytes_written": record["bytes_written"],
        "linked_files": record["linked_files"],
        "metadata_bytes": (grown / ".metadata").stat().st_size,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * 1024,  # Linux counts in KiB
    }


def generate(model: Model, folder: Path) -> None:
    import torch

    from stackgrow.checkpoint.hf import write_dcp

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in model.tensors().items():
            yield name, torch.randn(shape)

    folder.mkdir()
    write_dcp(folder, tensors())
    os.sync()


def render(report: list[dict[str, Any]]) -> str:
    head = f"{'parameters':>20}{'seconds':>10}{'GB made':>9}{'written':>9}{'peak GB':>9}{'cp s':>8}{'ratio':>7}"
    lines = [f"{'':<12}{head}"]
    for case in report:
        sizes = f"{case['source_parameters'] / 1e9:.2f}B -> {case['target_parameters'] / 1e9:.2f}B"
        made = case["weight_bytes_made"] / 1e9
        written = (case["weight_bytes_written"] + case["metadata_bytes_written"]) / 1e9
        peak = case["peak_bytes"] / 1e9
        line = f"{case['case']:<12}{sizes:>20}{case['seconds']:10.3f}{made:9.3f}{written:9.5f}{peak:9.2f}"
        if case["ratio"]:
            line += f"{case['cp_seconds']:8.2f}{case['ratio']:7.2f}"
        else:
            line += f"{'-':>8}{'-':>7}"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
