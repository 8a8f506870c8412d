"""The plan as people and programs read it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recipes_for_tests import RECIPE, plan_of

from stackgrow.data.order import Order
from stackgrow.data.store import Manifest, Shard, Split
from stackgrow.recipe.write import recipe_hash
from stackgrow.report.plan_table import (
    compact_map,
    plan_dict,
    render_plan,
    render_plan_json,
)
from stackgrow.text import WIDTH

GIANT = [
    "budget.tokens=750B", "model.dim=4096", "model.n_layers=32", "model.n_heads=32", "model.ffn_dim=11008",
    "model.vocab_size=32000", "data.seq_len=2048", "train.global_batch_tokens=2Mi", "train.warmup=3000 steps",
    "growth[0].timing=10B", "growth[0].factor=4", "growth[1].timing=30B", "growth[1].factor=4",
]  # fmt: skip


def test_a_plan_as_text_has_budget_data_and_stages(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    text = render_plan(plan)
    lines = text.splitlines()
    assert lines[0] == f"tiny   recipe {recipe_hash(plan.recipe)[:12]}, seed 7"
    assert lines[1] == (
        "budget   100,000 tokens asked for, 99,328 planned; the other 672 are less than one step of 1,024"
    )
    assert lines[2] == "data     data/tiny, 1,552 sequences of 64 tokens"
    rows = [line.split() for line in lines]
    assert [
        "stage-0-train-2L",
        "2",
        "64",
        "103K",
        "70K",
        "20.5K",
        "20",
        "16",
        "0",
    ] in rows
    assert [
        "stage-0-train-2L",
        "1.06e+10",
        "7.9%",
        "2.01e+09",
        "0.00025",
        "0.001",
        "9.61e-06",
        "1.23MB",
    ] in rows
    assert "stage-1-grow   stack, 2 -> 4 layers: 0 1 | 0 1" in lines
    assert "  layer map [0, 1, 0, 1, 0, 1, 2, 3]" not in lines
    assert "  layer map [0, 1, 2, 3, 0, 1, 2, 3]" in lines
    assert (
        f"- {plan.base_share:.1%} of the FLOPs are spent before the last growth"
        in lines
    )


def order(path: str, tokens: int, vocab_size: int = 256) -> Order:
    split = Split(tokens, 1, (Shard("x.npy", tokens, 1, "0" * 64, 2 * tokens),))
    return Order(
        [
            Manifest(
                Path(path), "uint16", vocab_size, 1, "m", "t" * 64, {"train": split}, {}
            )
        ],
        [1],
        64,
        7,
    )


def test_the_plan_says_what_is_in_the_store(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    told = {
        size: render_plan(plan, order("data/tiny", 6401, size))
        for size in (256, 250, 100, 300)
    }
    start = "           6.4K tokens in 1 documents to train on; vocabulary "
    assert f"{start}256; tokenizer tttttttttttt\n" in told[256]
    assert f"{start}250, padded to 256; tokenizer" in told[250]
    for other in (100, 300):
        assert (
            f"{start}{other}, which model.vocab_size = 256 does not fit; tokenizer"
            in told[other]
        )


def test_epochs_are_stated_where_the_store_is_there(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    text = render_plan(plan, order("data/tiny", 1000 * 64 + 1))
    assert (
        "  data/tiny: 99.3K tokens, 1.552 epochs, beyond one epoch: its data are seen up to 2 times"
        in text
    )
    assert "  data/tiny: 99.3K tokens, 0.776 epochs\n" in render_plan(
        plan, order("data/tiny", 2000 * 64 + 1)
    )
    seen = plan_dict(plan, order("data/tiny", 1000 * 64 + 1))["data"]["seen"][
        "data/tiny"
    ]
    assert seen == {
        "tokens": 1552 * 64,
        "epoch": 1,
        "epoch_tokens": 552 * 64,
        "epochs": 1.552,
    }


def test_shares_add_up(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    values = plan_dict(plan)
    trained = [stage for stage in values["stages"] if stage["kind"] == "train"]
    assert sum(stage["flops"] for stage in trained) == values["flops"]
    assert sum(stage["tokens"] for stage in trained) == values["tokens"] == 97 * 1024
    assert 1 - trained[-1]["flops"] / values["flops"] == values["base_share"]


def test_a_budget_of_whole_steps_has_no_remainder(tmp_path: Path) -> None:
    text = render_plan(plan_of(tmp_path, RECIPE, ["budget.tokens=100Ki"]))
    assert "102,400 tokens asked for, 102,400 planned\n" in text


def test_it_fits_the_width(tmp_path: Path) -> None:
    text = render_plan(plan_of(tmp_path, RECIPE, GIANT))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "0-7 | 0-7 | 0-7 | 0-7" in text
    assert "6.74B" in text
    assert "80.9GB" in text


def test_notes_of_a_plan_are_shown_below_its_table(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path, RECIPE, [*GIANT, "growth[1].timing=auto", "growth[0].timing=8B"]
    )
    assert plan.notes
    assert plan.notes[0] in " ".join(render_plan(plan).split())


def test_scratch_has_no_growth(tmp_path: Path) -> None:
    scratch = RECIPE[: RECIPE.index("[base]")] + RECIPE[RECIPE.index("[train]") :]
    text = render_plan(plan_of(tmp_path, scratch))
    assert "layer map" not in text
    assert "before the last growth" not in text


def test_a_plan_as_json_has_the_same_values(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    values = json.loads(render_plan_json(plan))
    assert values == plan_dict(plan)
    assert [stage["name"] for stage in values["stages"]] == [
        stage.name for stage in plan.stages
    ]
    assert values["stages"][3]["layer_map"] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert values["stages"][0]["learning_rate"]["peak"] == 1e-3


@pytest.mark.parametrize(
    ("layer_map", "text"),
    [
        ([0, 1, 0, 1], "0 1 | 0 1"),
        ([0, 0, 1, 1], "0 0 | 1 1"),
        ([0, 0, 0], "0 0 0"),
        ([0], "0"),
        ([*range(24), *range(8, 32)], "0-23 | 8-31"),
        ([0, 1, 2, 3, 4, 5, 3, 4, 5, 5], "0-5 | 3 4 5 | 5"),
        ([2, 1, 0], "2 | 1 | 0"),
        ([0, 1, 2, 3], "0-3"),
    ],
)
def test_a_layer_map_is_told_compactly(layer_map: list[int], text: str) -> None:
    assert compact_map(layer_map) == text
