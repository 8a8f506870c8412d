"""Other families than Llama 2, trained: on every layout the losses of one process, and after a kill the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from families_for_tests import RUNS
from launch import (
    BASE,
    TARGET,
    Workplace,
    assert_audited,
    environment,
    losses,
    stage_of,
    weights,
)
from warm import Warm

from stackgrow.plan.memory import layout, stage_memory
from stackgrow.plan.resolve import make_plan
from stackgrow.recipe.load import load_recipe
from stackgrow.run_folder.folder import METRICS, VALIDATION

# As tests/e2e/test_parallel.py measures it: float32 sums in another order.
SUMMATION_ORDER = 2e-6
# Of a base of one layer, with a checkpoint of each; see family_layouts.py.
THREE_STEPS = [
    "base.n_layers=1",
    "train.global_batch_tokens=512",
    "train.learning_rate=6e-3",  # one layer has little to learn with
    "train.warmup=1 steps",
    "budget.tokens=3Ki",
    "growth[0].timing=3 steps",
    "checkpoint.interval=1 steps",
    "validation.sequences=4",
]


class Session(NamedTuple):
    lost: int  # of the newest checkpoints, before it begins
    sets: list[str]


# The sessions of each family, one after another in one run folder. The resumed ones have their last step to do.
ALONE = {"trained": Session(0, []), "trained, resumed": Session(1, [])}
# Two ranks of FSDP and of tensor parallel alone: their gradients are compared in tests/titan/test_family_models.py.
HYBRID = ["parallel.shard=2", "parallel.tensor=2"]
REPLICATED = ["parallel.replicate=2", "parallel.shard=2", "train.loss_chunk=100"]
FOUR_RANKS = {
    "FSDP and tensor parallel": Session(0, HYBRID),
    "FSDP and tensor parallel, resumed": Session(1, HYBRID),
    "HSDP, loss in chunks": Session(2, REPLICATED),  # from the other layout's first
    "HSDP, loss in chunks, resumed": Session(1, REPLICATED),
}
COMPILED = ["train.compile=true"]
GENERATED = {
    "eager": Session(0, []),
    "compiled": Session(3, COMPILED),
    "compiled, resumed": Session(1, COMPILED),
}
LAYOUTS = [name for name in FOUR_RANKS if "resumed" not in name]

Found = dict[str, dict[str, Any]]  # session -> what family_layouts.py says of it


def train(
    workplace: Workplace,
    folder: Path,
    families: dict[str, list[str]],
    sessions: dict[str, Session],
    ranks: int,
    seconds: int = 300,
) -> dict[str, Found]:
    """Every family, in processes that are started once for all of them."""
    jobs: dict[str, list[Session]] = {}
    for case, family in families.items():
        common = [*family, *THREE_STEPS, f"run.folder={folder / str(len(jobs))}"]
        jobs[case] = []
        for lost, sets in sessions.values():
            jobs[case].append(Session(lost, [*common, *sets]))
    listed, results = folder / "jobs.json", folder / "results.json"
    listed.write_text(json.dumps(jobs))
    process = Warm(
        Path(__file__).with_name("family_layouts.py"),
        ["tiny.toml", str(listed), str(results)],
        workplace.folder,
        environment(),
        ranks,
    )
    assert process.wait(seconds) == 0, process.output()
    found = {}
    for case, of_sessions in json.loads(results.read_text()).items():
        found[case] = dict(zip(sessions, of_sessions, strict=True))
    return found


@pytest.fixture(scope="module")
def trained(
    workplace: Workplace, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Found]:
    """Of every family what each session left, in one process and in four."""
    one, four = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("four")
    alone = train(workplace, one, RUNS, ALONE, ranks=0)
    together = train(workplace, four, RUNS, FOUR_RANKS, ranks=4)
    return {case: {**alone[case], **together[case]} for case in RUNS}


def worst(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest relative difference of a loss, in training and validation."""
    differences = []
    for file in (METRICS, VALIDATION):
        for (step, loss), (expected_step, wanted) in zip(
            found[file], expected[file], strict=True
        ):
            assert step == expected_step
            differences.append(abs(loss / wanted - 1))
    return max(differences)


@pytest.mark.parametrize("case", RUNS)
def test_a_family_learns(trained: dict[str, Found], case: str) -> None:
    seen = [loss for _, loss in trained[case]["trained"][METRICS]]
    assert len(seen) == 3
    assert seen[2] < seen[1] - 0.05 < seen[0] - 0.15


@pytest.mark.parametrize("name", ["trained", *LAYOUTS])
@pytest.mark.parametrize("case", RUNS)
def test_after_the_loss_of_a_checkpoint_it_is_the_same_run(
    trained: dict[str, Found], case: str, name: str
) -> None:
    """Bit for bit: losses, weights and moments."""
    assert trained[case][f"{name}, resumed"] == trained[case][name]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("case", RUNS)
def test_every_layout_has_the_losses_of_one_process(
    trained: dict[str, Found], case: str, name: str
) -> None:
    assert worst(trained[case][name], trained[case]["trained"]) < SUMMATION_ORDER


@pytest.mark.generated
def test_generated_code_has_the_losses_of_eager_layers_and_resumes(
    workplace: Workplace, tmp_path: Path
) -> None:
    """Inductor's, of each family: minutes."""
    families: dict[str, list[str]] = {"llama2": [], **RUNS}
    found = train(workplace, tmp_path, families, GENERATED, ranks=0, seconds=1800)
    for case, sessions in found.items():
        difference = worst(sessions["compiled"], sessions["eager"])
        print(f"{case}: {difference:.1e}")
        assert 0 < difference < SUMMATION_ORDER, case
        assert sessions["compiled, resumed"] == sessions["compiled"], case


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("case", RUNS)
def test_a_rank_holds_the_bytes_that_are_planned(
    workplace: Workplace, trained: dict[str, Found], case: str, name: str
) -> None:
    sets = [*RUNS[case], *THREE_STEPS, *FOUR_RANKS[name].sets]
    recipe = load_recipe(workplace.folder / "tiny.toml", sets)
    stage = make_plan(recipe).train_stages[0]
    planned = stage_memory(stage, layout(stage.parallel, ranks=4))
    assert trained[case][name]["bytes"] == {
        "parameters": planned.parameters,
        "gradients": planned.gradients,
        "optimizer": planned.optimizer,
    }


def test_killed_and_resumed_it_is_the_same_run(
    workplace: Workplace, tmp_path: Path
) -> None:
    """Through a growth, of the family that has most of its own."""
    sets = [*RUNS["qwen3, tied"], "budget.tokens=12Ki", "growth[0].timing=6Ki"]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    workplace.run(*sets, f"run.folder={undisturbed}")
    seen = list(losses(undisturbed).values())
    assert seen[-1] < seen[0] - 0.5
    assert_audited(undisturbed)

    # Before the fifth step of the grown model, whose last checkpoint is of the fourth.
    workplace.kill_at("train.step 11", *sets, f"run.folder={killed}")
    workplace.run(*sets, f"run.folder={killed}")
    assert_audited(killed)
    for file in (METRICS, VALIDATION):
        assert losses(killed, file) == losses(undisturbed, file)
    for stage in (BASE, TARGET):
        found = weights(stage_of(killed, stage).checkpoint(6))
        assert found == weights(stage_of(undisturbed, stage).checkpoint(6))
