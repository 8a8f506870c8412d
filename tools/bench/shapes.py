"""The models that are measured on a GPU: those of the paper's recipes, and a tiny one for any machine. No torch."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from random_store import random_store

from stackgrow.plan.resolve import make_plan
from stackgrow.plan.stages import Plan, TrainStage
from stackgrow.recipe.keys import Model
from stackgrow.recipe.load import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
# Shape -> the recipe, and which of its train stages trains the shape.
SHAPES = {
    "410M": ("paper/410m_750b_scratch", 0),
    "1.1B": ("paper/1.1b_100b_scratch", 0),
    "3B": ("paper/3b_300b_scratch", 0),
    "1.9B": ("paper/7b_300b_gstack", 0),  # the 7B's base
}
SMALL = Model(
    family="llama2",
    dim=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    ffn_dim=176,
    vocab_size=512,
)
MODES = {"eager": False, "compiled": True}


@dataclass
class Case:
    """One measurement. ``micro_batch`` is the most sequences in a forward pass, ``step_tokens`` those of an optimizer
    step, of which ``steps`` are measured; with ``pair``, plain torchtitan is measured beside it."""

    shape: str
    kernel: str
    mode: str
    precision: str
    activation_checkpoint: str
    loss_chunk: int
    step_tokens: int
    steps: int
    micro_batch: int
    pair: bool


def stage_of(case: Case, steps: int, folder: Path) -> tuple[Plan, TrainStage]:
    """The stage that trains the case's shape for ``steps`` steps, on random tokens that are put into ``folder``."""
    name, index = SHAPES.get(case.shape, SHAPES["410M"])
    file = RECIPES / f"{name}.toml"
    sets = [
        f"data.path={folder / 'store'}",
        "validation.sequences=0",
        "log.interval=10 steps",
    ]
    if case.shape == "small":
        sets.append("data.seq_len=64")
    plan = make_plan(load_recipe(file, sets), file)
    stage = plan.train_stages[index]
    train = dataclasses.replace(
        stage.train,
        compile=MODES[case.mode],
        precision=case.precision,
        attention=case.kernel,
        activation_checkpoint=case.activation_checkpoint,
        loss_chunk=case.loss_chunk,
        global_batch_tokens=case.step_tokens,
        micro_batch=case.micro_batch,
    )
    stage = dataclasses.replace(stage, steps=steps, train=train)
    if case.shape == "small":
        stage = dataclasses.replace(stage, model=SMALL)
    random_store(
        folder / "store", stage.model.vocab_size, max(2**20, 4 * stage.seq_len)
    )
    return plan, stage
