"""The commands of README.md: they stand there as a user types them after ``make quickstart``."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
ACTIVATE = "source .venv/bin/activate"


def command_lines() -> list[str]:
    """The indented lines, and what stands between single backticks: commands among them, and what they print."""
    blocks = re.findall(r"(?:^    .*\n)+", README, re.MULTILINE)
    for number, block in enumerate(blocks):
        if ACTIVATE in block:
            blocks[number] = block.split(ACTIVATE)[0]
    indented = [line.strip() for block in blocks for line in block.splitlines()]
    inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", README)
    return indented + inline


def test_a_command_names_the_environment_that_make_quickstart_made() -> None:
    # Debian 12 has no `python`, and its `pip` installs nothing outside a virtual environment.
    bare = re.compile(r"(python3?|torchrun|pip|tensorboard) ['.\w-]*[-./]")
    lines = command_lines()
    assert [line for line in lines if bare.match(line)] == []
    assert len([line for line in lines if line.startswith(".venv/bin/")]) > 20


def test_what_a_command_names_is_there() -> None:
    files = re.findall(r"tools/[\w/]+\.(?:py|sh|sbatch)|recipes/[\w/]+\.toml", README)
    missing = [name for name in files if not (REPOSITORY / name).exists()]
    assert set(missing) == {"recipes/mine.toml"}  # the user's copy
    assert len(files) > 20


def test_the_targets_of_make_are_there() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"`?make ([a-z-]+)(?:`|  )", README))
    assert {"quickstart", "test", "gpu"} <= targets
    assert targets <= set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
