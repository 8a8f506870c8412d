"""Files that a tool is to write where nothing can be written: told in a line, before any work."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pytest

from stackgrow.errors import DiskError

RESULTS = Path(__file__).parents[2] / "recipes" / "experiments" / "results"
RUN = str(RESULTS / "ratio_8x64_scratch-1")
GROWN = str(RESULTS / "ratio_8x64_stack-1")
CLUSTER = ("--gpus", "8", "--gpu", "h100")
COMMANDS = {
    "audit --html": ("audit", (RUN, "--html")),
    "compare --html": ("compare", (RUN, GROWN, "--html")),
    "compare --figure": ("compare", (RUN, GROWN, "--figure")),
    "report --out": ("report", (RUN, "--out")),
    "plan --plot": ("plan", ("quickstart", *CLUSTER, "--plot")),
    "twin --out": ("twin", ("quickstart", "--out")),
    "fit --out": ("fit", (RUN, GROWN, "--out")),
    "fit --plot": ("fit", (RUN, GROWN, "--plot")),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
@pytest.mark.parametrize("place", ["missing/x.svg", "file/x.svg", "folder.svg"])
def test_a_target_that_cannot_be_written_is_told_before_the_work(
    command: tuple[str, Sequence[str]],
    place: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    verb, words = command
    (tmp_path / "file").touch()
    (tmp_path / "folder.svg").mkdir()
    target = tmp_path / place
    main = import_module(f"stackgrow.cli.{verb}").main
    assert main([*words, str(target)]) == DiskError.exit_code
    told = capsys.readouterr()
    assert told.out == "", "nothing was worked out"
    (line,) = told.err.splitlines()
    assert f"{target} cannot be written: " in line
