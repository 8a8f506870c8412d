"""The same recipe on other layouts: the same plan, the same data, the same losses up to float32 summation order."""

from pathlib import Path

import pytest
from launch import Workplace, losses, records

from stackgrow.run_folder.folder import METRICS, VALIDATION

# Measured: 1.6e-7 relative over the 40 steps (2 ranks, float32); ten times that leaves room for other processors.
SUMMATION_ORDER = 2e-6

# Six steps of the base, growth and four of the target.
SHORT = (
    "growth[0].timing=6Ki",
    "budget.tokens=10Ki",
    "checkpoint.interval=10 steps",
    "validation.interval=2 steps",
)


@pytest.fixture(scope="module")
def short(workplace: Workplace) -> Path:
    """The same of one process."""
    workplace.run(*SHORT, "run.folder=short")
    return workplace.folder / "short"


def worst(run: Path, reference: Path, name: str = METRICS) -> float:
    """The largest relative difference of a loss, of the same steps of both stages."""
    expected, found = losses(reference, name), losses(run, name)
    assert expected.keys() == found.keys()
    return max(abs(found[k] / expected[k] - 1) for k in expected)


def test_two_fsdp_ranks_have_the_losses_of_one_process(
    reference: Path, reference_fsdp: Path
) -> None:
    assert worst(reference_fsdp, reference) < SUMMATION_ORDER
    assert worst(reference_fsdp, reference, VALIDATION) < SUMMATION_ORDER
    assert [r["position"] for r in records(reference_fsdp).values()] == [
        16 * i for i in range(1, 41)
    ]


@pytest.mark.parametrize(
    ("sets", "ranks"),
    [
        (["parallel.tensor=2", "data.workers=1"], 2),
        (
            [
                "train.activation_checkpoint=full",
                "train.loss_chunk=100",
                "checkpoint.async_mode=async",
            ],
            2,
        ),
        (["train.activation_checkpoint=selective", "train.micro_batch=16"], 1),
        (["parallel.tensor=2", "parallel.loss_parallel=false"], 2),
    ],
)
def test_every_layout_has_the_losses_of_one_process(
    workplace: Workplace, short: Path, tmp_path: Path, sets: list[str], ranks: int
) -> None:
    workplace.run(*sets, *SHORT, f"run.folder={tmp_path}/run", warm_ranks=ranks)
    assert worst(tmp_path / "run", short) < SUMMATION_ORDER
    assert worst(tmp_path / "run", short, VALIDATION) < SUMMATION_ORDER


def test_replicated_shards_have_the_losses_of_one_process(
    workplace: Workplace, short: Path, tmp_path: Path
) -> None:
    workplace.run(
        *SHORT,
        "parallel.replicate=2",
        "parallel.shard=2",
        f"run.folder={tmp_path}/run",
        warm_ranks=4,
    )
    assert worst(tmp_path / "run", short) < SUMMATION_ORDER


def test_fsdp_with_tensor_parallel(
    workplace: Workplace, short: Path, tmp_path: Path
) -> None:
    workplace.run(
        *SHORT, "parallel.tensor=2", f"run.folder={tmp_path}/run", warm_ranks=4
    )
    assert worst(tmp_path / "run", short) < SUMMATION_ORDER


def test_compiled_blocks_have_the_losses_of_eager_ones(
    workplace: Workplace, short: Path, tmp_path: Path
) -> None:
    sets = [*SHORT, "train.compile=true", "validation.interval=100 steps"]
    workplace.run(*sets, f"run.folder={tmp_path}/run")
    assert worst(tmp_path / "run", short) < SUMMATION_ORDER


def test_bf16_is_applied_and_close(
    workplace: Workplace, short: Path, tmp_path: Path
) -> None:
    workplace.run(
        *SHORT, "train.precision=bf16", f"run.folder={tmp_path}/run", warm_ranks=2
    )
    # bf16 has 8 bits of mantissa (4e-3): different, yet the same curve.
    assert 1e-6 < worst(tmp_path / "run", short) < 2e-2
