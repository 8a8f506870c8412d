"""Batches that grow: tokens of every step, and steps of every number of tokens."""

from hypothesis import given
from hypothesis import strategies as st
from recipes_for_tests import RECIPE, plan_of

from stackgrow.plan.batches import Batches, BatchPhase
from stackgrow.recipe.values import nearest

WARM = Batches((BatchPhase(3, 10), BatchPhase(2, 20)), 40)


def test_tokens_and_steps_are_those_counted_by_hand() -> None:
    assert [WARM.at(step) for step in range(1, 8)] == [10, 10, 10, 20, 20, 40, 40]
    assert [WARM.tokens(steps) for steps in (0, 2, 4, 6)] == [0, 20, 50, 110]
    assert [WARM.within(tokens) for tokens in (-1, 9, 10, 69, 70, 109, 110)] == [
        -1,
        0,
        1,
        4,
        5,
        5,
        6,
    ]
    assert [WARM.nearest(tokens) for tokens in (4, 5, 40, 89, 90)] == [0, 1, 4, 5, 6]


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 50)), max_size=4),
    st.integers(1, 90),
    st.integers(0, 9999),
)
def test_steps_within_and_nearest_to_tokens(
    phases: list[tuple[int, int]], full: int, tokens: int
) -> None:
    batches = Batches(tuple(BatchPhase(*phase) for phase in phases), full)
    steps, near = batches.within(tokens), batches.nearest(tokens)
    assert batches.tokens(steps) <= tokens < batches.tokens(steps + 1)
    assert near in (steps, steps + 1)
    assert abs(batches.tokens(near) - tokens) == min(
        abs(batches.tokens(n) - tokens) for n in (steps, steps + 1)
    )
    assert batches.tokens(steps) == sum(
        batches.at(step) for step in range(1, steps + 1)
    )
    if not phases:
        assert near == nearest(tokens, full)


def test_positions_tokens_and_steps_of_a_plan(tmp_path) -> None:  # type: ignore[no-untyped-def]
    plan = plan_of(
        tmp_path, RECIPE, ["base.train.batch_warmup=['256 for 2 steps','512 for 2Ki']"]
    )
    base, middle, _ = plan.train_stages
    assert [base.batches.at(step) for step in range(1, 8)] == [
        256,
        256,
        512,
        512,
        512,
        512,
        1024,
    ]
    assert (base.steps, base.tokens) == (
        23,
        2 * 256 + 4 * 512 + 17 * 1024,
    )  # nearest to 20K
    assert [base.position(step) for step in (0, 1, 2, 3, 7)] == [0, 4, 8, 16, 56]
    assert base.place(3)["tokens"] == 1024
    assert (middle.start_tokens, middle.start_sequences) == (
        base.tokens,
        base.tokens // 64,
    )
    assert middle.steps == 40 - 23, "its growth is due at step 40"
    assert 0 <= plan.recipe.budget.tokens - plan.tokens < 1024
    assert base.warmup_steps == 4
    assert base.micro_batch(1) == base.micro_batch(2) * 2 == 4, (
        "divides a rank's share of every step"
    )
