"""Which torch is supported, which is installed for tests, and that the three places that say so agree."""

import re
from pathlib import Path

import tomli
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomli.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))[
    "project"
]
MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")


def supported() -> SpecifierSet:
    requirements = [Requirement(line) for line in PROJECT["dependencies"]]
    (torch,) = [
        requirement for requirement in requirements if requirement.name == "torch"
    ]
    return torch.specifier


def test_torch_2_11_to_2_15_are_supported() -> None:
    allowed = [
        version
        for version in ("2.10.0", "2.11.0", "2.13.0", "2.14.1", "2.15.0", "2.16.0")
        if version in supported()
    ]
    assert allowed == ["2.11.0", "2.13.0", "2.14.1", "2.15.0"]


def test_tests_and_ci_stay_on_the_release_that_has_a_light_build() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (constraint,) = [
        Requirement(line) for line in lines if line and not line.startswith("#")
    ]
    assert "2.13.0" in constraint.specifier
    assert "2.14.0" not in constraint.specifier
    installs = re.findall(r"pip install (.*)", MAKEFILE)
    assert len(installs) == 4
    assert [line for line in installs if "-c constraints.txt" not in line] == [
        "torch==$(NEWEST_TORCH) -e '.[dev]'"
    ]


def test_the_newest_that_is_tested_is_the_newest_that_is_supported() -> None:
    newest = re.search(r"NEWEST_TORCH := (.*)", MAKEFILE)
    assert newest
    major, minor, _ = newest[1].split(".")
    assert newest[1] in supported()
    assert f"{major}.{int(minor) + 1}.0" not in supported()


def test_litdata_is_in_no_environment_that_has_transformers() -> None:
    extras = PROJECT["optional-dependencies"]
    with_transformers = [
        name
        for name, lines in extras.items()
        if any("transformers" in line for line in lines)
    ]
    with_litdata = [
        name
        for name, lines in extras.items()
        if any("litdata" in line for line in lines)
    ]
    assert with_litdata == ["bench"]
    assert "bench" not in with_transformers
    assert re.search(r"\.venv-bench/bin/python -m pip install .*\[bench\]", MAKEFILE)
