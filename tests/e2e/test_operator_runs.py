"""Each operator in a real run: what it computes is sealed, loaded, checked and trained on, by one rank and by two."""

import hashlib
import json
from pathlib import Path

import pytest
from launch import Workplace, assert_audited, losses, records, stage_of, weights

from stackgrow.run_folder.folder import VALIDATION

GROW, TARGET = "stage-1-grow", "stage-2-train-4L"
NARROW = [
    "base.model.dim=32",
    "base.model.n_heads=2",
    "base.model.n_kv_heads=1",
    "base.model.ffn_dim=88",
]
CASES = {
    "zero depth": (["growth[0].operator=zero"], "stage-0-train-2L"),
    "split width": (
        ["growth[0].operator=split", "base.n_layers=4", *NARROW],
        "stage-0-train-4L",
    ),
    "zero both": (
        ["growth[0].operator=zero", "base.model.norm_eps=2e-5", *NARROW],
        "stage-0-train-2L",
    ),
    "random depth": (
        ["growth[0].operator=random", "growth[0].ramp=4 steps"],
        "stage-0-train-2L",
    ),
    "random both": (
        [
            "growth[0].operator=random",
            "growth[0].ramp=2 steps",
            "base.model.norm_eps=2e-5",
            *NARROW,
        ],
        "stage-0-train-2L",
    ),
    "stack noise": (["growth[0].noise=0.2"], "stage-0-train-2L"),
}
PRESERVING = {
    "zero depth": 1e-6,
    "zero both": 1e-6,
    "random depth": 1e-6,
    "random both": 1e-6,
}  # float32 rounding of a mean over 704 tokens
README = Path(__file__).parents[2] / "recipes" / "REFERENCE.md"
STACK = ["--operator", "stack", "--factor", "2"]


@pytest.mark.parametrize("case", CASES)
def test_operator_runs_and_keeps_its_promise(
    workplace: Workplace, tmp_path: Path, case: str
) -> None:
    sets, base = CASES[case]
    run = tmp_path / "run"
    workplace.run(
        "growth[0].timing=10Ki",
        "budget.tokens=16Ki",
        *sets,
        f"run.folder={run}",
        warm_ranks=2 if "both" in case else 0,
    )
    validation = losses(run, VALIDATION)
    before, after = validation[base, 10], validation["stage-2-train-4L", 0]
    if case in PRESERVING:
        assert abs(after / before - 1) < PRESERVING[case]
    else:
        assert after != before
    assert validation["stage-2-train-4L", 6] < after, "the grown model learns"
    growth = json.loads(stage_of(run, GROW).growth_file.read_text(encoding="utf-8"))
    assert growth["tensors"] == weights(stage_of(run, GROW).checkpoints)
    assert growth["bytes_written"] > 10_000


def test_every_new_parameter_learns(workplace: Workplace, tmp_path: Path) -> None:
    """Zeroed projections get gradients from the first step on, and no tensor is left out of the optimizer."""
    run = tmp_path / "run"
    workplace.run("budget.tokens=24Ki", "growth[0].operator=zero", f"run.folder={run}")
    grown, trained = (
        weights(stage_of(run, GROW).checkpoints),
        weights(stage_of(run, TARGET).checkpoint(4)),
    )
    assert grown.keys() == trained.keys()
    assert not [name for name in grown if grown[name] == trained[name]]


def test_growth_is_the_same_after_a_kill_and_on_other_ranks(
    workplace: Workplace, tmp_path: Path
) -> None:
    sets = [
        "budget.tokens=24Ki",
        "growth[0].operator=split",
        "base.n_layers=4",
        *NARROW,
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    workplace.run(*sets, f"run.folder={one}")
    workplace.kill_at("train.step 11", *sets, f"run.folder={two}")
    workplace.kill_at("grow.computed 1", *sets, f"run.folder={two}")
    workplace.run(*sets, f"run.folder={two}")
    assert weights(stage_of(two, GROW).checkpoints) == weights(
        stage_of(one, GROW).checkpoints
    )
    assert losses(two) == losses(one)


def test_masked_stage_is_the_same_after_a_kill(
    workplace: Workplace, tmp_path: Path
) -> None:
    sets = [
        "growth[0].timing=8Ki",
        "budget.tokens=20Ki",
        "growth[0].operator=random",
        "growth[0].ramp=10 steps",
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    workplace.run(*sets, f"run.folder={one}")
    workplace.kill_at("train.step 15", *sets, f"run.folder={two}")
    workplace.run(*sets, f"run.folder={two}")
    assert losses(two) == losses(one)
    assert weights(stage_of(two, TARGET).checkpoint(12)) == weights(
        stage_of(one, TARGET).checkpoint(12)
    )
    assert_audited(two)
    masks = [r["mask"] for key, r in records(one).items() if key[0] == TARGET]
    assert masks == [min(1.0, step / 10) for step in range(1, 13)]
    for checkpoint, mask in (
        (stage_of(one, TARGET).checkpoint(8), "0.80"),
        (stage_of(one, GROW).checkpoints, "0.00"),
    ):
        code, told = workplace.tool(
            "grow_checkpoint", checkpoint, tmp_path / "more", *STACK
        )
        assert (code, f"is masked, at {mask}: export it with" in told) == (2, True)
    code, told = workplace.tool(
        "grow_checkpoint",
        stage_of(one, TARGET).checkpoint(12),
        tmp_path / "more",
        *STACK,
    )
    assert (code, "4 -> 8 layers" in told) == (0, True)


def test_an_operator_of_ones_own_runs_with_trust_alone(
    workplace: Workplace, tmp_path: Path
) -> None:
    """The one in recipes/REFERENCE.md. Without --trust nothing of it is imported, by no tool."""
    code = README.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    ran = tmp_path / "ran"
    module = workplace.folder / "my_operators.py"
    module.write_text(
        f"import pathlib\n\npathlib.Path({str(ran)!r}).touch()\n\n{code}",
        encoding="utf-8",
    )
    run = tmp_path / "run"
    sets = workplace.arguments(
        "budget.tokens=24Ki",
        "growth[0].operator=my_operators:damped",
        f"run.folder={run}",
    )
    try:
        status, told = workplace.tool("run_recipe", *sets)
        assert status == 2
        assert 'growth[0].operator: "my_operators:damped" names code' in told
        assert "--trust" in told
        status, told = workplace.tool("run_recipe", *sets, "--plan")
        assert (status, "my_operators:damped" in told) == (0, True)
        assert not ran.exists()
        assert not run.exists()

        status, told = workplace.tool("run_recipe", *sets, "--trust")
        assert status == 0, told
        assert ran.exists()
        growth = json.loads(stage_of(run, GROW).growth_file.read_text(encoding="utf-8"))
        assert growth["tensors"] == weights(stage_of(run, GROW).checkpoints)
        assert (
            growth["map"]["layers.2.attention.wo.weight"]
            == "half(layers.0.attention.wo.weight)"
        )
        assert (
            growth["operator_file_sha256"]
            == hashlib.sha256(module.read_bytes()).hexdigest()
        )
        ran.unlink()

        status, told = workplace.tool("audit_run", run)
        assert status == 0, told
        assert f"{GROW} not: my_operators:damped is code" in told
        checkpoint = stage_of(run, TARGET).checkpoint(4)
        status, told = workplace.tool("export_hf", checkpoint, tmp_path / "exported")
        assert status == 0, told
        assert not ran.exists()
        status, told = workplace.tool("audit_run", run, "--trust")
        assert (status, "not: my_operators" in told) == (0, False), told
        assert ran.exists()
    finally:
        module.unlink()
