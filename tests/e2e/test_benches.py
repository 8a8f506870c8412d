"""The benchmarks of the GPU path, at the size that a CPU runs: that they work, not what they measure."""

import json
import subprocess
import sys
from pathlib import Path

from launch import REPOSITORY, Workplace, environment


def bench(name: str, *arguments: str, folder: Path) -> str:
    command = [sys.executable, str(REPOSITORY / "tools" / f"{name}.py"), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bench_gpu(tmp_path: Path) -> None:
    sets = ["--small", "--modes", "eager", "--kernels", "sdpa", "--steps", "2", "--pair", "--loss-chunk", "100"]
    table = bench("bench_gpu", *sets, "--out", "bench.json", folder=tmp_path).splitlines()
    alone, pair = (report := json.loads((tmp_path / "bench.json").read_text()))["cases"]
    assert alone["tokens_per_second"] > 0
    assert alone["peak_gib"] > 0.05
    D, layers, F, V, S = 64, 2, 176, 512, 64
    matmul = layers * (2 * D * D + 2 * D * D // 2 + 3 * D * F + 2 * D) + D + V * D
    assert alone["flops_per_token"] == 6 * matmul + 12 * layers * D * S
    assert 0.1 < pair["ratio"] < 10
    assert len(table[0].split("|")) == len(table[2].split("|"))
    assert table[2].startswith("| small | sdpa | eager | 4 |")
    assert report["torchtitan"] in table[-1]


def test_bench_handover(workplace: Workplace) -> None:
    report = json.loads(bench("bench_handover", "tiny.toml", "--json", folder=workplace.folder))
    seconds = {k: v for k, v in report.items() if isinstance(v, float)}
    assert list(seconds) == ["save", "grow", "build", "load", "first step", "rest", "total"]
    assert all(value > 0 for value in seconds.values())
    assert abs(sum(seconds.values()) - 2 * seconds["total"]) < 0.01
