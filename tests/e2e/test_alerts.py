"""run.on_event: a command of the user's own is told of what happens; a recipe cannot name one."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import tomli
from launch import FAULTY, Workplace, environment
from warm import Warm

from stackgrow.process import alerts
from stackgrow.recipe.load import RecipeError, load_recipe
from stackgrow.recipe.write import to_toml
from stackgrow.run_folder.folder import RunFolder


def command(told: Path) -> str:
    """Appends a line for every event to ``told``."""
    return f'echo "$STACKGROW_EVENT|$STACKGROW_MESSAGE|$STACKGROW_RUN" >> {told}'


def events(told: Path) -> list[list[str]]:
    return [line.split("|") for line in told.read_text(encoding="utf-8").splitlines()]


def test_a_run_tells_of_a_spike_a_growth_and_its_end(
    workplace: Workplace, tmp_path: Path
) -> None:
    told, run = tmp_path / "told", tmp_path / "run"
    sets = [
        f"run.folder={run}",
        "train.on_nonfinite=skip",
        f"run.on_event={command(told)}",
    ]
    process = Warm(
        FAULTY,
        workplace.arguments(*sets),
        workplace.folder,
        {**environment(), "FAULT": "nan train.backward 6"},
    )
    assert process.wait(300) == 0, process.output()
    assert [event for event, _, _ in events(told)] == ["spike", "growth", "done"]
    spike, growth, done = (message for _, message, _ in events(told))
    assert (
        spike == "stage-0-train-2L: loss or gradient is not finite at step 6 (loss nan)"
    )
    assert growth.startswith("stage-1-grow  ")
    assert done.startswith("tiny: done, 41K tokens")
    assert {folder for _, _, folder in events(told)} == {str(run)}
    written = tomli.loads(RunFolder(run).recipe_file.read_text(encoding="utf-8"))
    assert "on_event" not in written["run"], (
        "which can be given to a colleague, and be run"
    )


def test_a_run_tells_why_it_stopped(workplace: Workplace, tmp_path: Path) -> None:
    told = tmp_path / "told"
    sets = [f"run.folder={tmp_path}/run", f"run.on_event={command(told)}"]
    process = Warm(
        FAULTY,
        workplace.arguments(*sets),
        workplace.folder,
        {**environment(), "FAULT": "nan train.backward 3"},
    )
    assert process.wait(300) != 0
    spike, stop = events(told)
    assert spike[0] == "spike"
    assert stop[0] == "stop"
    assert "to go on without its update, --set train.on_nonfinite=skip" in stop[1]


def test_a_stall_is_told_once(tmp_path: Path) -> None:
    told = tmp_path / "told"
    alerts.start(command(told), tmp_path, tmp_path / "log", stall_seconds=0.4)
    try:
        alerts.at("stage-0, step 7")
        deadline = time.monotonic() + 30
        while not told.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1)
    finally:
        alerts.end()
    assert len(events(told)) == 1
    assert events(told)[0][:2] == ["stall", "stage-0, step 7: nothing new for 0 s"]


def test_a_recipe_cannot_name_a_command(workplace: Workplace, tmp_path: Path) -> None:
    recipe = tmp_path / "stranger.toml"
    tiny = (workplace.folder / "tiny.toml").read_text(encoding="utf-8")
    recipe.write_text(
        f'{tiny}\n[run]\non_event = "touch {tmp_path}/done"\n', encoding="utf-8"
    )
    with pytest.raises(
        RecipeError,
        match=r"run\.on_event: a recipe may not name a command; .* --set run\.on_event=",
    ):
        load_recipe(recipe)
    own = load_recipe(workplace.folder / "tiny.toml", ["run.on_event=./notify.sh"])
    assert own.run.on_event == "./notify.sh"
    assert "notify" not in to_toml(own)


def test_a_command_that_fails_harms_nothing(tmp_path: Path) -> None:
    alerts.start("exit 3", tmp_path, tmp_path / "log", stall_seconds=60)
    alerts.tell("growth", "2 -> 4 layers")
    alerts.end()
    alerts.start(
        "no-such-command-anywhere", tmp_path, tmp_path / "log", stall_seconds=60
    )
    alerts.tell("growth", os.devnull)
    alerts.end()
    assert "no-such-command-anywhere" in (tmp_path / "log").read_text(encoding="utf-8")
