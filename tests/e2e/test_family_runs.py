"""Runs of other families than Llama 2, with growth: on every layout the losses of one process, and resumed bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch import BASE, TARGET, Workplace, assert_audited, losses, stage_of, weights

from stackgrow.run_folder.folder import METRICS, VALIDATION

# As tests/e2e/test_parallel.py measures it: float32 sums in another order.
SUMMATION_ORDER = 2e-6
SHORT = ("budget.tokens=12Ki", "growth[0].timing=6Ki")  # 6 steps, growth, 6 steps
FAMILIES = {
    "qwen3, tied": (
        "model.family=qwen3",
        "model.head_dim=32",
        "model.tie_embeddings=true",
    ),
    "smollm2": ("model.family=smollm2",),
    "llama3, scaled": (
        "model.family=llama3",
        "model.rope_scaling.factor=8.0",
        "model.rope_scaling.original_length=128",
    ),
    "mistral": ("model.family=mistral",),
    "qwen2": ("model.family=qwen2",),
}
LAYOUTS = {
    "FSDP": ((), 2),
    "FSDP, loss in chunks": (("train.loss_chunk=100",), 2),
    "tensor parallel": (("parallel.tensor=2",), 2),
    "compiled": (("train.compile=true",), 0),
}
# Every family's gradients on two ranks are compared in tests/titan/test_family_models.py; whole runs cost more.
RUNS = [
    ("qwen3, tied", "FSDP, loss in chunks"),
    ("qwen3, tied", "tensor parallel"),
    ("qwen3, tied", "compiled"),
    ("smollm2", "FSDP"),
    ("qwen2", "tensor parallel"),
]


@pytest.fixture(scope="module")
def references(workplace: Workplace) -> dict[str, Path]:
    """The undisturbed run of one process, of each family."""
    runs = {}
    for number, (case, sets) in enumerate(FAMILIES.items()):
        runs[case] = workplace.folder / f"family-{number}"
        workplace.run(*sets, *SHORT, f"run.folder={runs[case]}")
    return runs


@pytest.mark.parametrize("case", FAMILIES)
def test_a_family_learns(references: dict[str, Path], case: str) -> None:
    seen = list(losses(references[case]).values())
    assert len(seen) == 12
    assert seen[-1] < seen[0] - 0.5
    assert_audited(references[case])


@pytest.mark.parametrize(("case", "layout"), RUNS)
def test_every_layout_has_the_losses_of_one_process(
    workplace: Workplace,
    references: dict[str, Path],
    tmp_path: Path,
    case: str,
    layout: str,
) -> None:
    sets, ranks = LAYOUTS[layout]
    run = tmp_path / "run"
    workplace.run(*FAMILIES[case], *SHORT, *sets, f"run.folder={run}", warm_ranks=ranks)
    for name in (METRICS, VALIDATION):
        expected, found = losses(references[case], name), losses(run, name)
        assert found.keys() == expected.keys()
        for key, loss in found.items():
            assert loss == pytest.approx(expected[key], rel=SUMMATION_ORDER), key


@pytest.mark.parametrize("case", ["qwen3, tied", "qwen2"])
def test_killed_and_resumed_it_is_the_same_run(
    workplace: Workplace, references: dict[str, Path], tmp_path: Path, case: str
) -> None:
    run = tmp_path / "run"
    sets = (*FAMILIES[case], *SHORT, f"run.folder={run}")
    workplace.kill_at("train.step 6", *sets)  # before the sixth step of the base
    workplace.kill_at("train.step 7", *sets)  # the fifth step of the grown model
    workplace.run(*sets)
    assert_audited(run)
    assert losses(run) == losses(references[case])
    assert losses(run, VALIDATION) == losses(references[case], VALIDATION)
    for stage in (BASE, TARGET):
        found = weights(stage_of(run, stage).checkpoint(6))
        assert found == weights(stage_of(references[case], stage).checkpoint(6))
