"""The package as it is installed from a wheel, used far from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from launch import environment

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build leaves its folder in the tree that it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
    )
    source = folder / "source"
    for name in filter(None, tracked.stdout.decode().split("\0")):
        if name.startswith("tests/") or not (REPOSITORY / name).is_file():
            continue
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((REPOSITORY / name).read_bytes())
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(folder),
        ".",
    ]
    done = subprocess.run(
        build, cwd=source, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel; what it depends on comes from the tests' own."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(folder)],
        check=True,
        timeout=120,
    )
    python = folder / "bin" / "python"
    where = [
        str(python),
        "-c",
        "import sysconfig; print(sysconfig.get_path('purelib'))",
    ]
    site = subprocess.run(where, capture_output=True, text=True, check=True)
    # A .pth file names a folder, whose own .pth files, the checkout's among them, are not read.
    (Path(site.stdout.strip()) / "dependencies.pth").write_text(
        sysconfig.get_path("purelib") + "\n", encoding="utf-8"
    )
    install = [
        sys.executable,
        "-m",
        "pip",
        f"--python={python}",
        "install",
        "--no-deps",
        "--no-index",
        str(wheel),
    ]
    # pip would take the checkout on PYTHONPATH for the package that is to be installed.
    done = subprocess.run(
        install, env=shell_of_a_user(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return folder


def shell_of_a_user() -> dict[str, str]:
    """Without the checkout's modules."""
    shell = environment()
    del shell["PYTHONPATH"]
    return shell


def stackgrow(
    installed: Path, folder: Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    command = [str(installed / "bin" / "stackgrow"), *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env=shell_of_a_user(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_wheel_has_what_the_checkout_has(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "stackgrow/recipe.schema.json" in names
    assert "stackgrow/report/page.html.jinja" in names
    modules = {
        str(path.relative_to(REPOSITORY))
        for path in (REPOSITORY / "stackgrow").rglob("*.py")
    }
    assert modules <= set(names)
    recipes = {
        path.relative_to(REPOSITORY / "recipes")
        for path in (REPOSITORY / "recipes").rglob("*.toml")
    }
    kept = {path for path in recipes if "results" not in path.parts}
    shipped = [name.partition("share/stackgrow/recipes/")[2] for name in names]
    assert {str(path) for path in kept} == {name for name in shipped if name}


def test_a_shipped_recipe_is_found_by_its_name(installed: Path, tmp_path: Path) -> None:
    for name in ("quickstart", "paper/7b_300b_gstack"):
        done = stackgrow(installed, tmp_path, "run", name, "--plan")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(Path(name).name)


def test_a_name_that_is_no_recipe_is_told(installed: Path, tmp_path: Path) -> None:
    done = stackgrow(installed, tmp_path, "run", "quickest", "--plan")
    assert done.returncode == 2
    assert "quickest: 1 problem" in done.stderr
    assert "cannot be read" in done.stderr


def test_a_run_and_its_audit_work_without_the_checkout(
    installed: Path, tmp_path: Path
) -> None:
    library = Path(os.__file__).parent / "json"
    arguments = [
        "--input",
        str(library),
        "--pattern",
        "*.py",
        "--train-tokenizer",
        "400",
        "--out",
        "store",
    ]
    prepared = stackgrow(installed, tmp_path, "prepare", *arguments)
    assert prepared.returncode == 0, prepared.stderr
    sets = [
        "data.path=store",
        "budget.tokens=8Ki",
        "growth[0].timing=4Ki",
        "model.vocab_size=400",
    ]
    sets += ["train.warmup=1 steps", "validation.sequences=0", "run.folder=run"]
    words = [word for assignment in sets for word in ("--set", assignment)]
    done = stackgrow(installed, tmp_path, "run", "quickstart", *words)
    assert done.returncode == 0, done.stderr
    audit = stackgrow(installed, tmp_path, "audit", "run")
    assert audit.returncode == 0, audit.stdout
