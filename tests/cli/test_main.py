"""The ``stackgrow`` command and the scripts of tools/: two ways to the same pages."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from stackgrow.cli.main import VERBS, main

REPOSITORY = Path(__file__).parents[2]
TOOLS = sorted(path for path in (REPOSITORY / "tools").glob("*.py"))


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_every_verb_explains_itself(
    verb: object, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb.name, "--help"])  # type: ignore[attr-defined]
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: stackgrow {verb.name}")  # type: ignore[attr-defined]


def test_an_unknown_verb_names_the_known_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["grown"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    for verb in VERBS:
        assert verb.name in told


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.stem)
def test_a_tool_is_a_caller_of_its_page(tool: Path) -> None:
    pages = re.findall(
        r"from stackgrow\.cli\.(\w+) import main", tool.read_text(encoding="utf-8")
    )
    assert len(pages) == 1
    assert pages[0] in {verb.page for verb in VERBS}


def test_every_verb_has_a_tool() -> None:
    text = "".join(tool.read_text(encoding="utf-8") for tool in TOOLS)
    assert {verb.page for verb in VERBS} == set(
        re.findall(r"from stackgrow\.cli\.(\w+) import main", text)
    )


def test_the_command_runs_as_a_module() -> None:
    command = [
        sys.executable,
        "-m",
        "stackgrow.cli.main",
        "run",
        "recipes/quickstart.toml",
        "--plan",
    ]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("quickstart")


@pytest.mark.parametrize(
    "tool",
    [["run_recipe.py", "recipes/7b_gstack.toml", "--plan"], ["audit_run.py", "--help"]],
)
def test_a_reader_that_leaves_early_is_no_error(tool: list[str]) -> None:
    """As in ``run_recipe ... --plan | head``: BrokenPipeError and a traceback."""
    program = subprocess.Popen(
        [sys.executable, REPOSITORY / "tools" / tool[0], *tool[1:]],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert program.stdout is not None
    assert program.stderr is not None
    program.stdout.close()
    assert program.stderr.read() == ""
    program.wait(timeout=60)


def test_every_page_may_be_left_early() -> None:
    for verb in VERBS:
        page = import_module(f"stackgrow.cli.{verb.page}")
        assert hasattr(page.main, "__wrapped__"), (
            f"{verb.page}.main is without quiet_at_closed_pipe"
        )


def test_make_quickstart_ends_by_naming_what_comes_next() -> None:
    """The page, which its installation brings what it needs for, the twin from scratch, and the comparison."""
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    quickstart = makefile[makefile.index("quickstart: ") : makefile.index("test: ")]
    for part in (
        "runs/quickstart/report.html",
        "recipes/quickstart_scratch.toml",
        "compare_runs.py runs/quickstart_scratch",
    ):
        assert part in quickstart
    assert "-e '.[report]'" in makefile
