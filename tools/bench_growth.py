"""What growing a checkpoint costs, beside copying the same bytes.

python tools/bench_growth.py                 needs about 40 GB of free disk
python tools/bench_growth.py --small         a few seconds

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
from pathlib import Path
from typing import Any

# Not torch: what this process held when it starts another counts as the other's peak.
from stackgrow.growth.depth import stack_map
from stackgrow.growth.operators import growth_rules
from stackgrow.growth.rules import Alias, Rules
from stackgrow.recipe.keys import Model

WIDE = Model(family="llama2", dim=4096, n_layers=8, n_heads=32, ffn_dim=11008, vocab_size=32000)  # 1.88B
ONE_B = Model(family="llama2", dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, ffn_dim=5632, vocab_size=32000)  # 1.10B
SMALL = Model(family="llama2", dim=128, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=352, vocab_size=512)
# name: (operator, source, growth in depth, growth in width)
CASES = {"stack": ("stack", WIDE, 4, 1), "zero-depth": ("zero", ONE_B, 2, 1), "split-width": ("split", ONE_B, 1, 2)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="models of test size")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the temporary folder)")
    parser.add_argument("--runs", type=int, default=3, help="of each growth, and of cp (default: 3)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--work", choices=["generate", "grow"], help=argparse.SUPPRESS)  # one fresh process
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work, arguments.cases[0], arguments.small, arguments.folder)
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        need = max(disk_bytes(case, arguments.small) for case in arguments.cases)
        free = shutil.disk_usage(folder).free
        if free < need:
            print(f"bench_growth: {folder} has {free / 1e9:.1f} GB free, and {need / 1e9:.1f} GB are needed")
            return 1
        report = [measure(case, arguments.small, Path(folder), arguments.runs) for case in arguments.cases]
    print(json.dumps(report, indent=1) if arguments.json else render(report))
    return 0


def growth_of(case: str, small: bool) -> tuple[Model, Model, Rules]:
    """Source, target and the rules between them."""
    operator, source, deeper, wider = CASES[case]
    source = SMALL if small else source
    widths = {name: wider * getattr(source, name) for name in ("dim", "n_heads", "n_kv_heads", "ffn_dim")}
    target = dataclasses.replace(source, n_layers=deeper * source.n_layers, **widths)
    layer_map = stack_map(source.n_layers, target.n_layers) if deeper > 1 else None
    return source, target, growth_rules(operator, source, target, layer_map)


def disk_bytes(case: str, small: bool) -> int:
    """The source, what is written, and its copy, with a tenth to spare."""
    source, _, rules = growth_of(case, small)
    return int(1.1 * (4 * source.parameters() + 2 * made_bytes(rules)))


def measure(case: str, small: bool, folder: Path, runs: int) -> dict[str, Any]:
    source, target, rules = growth_of(case, small)
    made = folder / f"source-{source.n_layers}x{source.dim}"
    if not made.exists():
        for other in folder.iterdir():
            shutil.rmtree(other)
        start("generate", case, small, made)
    records, copies = [], []
    for _ in range(runs):
        shutil.rmtree(folder / "grown", ignore_errors=True)
        records.append(json.loads(start("grow", case, small, made)))
        files = [file for file in (folder / "grown").iterdir() if file.name not in records[-1]["linked_files"]]
        weights = records[-1]["bytes_written"] - records[-1]["metadata_bytes"]
        copies.append(copy(files, folder / "copy", round(made_bytes(rules) / weights) if weights else 0))
    seconds, cp = statistics.median(r["seconds"] for r in records), statistics.median(copies)
    return {
        "case": case,
        "source_parameters": source.parameters(),
        "target_parameters": target.parameters(),
        "seconds": seconds,
        "all_seconds": [r["seconds"] for r in records],
        "weight_bytes_made": made_bytes(rules),
        "weight_bytes_written": weights,
        "metadata_bytes_written": records[0]["metadata_bytes"],
        "peak_bytes": max(r["peak_bytes"] for r in records),
        "cp_seconds": cp if weights else None,
        "all_cp_seconds": copies if weights else None,
        "ratio": seconds / cp if weights else None,
    }


def start(what: str, case: str, small: bool, folder: Path) -> str:
    options = ["--folder", str(folder), "--cases", case, *(["--small"] if small else [])]
    return subprocess.run([sys.executable, __file__, "--work", what, *options], check=True, stdout=-1, text=True).stdout


def made_bytes(rules: Rules) -> int:
    """Of the float32 tensors that are no Alias."""
    made = [name for name, rule in rules.targets.items() if not isinstance(rule, Alias)]
    return sum(4 * math.prod(rules.target_shapes[name]) for name in made)


def copy(files: list[Path], target: Path, times: int) -> float:
    """Seconds for cp of the files, and for the disk to have them."""
    for file in files:
        with file.open("rb") as stream:
            while stream.read(1 << 22):
                pass
    target.mkdir()
    folders = [target / str(i) for i in range(times)]
    started = time.perf_counter()
    for folder in folders:
        folder.mkdir()
        subprocess.run(["cp", *map(str, files), str(folder)], check=True)
    for path in [*(path for folder in folders for path in folder.iterdir()), *folders]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def work(what: str, case: str, small: bool, folder: Path) -> None:
    """One fresh process's: ``folder`` is the source's, to make or to grow."""
    source, _, rules = growth_of(case, small)
    if what == "generate":
        generate(source, folder)
        return
    from stackgrow.checkpoint.convert import grow_checkpoint

    grown = folder.with_name("grown")
    record = grow_checkpoint(folder, grown, rules)
    told = {name: record[name] for name in ("seconds", "bytes_written", "linked_files")}
    metadata = (grown / ".metadata").stat().st_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    print(json.dumps({**told, "metadata_bytes": metadata, "peak_bytes": peak}))


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
    lines = [
        f"{'':<12}{'parameters':>20}{'seconds':>10}{'GB made':>9}{'written':>9}{'peak GB':>9}{'cp s':>8}{'ratio':>7}"
    ]
    for r in report:
        sizes = f"{r['source_parameters'] / 1e9:.2f}B -> {r['target_parameters'] / 1e9:.2f}B"
        written = (r["weight_bytes_written"] + r["metadata_bytes_written"]) / 1e9
        made = r["weight_bytes_made"] / 1e9
        cp = f"{r['cp_seconds']:8.2f}{r['ratio']:7.2f}" if r["ratio"] else f"{'-':>8}{'-':>7}"
        lines.append(
            f"{r['case']:<12}{sizes:>20}{r['seconds']:10.3f}{made:9.3f}{written:9.5f}{r['peak_bytes'] / 1e9:9.2f}{cp}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
