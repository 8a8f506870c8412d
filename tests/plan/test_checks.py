"""optimizer, lr and freeze of a [[growth]]: what they make of the stage after it, and when they are refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from recipes_for_tests import RECIPE, edited, plan_of, problems_of

from stackgrow.plan.stages import Continued
from stackgrow.recipe.load import load_recipe
from stackgrow.recipe.values import Duration, Rewarm
from stackgrow.recipe.write import to_toml

CONTINUE = [
    "train.horizon=120 steps",
    "growth[0].lr=continue",
    "growth[1].lr={rewarm_steps=10, ratio=0.25}",
]
NEW = ["growth[1].lr=continue", "growth[1].lr_new={rewarm_steps=6, ratio=1.3}"]
LEARN = edited(
    ('operator = "stack"\nfactor = 2\ntiming = "40 steps"',
     'operator = "learn"\nfactor = 2\ntiming = "40 steps"\nlearn_steps = "5 steps"'),
)  # fmt: skip


def test_the_stages_that_do_not_ask_are_as_they_were(tmp_path: Path) -> None:
    """Their hashes hold no new key."""
    plain = plan_of(tmp_path).stage_hashes("")
    assert plain["stage-4-train-8L"] == PLAIN_HASH
    changed = plan_of(tmp_path, RECIPE, ["growth[1].optimizer=copy"]).stage_hashes("")
    assert [changed[name] == plain[name] for name in plain] == [
        True,
        True,
        True,
        False,
        False,
    ]


PLAIN_HASH = "d697cb9230fb4417cd3efb1558e640864c8717415fc44a900707a9ec9393452b"


def test_a_schedule_goes_on(tmp_path: Path) -> None:
    first, second, third = plan_of(tmp_path, RECIPE, CONTINUE).train_stages
    assert (first.schedule, second.schedule) == (None, Continued(20))
    assert third.schedule == Continued(40, Rewarm(10, 0.25))
    whole = plan_of(
        tmp_path,
        RECIPE[: RECIPE.index("[base]")] + RECIPE[RECIPE.index("[train]") :],
        CONTINUE[:1],
    )
    rates = [whole.train_stages[0].learning_rate(step) for step in range(1, 98)]
    assert [first.learning_rate(step) for step in range(1, 21)] == rates[:20]
    assert [second.learning_rate(step) for step in range(1, 21)] == rates[20:40]
    ramp = [0.25 + 0.75 * min(1, i / 10) for i in range(57)]
    assert [third.learning_rate(step) for step in range(1, 58)] == pytest.approx(
        [rate * factor for rate, factor in zip(rates[40:], ramp, strict=True)],
        rel=1e-12,
    )
    assert third.learning_rate(1) == rates[40] / 4


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize(
    "lr", [None, Rewarm(1, 0.5), Rewarm(7, 0.01), Rewarm(100, 1.0)]
)
def test_torchtitan_has_the_planned_rates(
    tmp_path: Path, schedule: str, lr: Rewarm | None
) -> None:
    torch = pytest.importorskip("torch")
    import stackgrow.titan  # noqa: F401  (the device comes before torchtitan)
    from stackgrow.titan.config import schedule_config
    from stackgrow.titan.spec import build_schedulers

    how = (
        "continue"
        if lr is None
        else f"{{rewarm_steps={lr.rewarm_steps}, ratio={lr.ratio}}}"
    )
    sets = [
        "train.horizon=97 steps",
        f"train.schedule={schedule}",
        "train.min_learning_rate=1e-4",
        "growth[0].lr=continue",
    ]
    for stage in plan_of(tmp_path, RECIPE, [*sets, f"growth[1].lr={how}"]).train_stages:
        optimizer = torch.optim.AdamW(
            [torch.nn.Parameter(torch.zeros(1))], lr=stage.train.learning_rate
        )
        schedulers = build_schedulers([optimizer], schedule_config(stage), stage.steps)
        rates = []
        for _ in range(stage.steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedulers.step()
        planned = [stage.learning_rate(step) for step in range(1, stage.steps + 1)]
        assert rates == pytest.approx(planned, rel=1e-12, abs=0)


def test_a_schedule_goes_on_over_learned_maps(tmp_path: Path) -> None:
    """The maps have a schedule of their own."""
    sets = [
        "train.horizon=200 steps",
        "growth[1].lr=continue",
        "growth[1].learn.horizon=stage",
    ]
    base, before, learn, after = plan_of(tmp_path, LEARN, sets).train_stages
    assert (base.schedule, before.schedule, learn.schedule) == (None, None, None)
    assert after.schedule == Continued(before.steps)


def test_frozen_steps_follow_the_growths(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path, RECIPE, ["growth[0].freeze=8 steps", "growth[1].freeze=10Ki"]
    )
    base, middle, last = plan.train_stages
    assert (base.freeze, base.frozen_steps, middle.frozen_steps, last.frozen_steps) == (
        None,
        0,
        8,
        10,
    )
    assert (middle.frozen_layers, last.frozen_layers) == (2, 4)
    layer, head, batch = 4 * 64 * 64 + 3 * 64 * 96 + 2 * 64, 64 + 64 * 256, 1024
    forward, new, all_of = (
        2 * (4 * layer + head),
        4 * (2 * layer + head),
        4 * (4 * layer + head),
    )
    assert middle.flops == batch * (8 * (forward + new) + 12 * (forward + all_of))
    assert middle.flops_after(3) == batch * 3 * (forward + new)
    assert middle.attention_flops == batch * 64 * 64 * (
        8 * (4 * 4 + 8 * 2) + 12 * 12 * 4
    )
    assert last.start_flops == base.flops + middle.flops


def test_the_recipe_is_read_back(tmp_path: Path) -> None:
    sets = [*CONTINUE, "growth[0].optimizer=asymmetric", "growth[0].freeze=8 steps"]
    recipe = plan_of(tmp_path, RECIPE, sets).recipe
    (tmp_path / "resolved.toml").write_text(to_toml(recipe))
    assert load_recipe(tmp_path / "resolved.toml", trusted=True) == recipe
    assert recipe.growth[0].freeze == Duration(8, "steps")


@pytest.mark.parametrize(
    ("text", "sets", "where", "parts"),
    [
        (LEARN, ["growth[1].optimizer=copy"], "growth[1].optimizer", ('"copy" is not defined for "learn"', 'use "reset"')),
        (RECIPE, ["growth[0].optimizer=both"], "growth[0].optimizer", ("both", "asymmetric")),
        (RECIPE, ["growth[0].lr=continue"], "growth[0].lr", ("which ends with it", '"40 steps" or more')),
        (RECIPE, [*CONTINUE, "train.horizon=50 steps"], "train.horizon",
         ("50 steps are fewer than the 57 steps of stage-4-train-8L after the 40 before it",)),
        (RECIPE, [*CONTINUE, "growth[1].train.learning_rate=5e-4"], "growth[1].lr",
         ("stage-2-train-4L, but learning_rate 0.001 -> 0.0005", '"restart"')),
        (RECIPE, [*CONTINUE, "growth[1].train.global_batch_tokens=2048"], "growth[1].lr",
         ("global_batch_tokens 1024 -> 2048",)),
        (RECIPE, ["growth[0].lr=rewarm"], "growth[0].lr", ("rewarm_steps = 100",)),
        (RECIPE, ["growth[0].lr={rewarm_steps=5}"], "growth[0].lr", ("rewarm_steps = 100, ratio = 0.1",)),
        (RECIPE, ["growth[0].lr={rewarm_steps=0, ratio=0.1}"], "growth[0].lr", ("at least 1",)),
        (RECIPE, ["growth[0].lr={rewarm_steps=5, ratio=1.5}"], "growth[0].lr", ("ratio a number above 0 and at most 1",)),
        (RECIPE, ["growth[0].lr={rewarm_steps=5, ratio=0.5, more=1}"], "growth[0].lr", ("must be one of",)),
        (RECIPE, ["growth[0].freeze=21 steps"], "growth[0].freeze", ("21 steps are more than the 20 steps of stage-2",)),
        (RECIPE, ["growth[0].freeze=8 steps", "growth[0].order=interleave"], "growth[0].freeze",
         ("begins with [0, 1]", "it is [0, 0, 1, 1]")),
        (RECIPE, ["base.from=x", "growth[0].timing=start", "growth[0].optimizer=copy"], "growth[0].optimizer",
         ("base.from brings weights alone", '"reset"')),
        (RECIPE, ["base.from=x", "growth[0].timing=start", "growth[0].lr=continue"], "growth[0].lr", ('"restart"',)),
        (LEARN, ["growth[1].freeze=8 steps"], "growth[1].freeze", ("it is none", "remove freeze")),
        (RECIPE, ["growth[1].operator=zero", "growth[1].freeze=8 steps", "base.model.dim=32", "base.model.n_heads=2",
                  "growth[0].model={dim=32, n_heads=2}"], "growth[1].freeze", ("where widths grow", "remove it")),
        (RECIPE, NEW[1:], "growth[1].lr_new", ('give lr = "continue"',)),
        (RECIPE, [*CONTINUE, NEW[1]], "growth[1].lr_new", ('give lr = "continue"',)),
        (RECIPE, [*CONTINUE[:2], *NEW, "train.schedule=linear"], "growth[1].lr_new",
         ('train.schedule is "linear"', 'use "cosine"')),
        (RECIPE, [*CONTINUE[:2], NEW[0], "growth[1].lr_new={rewarm_steps=80, ratio=1.3}"], "growth[1].lr_new",
         ("rises for 80 of the 80 steps", "lower rewarm_steps")),
        (RECIPE, ["growth[1].lr_new=1.3"], "growth[1].lr_new", ("rewarm_steps = 250, ratio = 1.3",)),
        (LEARN, NEW[1:], "growth[1].lr_new", ("so that none is new",)),
    ],
)  # fmt: skip
def test_what_a_growth_cannot_carry_over_is_refused(
    tmp_path: Path, text: str, sets: list[str], where: str, parts: tuple[str, ...]
) -> None:
    problems = problems_of(tmp_path, text, sets)
    assert where in problems, problems
    assert all(part in problems[where] for part in parts), problems[where]


def test_new_parameters_have_a_rate_of_their_own(tmp_path: Path) -> None:
    """SPARKLING, eq. 28, written out: from the schedule's rate at the growth up to 1.3 times that, then a cosine to the
    end of the schedule that all others follow."""
    *_, last = plan_of(tmp_path, RECIPE, [*CONTINUE[:2], *NEW]).train_stages
    assert last.schedule == Continued(40)
    assert last.new_rate is not None
    assert last.new_rate.growth.target == last.model
    at_growth, floor = last.learning_rate(1), last.train.min_learning_rate
    left = 120 - 40
    for step in range(1, last.steps + 1):
        t = step - 1
        if t < 6:
            want = at_growth * (1 + 0.3 * t / 6)
        else:
            cosine = 0.5 * (1 + math.cos(math.pi * (t - 6) / (left - 6)))
            want = floor + (1.3 * at_growth - floor) * cosine
        assert last.new_learning_rate(step) == pytest.approx(want, rel=1e-12)
    assert last.new_learning_rate(1) == at_growth
    assert last.new_learning_rate(7) == pytest.approx(1.3 * at_growth)


def test_a_rate_of_new_parameters_is_part_of_the_stage_and_of_no_other(
    tmp_path: Path,
) -> None:
    sets = [*CONTINUE[:2], NEW[0]]
    plain = plan_of(tmp_path, RECIPE, sets).stage_hashes("")
    hashes = plan_of(tmp_path, RECIPE, [*sets, NEW[1]]).stage_hashes("")
    changed = [name for name in plain if plain[name] != hashes[name]]
    assert changed == ["stage-4-train-8L"]
