"""The benchmarks of the GPU path, at the size that a CPU runs: that they work, not what they measure."""

import dataclasses
import json
from pathlib import Path

from launch import REPOSITORY, Workplace, run_tool
from shapes import Case

BENCH = REPOSITORY / "tools" / "bench"


def test_the_gpu_benchmark_writes_a_table(tmp_path: Path) -> None:
    arguments = ["--small", "--modes", "eager", "--kernels", "sdpa", "flex"]
    arguments += ["--steps", "2", "--loss-chunk", "100", "--out", "bench.json"]
    code, output = run_tool("bench/gpu", *arguments, cwd=tmp_path)
    assert code == 0, output
    report = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    table = output[output.index("\n| ") :].strip().splitlines()
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


def test_a_stage_is_measured_beside_torchtitan(workplace: Workplace) -> None:
    case = Case(
        shape="small",
        kernel="sdpa",
        mode="eager",
        precision="bf16",
        activation_checkpoint="none",
        loss_chunk=100,
        step_tokens=512,
        steps=3,
        micro_batch=4,
        pair=True,
    )
    code, output = workplace.tool(
        "bench/gpu", "--work", json.dumps(dataclasses.asdict(case))
    )
    assert code == 0, output
    assert 0.1 < json.loads(output.splitlines()[-1])["ratio"] < 10


def test_a_stage_of_another_family_is_measured_beside_torchtitan(
    workplace: Workplace,
) -> None:
    sets = []
    for key in ("family=qwen3", "head_dim=32", "tie_embeddings=true"):
        sets += ["--set", f"model.{key}"]
    arguments = ["--recipe", "tiny.toml", *sets, "--steps", "2", "--json"]
    code, output = workplace.tool("bench/overhead", *arguments)
    assert code == 0, output
    report = json.loads(output[output.index("{") :])
    assert report["steps"] == 2
    assert 0.1 < report["ratio"] < 10
    code, output = workplace.tool(
        "bench/overhead", "--recipe", "tiny.toml", "--set", "model.family=qwen2"
    )
    assert code == 2
    assert "no model of torchtitan's has biases" in output


def test_the_handover_is_split_into_its_parts(workplace: Workplace) -> None:
    code, output = workplace.tool("bench/handover", "tiny.toml", "--json")
    assert code == 0, output
    report = json.loads(output[output.rindex("{") :])
    seconds = {
        name: value for name, value in report.items() if isinstance(value, float)
    }
    assert list(seconds) == [
        "save",
        "grow",
        "build",
        "load",
        "first step",
        "rest",
        "total",
    ]
    assert all(value > 0 for value in seconds.values())
    assert abs(sum(seconds.values()) - 2 * seconds["total"]) < 0.01
