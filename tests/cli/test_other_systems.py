"""A machine that is not Linux, such as a Mac: what is Linux's alone is not there. Recipes are planned and data prepared
all the same; what trains says at once that it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from recipes_for_tests import edited

REPOSITORY = Path(__file__).parents[2]
# Read by Python itself when it starts: takes away what a Mac's Python lacks.
SITE = """
import os, sys
for name in ("sched_getaffinity", "posix_fadvise", "posix_fallocate", "O_DIRECT", "copy_file_range", "memfd_create"):
    if hasattr(os, name):
        delattr(os, name)

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(name)

import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find_spec(name, package)
sys.meta_path.insert(0, NoTriton())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mac")
    (root / "site").mkdir()
    (root / "site" / "sitecustomize.py").write_text(SITE, encoding="utf-8")
    (root / "corpus").mkdir()
    for i in range(40):
        (root / "corpus" / f"{i}.txt").write_text(
            f"text {i} " + "of many words " * 50, encoding="utf-8"
        )
    recipe = edited(
        ("vocab_size = 256", "vocab_size = 300"), ('tokens = "100K"', 'tokens = "50K"')
    )
    (root / "mine.toml").write_text(recipe, encoding="utf-8")
    return root


def command(
    folder: Path, tool: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{folder / 'site'}:{REPOSITORY}"}
    line = [sys.executable, str(REPOSITORY / "tools" / tool), *arguments]
    return subprocess.run(
        line, cwd=folder, env=environment, capture_output=True, text=True
    )


def test_data_are_prepared_and_looked_at(folder: Path) -> None:
    arguments = (
        "--input",
        "corpus",
        "--train-tokenizer",
        "300",
        "--validation",
        "0.2",
        "--out",
        "data/tiny",
    )
    done = command(folder, "prepare_data.py", *arguments)
    assert done.returncode == 0, done.stderr
    done = command(folder, "data.py", "inspect", "mine.toml", "--position", "3")
    assert done.returncode == 0, done.stderr
    assert "position 3: window" in done.stdout


def test_a_recipe_is_planned(folder: Path) -> None:
    done = command(folder, "run_recipe.py", "mine.toml", "--plan")
    assert done.returncode == 0, done.stderr


def test_training_says_that_it_needs_linux(folder: Path) -> None:
    test_data_are_prepared_and_looked_at(folder)
    done = command(folder, "run_recipe.py", "mine.toml")
    assert done.returncode == 69
    assert done.stderr.startswith("training needs the package triton")
    assert len(done.stderr.splitlines()) == 1
    assert not (folder / "runs").exists()
