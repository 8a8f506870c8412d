"""What a replay says that it has compared, and what not: never both of one thing."""

import pytest

from stackgrow.audit.replay import Request, in_words
from stackgrow.audit.report import Audit
from stackgrow.plan.resolve import make_plan
from stackgrow.plan.stages import Plan
from stackgrow.recipe.load import load_recipe
from stackgrow.recipe.shipped import find_recipe

EQUAL = [0.0, 0.0]
HARDWARE = ["hardware"]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(load_recipe(find_recipe("quickstart")))


def told(plan: Plan, request: Request, *compared: list) -> tuple[str, list[str]]:
    audit = Audit("run")
    audit.look("replay", in_words(plan, request, *compared))
    return audit.checks["replay"], audit.not_checked


def test_what_is_equal_bit_for_bit_is_not_called_unchecked(plan: Plan) -> None:
    request = Request(plan.train_stages[0], 0, 4)
    for others in ([], HARDWARE):
        words, not_checked = told(plan, request, EQUAL, EQUAL, others)
        assert "equal bit for bit" in words
        assert not any("bit for bit" in what for what in not_checked)
        assert "the losses of the steps that were not trained again" in not_checked[0]
        assert ("the optimizer's state" in not_checked) == bool(others)


def test_a_tolerance_that_was_used_is_said(plan: Plan) -> None:
    request = Request(plan.train_stages[0], 0, 4)
    words, not_checked = told(plan, request, [1e-7], EQUAL, HARDWARE)
    assert "largest difference 1.0e-07; allowed are 1e-05" in words
    assert "equality bit for bit: hardware differ, and a tolerance was used" in (
        not_checked
    )


def test_weights_that_are_not_kept_are_said_not_to_be_compared(plan: Plan) -> None:
    request = Request(plan.train_stages[0], 0, 4)
    _, not_checked = told(plan, request, EQUAL, [], [])
    assert any("step-4 of" in what and "is not kept" in what for what in not_checked)


def test_a_run_that_was_trained_again_whole_leaves_no_losses_out() -> None:
    recipe = load_recipe(find_recipe("quickstart_scratch"))
    plan = make_plan(recipe)
    (stage,) = plan.train_stages
    _, not_checked = told(plan, Request(stage, 0, stage.steps), EQUAL, EQUAL, [])
    assert not_checked == []
