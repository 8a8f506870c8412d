"""What is done at a step that is not finite, or whose loss jumps: as the recipe says, and the same after a resume."""

import dataclasses
import math

import pytest
import torch

from stackgrow.errors import DivergedError
from stackgrow.recipe.keys import Train
from stackgrow.titan.guard import LEAST, MAX_SKIPS, WINDOW, StepGuard, Verdict

FINITE = torch.tensor(1.0)


def guard(**keys: object) -> StepGuard:
    train = Train(global_batch_tokens=1024, learning_rate=1e-3, **keys)  # type: ignore[arg-type]
    return StepGuard("stage-0-train-2L", train, copies=1)


def losses(n: int) -> list[float]:
    """Noise of standard deviation 0.1 around 3."""
    generator = torch.Generator().manual_seed(0)
    return (3 + 0.1 * torch.randn(n, generator=generator)).tolist()


def run(one: StepGuard, values: list[float], first: int = 1) -> list[Verdict]:
    return [
        one.check(first + i, torch.tensor(value), FINITE)
        for i, value in enumerate(values)
    ]


def test_noise_is_no_event() -> None:
    verdicts = run(guard(), losses(300))
    assert all(
        v.update and not v.event and not v.error and not v.asked_to_stop
        for v in verdicts
    )


@pytest.mark.parametrize(
    ("action", "updated", "ends"),
    [("record", True, False), ("skip", False, False), ("stop", False, True)],
)
def test_a_spike_is_named_and_its_update_taken_or_not_as_asked(
    action: str, updated: bool, ends: bool, caplog: pytest.LogCaptureFixture
) -> None:
    one = guard(on_spike=action)
    run(one, losses(100))
    (verdict,) = run(one, [4.5], first=101)
    assert (verdict.event["event"], verdict.event["action"], verdict.update) == (
        "spike",
        action,
        updated,
    )
    assert 10 < verdict.event["sigmas"] < 20
    assert isinstance(verdict.error, DivergedError) is ends
    told = str(verdict.error) if ends else caplog.text
    assert "stage-0-train-2L: the loss jumped at step 101 (loss 4.5, " in told
    assert not run(one, [3.0], first=102)[0].event


def test_a_falling_loss_and_a_short_history_are_no_spike() -> None:
    one = guard(on_spike="stop")
    assert not any(v.event for v in run(one, [8 - 0.05 * i for i in range(LEAST - 1)]))
    assert not run(guard(on_spike="stop"), [*losses(LEAST - 1), 9.0])[-1].event
    assert run(guard(on_spike="stop"), [*losses(LEAST), 9.0])[-1].event


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite(loss: float) -> None:
    stop, skip = (
        run(guard(on_nonfinite=action), [3.0, loss, 3.0]) for action in ("stop", "skip")
    )
    assert (stop[1].event, stop[1].update) == (
        {"event": "nonfinite", "action": "stop"},
        False,
    )
    assert "--set train.on_nonfinite=skip" in str(stop[1].error)
    assert (skip[1].event, skip[1].update, skip[1].error) == (
        {"event": "nonfinite", "action": "skip"},
        False,
        None,
    )
    assert skip[2].update


def test_a_gradient_that_is_not_finite() -> None:
    verdict = guard(on_nonfinite="skip").check(
        1, torch.tensor(3.0), torch.tensor(math.inf)
    )
    assert (verdict.event["event"], verdict.update) == ("nonfinite", False)


def test_skips_in_a_row_end_the_run() -> None:
    verdicts = run(guard(on_nonfinite="skip"), [3.0] + [math.nan] * (MAX_SKIPS + 1))
    assert [bool(v.error) for v in verdicts] == [False] * (MAX_SKIPS + 1) + [True]
    assert f"after {MAX_SKIPS} skipped steps in a row" in str(verdicts[-1].error)
    assert verdicts[-1].event["action"] == "stop"


def test_a_resumed_guard_decides_as_an_undisturbed_one() -> None:
    values = [*losses(WINDOW + 20), 4.5, math.nan, *losses(10), 3.62]
    whole = run(guard(on_spike="skip", on_nonfinite="skip"), values)
    for stop in (5, WINDOW + 21, WINDOW + 25):
        first, second = (guard(on_spike="skip", on_nonfinite="skip") for _ in range(2))
        start = run(first, values[:stop])
        second.recent = first.recent.clone()
        both = [*start, *run(second, values[stop:], first=stop + 1)]
        assert list(map(repr, map(dataclasses.asdict, both))) == list(
            map(repr, map(dataclasses.asdict, whole))
        )
    assert [i for i, v in enumerate(whole) if not v.update] == [
        WINDOW + 20,
        WINDOW + 21,
        len(values) - 1,
    ]
