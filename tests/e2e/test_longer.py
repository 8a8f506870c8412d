"""A finished run goes on with a larger budget: bit for bit the run that had it from the start, whatever kills it."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from launch import (
    TARGET,
    Workplace,
    assert_audited,
    losses,
    stage_of,
)

from stackgrow import seal
from stackgrow.audit.case import open_case
from stackgrow.audit.chain import audit_run
from stackgrow.audit.longer import extended
from stackgrow.errors import DamagedError
from stackgrow.run_folder.choose import choose
from stackgrow.run_folder.extended import read_extensions, write_extensions
from stackgrow.run_folder.folder import PROVENANCE, VALIDATION, StageFolder
from stackgrow.run_folder.state import FINISHED, state_of

# The target's 20 steps decay from step 18 on, and its checkpoints are those of step 4, 8 ... 20; in 48Ki it has 28.
WSD = [
    "train.schedule=wsd",
    "train.horizon=stage",
    "train.decay_fraction=0.2",
    "checkpoint.keep=5",
]
LONGER = "budget.tokens=48Ki"


def assert_same_end(run: Path, straight: Path, step: int) -> None:
    """Losses, weights and AdamW's state."""
    assert losses(run) == losses(straight)
    assert losses(run, VALIDATION) == losses(straight, VALIDATION)
    manifest = seal.read_seal(stage_of(run, TARGET).checkpoint(step))
    other = seal.read_seal(stage_of(straight, TARGET).checkpoint(step))
    assert manifest is not None
    assert other is not None
    for name in ("tensors", "moments"):
        assert manifest[name] == other[name]


@pytest.fixture(scope="module")
def short(workplace: Workplace) -> Path:
    """The finished run."""
    workplace.run(*WSD, "run.folder=short")
    return workplace.folder / "short"


@pytest.fixture(scope="module")
def straight(workplace: Workplace) -> Path:
    """The run that had the larger budget from the start."""
    workplace.run(*WSD, LONGER, "run.folder=straight")
    return workplace.folder / "straight"


@pytest.fixture(scope="module")
def made_longer(workplace: Workplace, short: Path) -> Path:
    """The finished run, gone on with, in spite of a kill at every step of its becoming longer."""
    run = shutil.copytree(short, workplace.folder / "extended")
    sets = [*WSD, LONGER, "run.folder=extended"]
    for point in (
        "extend.kept 1",
        "extend.announced 1",
        "extend.begun 1",
        "train.step 6",
    ):
        workplace.kill_at(point, *sets)
    workplace.run(*sets)
    return run


def test_a_run_that_went_on_is_the_one_that_had_the_budget_from_the_start(
    made_longer: Path, straight: Path
) -> None:
    assert_same_end(made_longer, straight, 28)
    assert_audited(made_longer)
    assert state_of(made_longer).state == FINISHED
    told = audit_run(made_longer).checks["extended"]
    assert told.startswith(
        f"{TARGET}: 20 -> 28 steps, from the checkpoint of step 16, on 20"
    )


def test_what_it_had_before_is_kept(made_longer: Path, short: Path) -> None:
    """The decayed weights of the shorter run, its records and its DONE."""
    ended = stage_of(made_longer, TARGET).ended_at(20)
    before = stage_of(short, TARGET)
    for kept, file in (
        (ended.done_file, before.done_file),
        (ended.metrics_file, before.metrics_file),
        (ended.validation_file, before.validation_file),
    ):
        assert kept.read_bytes() == file.read_bytes()
    checkpoint = ended.final_checkpoint()
    manifest = seal.read_seal(checkpoint)
    assert manifest == seal.read_seal(before.final_checkpoint())
    assert seal.damage(checkpoint, manifest) == []
    chosen = choose(checkpoint)
    assert chosen is not None
    assert (chosen.stage.name, chosen.step) == (TARGET, 20)


def test_what_reads_runs_reads_it_as_any_other(
    workplace: Workplace, made_longer: Path, straight: Path, tmp_path: Path
) -> None:
    rows = []
    for run in (made_longer, straight):
        code, output = workplace.tool("runs", run, "--json")
        assert code == 0, output
        rows += json.loads(output)
    for key in ("state", "stage", "step", "tokens", "budget_tokens"):
        assert rows[0][key] == rows[1][key], key

    for run in (made_longer, straight):
        page = tmp_path / f"{run.name}.html"
        code, output = workplace.tool("report", run, "--out", page)
        assert code == 0, output
        assert page.stat().st_size > 10_000
    code, output = workplace.tool("compare_runs", straight, made_longer)
    assert code == 0, output
    assert "+0.0%" in output


def from_another_step(stage: StageFolder) -> None:
    (extension,) = read_extensions(stage)
    write_extensions(stage, [dataclasses.replace(extension, from_step=12)])


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("forge", "told"),
    [
        (lambda s: s.extended_file.unlink(), "tells of an extension"),
        (lambda s: edit(s.extended_file, "16", "12"), "is not what was written"),
        (from_another_step, f"no session of {PROVENANCE} tells of it"),
        (lambda s: edit(s.ended_at(20).done_file, "20", "21"), "that was kept"),
        (lambda s: shutil.rmtree(s.ended_at(20).path), "has no DONE"),
    ],
)
def test_an_audit_finds_what_was_done_to_it_afterwards(
    made_longer: Path, tmp_path: Path, forge: Callable[[StageFolder], None], told: str
) -> None:
    run = shutil.copytree(made_longer, tmp_path / "run")
    forge(stage_of(run, TARGET))
    try:
        found = [str(problem) for problem in extended(open_case(run))]
    except DamagedError as error:
        found = [str(error)]
    assert any(told in problem for problem in found)


def test_steps_before_and_after_are_trained_again_bit_for_bit(
    workplace: Workplace, made_longer: Path
) -> None:
    code, output = workplace.tool(
        "audit_run", made_longer, "--replay", f"{TARGET}:12+8", "--strict"
    )
    assert code == 0, output
    assert "equal bit for bit" in output


def test_on_several_ranks_from_the_last_checkpoint_where_the_horizon_is_beyond(
    workplace: Workplace,
) -> None:
    """A cosine that was given its length beforehand has the same rates for every budget."""
    sets = [
        "growth[0].timing=4 steps",
        "growth[0].train.horizon=40 steps",
        "checkpoint.interval=1000 steps",
    ]
    workplace.run(*sets, "budget.tokens=8Ki", "run.folder=cosine", warm_ranks=2)
    longer = [*sets, "budget.tokens=10Ki"]
    output = workplace.run(*longer, "run.folder=cosine", warm_ranks=2)
    assert "4 -> 6 steps, from the checkpoint of step 4" in output
    workplace.run(*longer, "run.folder=cosine-straight", warm_ranks=2)
    run, straight = workplace.folder / "cosine", workplace.folder / "cosine-straight"
    assert losses(run) == losses(straight)
    assert_audited(run)
