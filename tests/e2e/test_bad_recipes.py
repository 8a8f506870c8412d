"""Every bad recipe on the command line: one readable message, exit code 2, nothing created."""

import subprocess
import sys
from pathlib import Path

import pytest
from launch import RUN_RECIPE, environment, run_tool
from recipes_for_tests import RECIPE, edited
from test_load import BROKEN, NASTY
from test_stages import CONTRADICTIONS

CASES = {
    **{
        f"{where} {new[:24]!r}": (edited((old, new)), ())
        for old, new, where, _ in NASTY
    },
    **{name: (content, ()) for name, content, _ in BROKEN},
    **{" ".join(sets)[:60]: (RECIPE, sets) for sets, _, _ in CONTRADICTIONS},
    "no such store": (RECIPE, ()),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_on_the_command_line(tmp_path: Path, case: str) -> None:
    content, sets = CASES[case]
    (tmp_path / "bad.toml").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    arguments = ["bad.toml"]
    for assignment in sets:
        arguments += ["--set", assignment]
    code, output = run_tool("run_recipe", *arguments, cwd=tmp_path)
    assert code == 2, output
    assert output.startswith("bad.toml: ")
    assert "Traceback" not in output
    assert [p.name for p in tmp_path.iterdir()] == ["bad.toml"]


def test_a_directory_and_no_file_at_all(tmp_path: Path) -> None:
    for name in (".", "absent.toml"):
        done = run_cold(tmp_path, name)
        assert done.returncode == 2
        assert done.stderr.startswith(f"{name}: ")
    assert not list(tmp_path.iterdir())


def run_cold(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, RUN_RECIPE, *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
