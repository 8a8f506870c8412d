"""The benchmarks of the GPU path, at the size that a CPU runs: that they work, not what they measure."""

import json
import subprocess
import sys
from pathlib import Path

from launch import REPOSITORY, Workplace, environment

CASE = {
    "shape": "small",
    "kernel": "sdpa",
    "mode": "eager",
    "precision": "bf16",
    "activation_checkpoint": "none",
    "loss_chunk": 100,
}


def test_bench_gpu_writes_a_table(tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "tools" / "bench_gpu.py"), "--small", "--modes", "eager"]
    command += ["--kernels", "sdpa", "flex", "--steps", "2", "--loss-chunk", "100", "--out", "bench.json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report, table = json.loads((tmp_path / "bench.json").read_text()), done.stdout.splitlines()
    sdpa, flex = report["cases"]
    assert "error" not in sdpa, sdpa["error"]
    assert sdpa["tokens_per_second"] > 0
    assert sdpa["peak_gib"] > 0.05
    D, layers, F, V, S = 64, 2, 176, 512, 64
    matmul = layers * (2 * D * D + 2 * D * D // 2 + 3 * D * F + 2 * D) + D + V * D
    assert sdpa["flops_per_token"] == 6 * matmul + 12 * layers * D * S
    assert flex["error"].startswith('train.attention: "flex" needs a GPU')
    assert table[2].startswith("| small | bf16 | sdpa | eager | 4 |")
    assert {line.count("|") for line in table[:4]} == {10}
    assert report["torchtitan"] in table[-1]


def test_bench_gpu_beside_torchtitan(workplace: Workplace) -> None:
    case = {**CASE, "step_tokens": 512, "micro_batch": 4, "pair": True, "steps": 3}
    code, output = workplace.tool("bench_gpu", "--work", json.dumps(case))
    assert code == 0, output
    assert 0.1 < json.loads(output.splitlines()[-1])["ratio"] < 10


def test_bench_handover(workplace: Workplace) -> None:
    code, output = workplace.tool("bench_handover", "tiny.toml", "--json")
    assert code == 0, output
    seconds = {k: v for k, v in json.loads(output[output.rindex("{") :]).items() if isinstance(v, float)}
    assert list(seconds) == ["save", "grow", "build", "load", "first step", "rest", "total"]
    assert all(value > 0 for value in seconds.values())
    assert abs(sum(seconds.values()) - 2 * seconds["total"]) < 0.01
