"""The scripts beside recipes/experiments: the corpus in one command, and what growing saved."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

EXPERIMENTS = Path(__file__).parents[2] / "recipes" / "experiments"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seeds", [1, 5])
def test_a_known_saving_is_found(seeds: int) -> None:
    figure, draws = load("deep_figure"), np.random.default_rng(7)
    steps = np.arange(200, 1464, 50)

    def curve(factor: float, base: float) -> object:
        flops = base + steps * 9e9
        loss = (
            2
            + 3 * (factor * flops / 1e12) ** -0.2
            + 0.005 * draws.standard_normal(len(steps))
        )
        return figure.Curve(flops, steps * 4096.0, loss)

    scratch, grown = (
        [curve(1, 0) for _ in range(seeds)],
        [curve(1.3, 8e11) for _ in range(seeds)],
    )
    for saving in figure.savings(scratch, grown, [2e6, 3e6, 4e6]):
        assert saving.seeds == len(saving.each) == seeds
        assert saving.low < saving.mean < saving.high
        assert saving.mean == pytest.approx(0.3, abs=0.03)
        assert saving.high - saving.low < 0.12
    # A grown run that never has that loss is not left out, which would favour growing.
    never = [*grown[1:], curve(0.5, 8e11)]
    (beyond,) = figure.savings(scratch, never, [5.9e6])
    assert np.isnan(beyond.mean)
    assert beyond.each[-1] == figure.NEVER
    assert figure.NEVER not in beyond.each[:-1]


def test_the_table_of_what_growing_saved_is_what_the_records_give() -> None:
    figure = load("deep_figure")
    text = (EXPERIMENTS.parent / "RESULTS.md").read_text(encoding="utf-8")
    runs = figure.compared("deep_24x32", "stack", "validation")
    size = figure.parameters("deep_24x32")
    savings = runs.savings(figure.POINTS + 1)
    assert len(savings) >= 5
    for saving in savings:
        each = [figure.told_of_seed(value) for value in saving.each]
        of_all = "- | -"
        if figure.NEVER not in saving.each:
            of_all = f"{saving.mean:+.0%} | {saving.low:+.0%} to {saving.high:+.0%}"
        row = (
            f"| {saving.tokens / 1e6:.2f}M | {saving.tokens / size:.1f} | {saving.loss:.3f} "
            f"| {of_all} | {' '.join(each)} |"
        )
        assert row in text
    for scratch, grown in zip(runs.scratch, runs.grown, strict=True):
        ends = f"{scratch.loss[-1]:.3f} and {grown.loss[-1]:.3f}"
        assert ends in " ".join(text.split())


def test_the_table_of_other_operators_is_what_the_records_of_one_seed_give() -> None:
    figure = load("deep_figure")
    text = (EXPERIMENTS.parent / "RESULTS.md").read_text(encoding="utf-8")
    size = figure.parameters("deep_24x32")
    cells: dict[float, list[str]] = {}
    for way in ("stack", "interleave", "zero", "random", "learn"):
        runs = figure.compared("deep_24x32", way, "validation")
        for saving in runs.savings(figure.POINTS + 1):
            first = saving.each[runs.seeds.index("1")]
            cells.setdefault(saving.tokens, []).append(figure.told_of_seed(first))
    assert len(cells) >= 5
    for tokens, row in cells.items():
        assert f"| {tokens / size:.1f} | {' | '.join(row)} |" in text


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="Debian's packages need dpkg")
def test_the_corpus_is_the_chosen_files_wherever_it_lies(tmp_path: Path) -> None:
    source = tmp_path / "tree" / "linux-source-9.9"
    words = "the scheduler picks the next task and the page is written back "
    files = {
        "kernel/a.c": words * 40,
        "mm/b/c.h": words[::-1] * 40,
        "Documentation/d.rst": words.upper() * 40,
    }
    for name, text in {
        **files,
        "drivers/e.c": "not taken",
        "kernel/f.S": "not taken",
    }.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text, encoding="utf-8")
    package = tmp_path / "package"
    (package / "usr" / "src").mkdir(parents=True)
    (package / "DEBIAN").mkdir()
    (package / "DEBIAN" / "control").write_text(
        "Package: linux-source-9.9\nVersion: 1\nArchitecture: all\nMaintainer: n <n@n>\nDescription: d\n",
        encoding="utf-8",
    )
    archive = package / "usr" / "src" / "linux-source-9.9.tar.xz"
    subprocess.run(
        ["tar", "-cJf", archive, "-C", source.parent, source.name], check=True
    )
    subprocess.run(
        ["dpkg-deb", "-b", package, tmp_path / "linux.deb"],
        check=True,
        capture_output=True,
    )
    hashes = []
    for where in ("one", "two"):
        command = [
            sys.executable,
            EXPERIMENTS / "prepare_kernel.py",
            "--package",
            tmp_path / "linux.deb",
            "--vocab",
            "300",
        ]
        place = ["--work", tmp_path / where, "--out", tmp_path / where / "store"]
        told = subprocess.run(
            [*command, *place], check=True, capture_output=True, text=True
        ).stdout
        hashes += [
            line.split()[-1]
            for line in told.splitlines()
            if line.startswith("content hash")
        ]
        assert "hash is not known" in told
        listing = json.loads(
            (tmp_path / where / "store" / "sources-00.json").read_text(encoding="utf-8")
        )["files"]
        assert sorted(row[1] for row in listing) == sorted(files)
    assert len(hashes) == 2
    assert len(set(hashes)) == 1
