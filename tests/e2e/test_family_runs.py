"""Other families than Llama 2, trained: on every layout the losses of one process, and after a kill the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
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
FAMILIES = {
    "qwen3, tied": [
        "model.family=qwen3",
        "model.head_dim=32",
        "model.tie_embeddings=true",
    ],
    "smollm2": ["model.family=smollm2"],
    "llama3, scaled": [
        "model.family=llama3",
        "model.rope_scaling.factor=8.0",
        "model.rope_scaling.original_length=128",
    ],
    "mistral": ["model.family=mistral"],
    "qwen2": ["model.family=qwen2"],
}
# Of the base model, with a checkpoint of the second; see family_layouts.py.
THREE_STEPS = [
    "train.global_batch_tokens=512",
    "train.warmup=1 steps",
    "budget.tokens=3Ki",
    "growth[0].timing=3 steps",
    "checkpoint.interval=2 steps",
    "validation.sequences=4",
]
# The layout of each session; the second begins with the checkpoint of two steps of the first. Two ranks of FSDP and of
# tensor parallel alone: their gradients are compared in tests/titan/test_family_models.py.
ALONE: dict[str, list[str]] = {"trained": [], "trained again": []}
FOUR_RANKS = {
    "FSDP and tensor parallel": ["parallel.shard=2", "parallel.tensor=2"],
    "HSDP, loss in chunks": [
        "parallel.replicate=2",
        "parallel.shard=2",
        "train.loss_chunk=100",
    ],
}

Found = dict[str, dict[str, Any]]  # session -> what family_layouts.py says of it


class Training:
    """Every family, in processes that are started once for all of them."""

    def __init__(
        self, workplace: Workplace, folder: Path, sessions: dict[str, list[str]], ranks: int
    ):  # fmt: skip
        self.sessions = sessions
        self.results = folder / "results.json"
        jobs: dict[str, list[list[str]]] = {}
        for case, family in FAMILIES.items():
            common = [*family, *THREE_STEPS, f"run.folder={folder / str(len(jobs))}"]
            jobs[case] = [[*common, *sets] for sets in sessions.values()]
        listed = folder / "jobs.json"
        listed.write_text(json.dumps(jobs))
        self.process = Warm(
            Path(__file__).with_name("family_layouts.py"),
            ["tiny.toml", str(listed), str(self.results)],
            workplace.folder,
            environment(),
            ranks,
        )

    def found(self) -> dict[str, Found]:
        """Of every family."""
        assert self.process.wait(300) == 0, self.process.output()
        found = {}
        for case, of_sessions in json.loads(self.results.read_text()).items():
            found[case] = dict(zip(self.sessions, of_sessions, strict=True))
        return found


@pytest.fixture(scope="module")
def trained(
    workplace: Workplace, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Found]:
    """Of every family what each session left, in one process and in four."""
    one = Training(workplace, tmp_path_factory.mktemp("one"), ALONE, ranks=0)
    four = Training(workplace, tmp_path_factory.mktemp("four"), FOUR_RANKS, ranks=4)
    alone, together = one.found(), four.found()
    return {case: {**alone[case], **together[case]} for case in FAMILIES}


@pytest.mark.parametrize("case", FAMILIES)
def test_a_family_learns(trained: dict[str, Found], case: str) -> None:
    seen = [loss for _, loss in trained[case]["trained"][METRICS]]
    assert len(seen) == 3
    assert seen[2] < seen[1] - 0.05 < seen[0] - 0.15


@pytest.mark.parametrize("case", FAMILIES)
def test_after_the_loss_of_a_checkpoint_it_is_the_same_run(
    trained: dict[str, Found], case: str
) -> None:
    """Bit for bit: losses, weights and moments."""
    assert trained[case]["trained again"] == trained[case]["trained"]


@pytest.mark.parametrize("name", FOUR_RANKS)
@pytest.mark.parametrize("case", FAMILIES)
def test_every_layout_has_the_losses_of_one_process(
    trained: dict[str, Found], case: str, name: str
) -> None:
    for file in (METRICS, VALIDATION):
        expected, found = (
            dict(trained[case]["trained"][file]),
            trained[case][name][file],
        )
        assert [step for step, _ in found] == list(expected)
        for step, loss in found:
            assert loss == pytest.approx(expected[step], rel=SUMMATION_ORDER), step


@pytest.mark.parametrize("name", FOUR_RANKS)
@pytest.mark.parametrize("case", FAMILIES)
def test_a_rank_holds_the_bytes_that_are_planned(
    workplace: Workplace, trained: dict[str, Found], case: str, name: str
) -> None:
    sets = [*FAMILIES[case], *THREE_STEPS, *FOUR_RANKS[name]]
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
    sets = [*FAMILIES["qwen3, tied"], "budget.tokens=12Ki", "growth[0].timing=6Ki"]
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
