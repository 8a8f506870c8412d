"""A base that grows untrained, d = 0: its stage has no steps, and hands on the model as it is initialised."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch import (
    BASE,
    GROW,
    TARGET,
    Workplace,
    assert_audited,
    losses,
    stage_of,
    weights,
)

from stackgrow.report.isoflop import read_run
from stackgrow.run_folder.folder import VALIDATION

UNTRAINED = ("growth[0].timing=0B", "budget.tokens=4Ki", "train.horizon=stage")


@pytest.fixture(scope="module")
def untrained(workplace: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run."""
    run = tmp_path_factory.mktemp("untrained") / "run"
    workplace.run(*UNTRAINED, f"run.folder={run}")
    return run


def test_an_untrained_base_is_the_one_that_training_begins_with(
    untrained: Path, reference: Path
) -> None:
    run = untrained
    assert_audited(run)
    validations = losses(run, VALIDATION)
    assert validations[BASE, 0] == losses(reference, VALIDATION)[BASE, 0]
    assert [step for stage, step in losses(run) if stage == BASE] == []
    assert [step for stage, step in losses(run) if stage == TARGET] == [1, 2, 3, 4]

    # Layer 2 of the grown model is the untrained layer 0, and so on.
    base = weights(stage_of(run, BASE).checkpoint(0))
    grown = weights(stage_of(run, GROW).checkpoints)
    for name, fingerprint in grown.items():
        source = name.replace("layers.2.", "layers.0.").replace(
            "layers.3.", "layers.1."
        )
        assert fingerprint == base[source]
    assert len(grown) > len(base)
    assert read_run(run, "timing").at == 0


def test_an_untrained_base_is_the_same_after_kills(
    workplace: Workplace, untrained: Path, tmp_path: Path
) -> None:
    """Before its checkpoint is whole, and when it is, but the stage isn't DONE."""
    killed = tmp_path / "killed"
    for point in ("save.metadata 1", "done 1"):
        workplace.kill_at(point, *UNTRAINED, f"run.folder={killed}")
        assert not stage_of(killed, BASE).done_file.exists()
    workplace.run(*UNTRAINED, f"run.folder={killed}")

    assert_audited(killed)
    assert losses(killed) == losses(untrained)
    assert losses(killed, VALIDATION) == losses(untrained, VALIDATION)
    ends = [stage_of(run, TARGET).checkpoint(4) for run in (killed, untrained)]
    assert weights(ends[0]) == weights(ends[1])
