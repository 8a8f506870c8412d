"""The scripts beside recipes/experiments: the corpus in one command, and what growing saved."""

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from http_for_tests import served

from stackgrow.report.isoflop import read_run, valleys
from stackgrow.run_folder.folder import METRICS, VALIDATION, RunFolder
from stackgrow.run_folder.lines import read_records

EXPERIMENTS = Path(__file__).parents[2] / "recipes" / "experiments"
COMMAND = "    python recipes/experiments/deep_figure.py "


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


def test_a_way_that_begins_late_keeps_to_its_column() -> None:
    figure = load("deep_figure")
    steps = np.arange(100, 1464, 50)

    def curve(first_step: int, factor: float) -> object:
        later = steps[steps >= first_step]
        loss = 2 + 3 * (factor * later * 9e9 / 1e12) ** -0.2
        return figure.Curve(later * 9e9, later * 4096.0, loss)

    def runs(first_step: int) -> object:
        return figure.Compared(
            seeds=["1"], scratch=[curve(100, 1)], grown=[curve(first_step, 1.5)]
        )

    table = figure.ways_beside_one_another(
        {"stack_d500K": runs(200), "stack_d3M": runs(700)}, size=300_000
    )
    assert {len(row) for row in table} == {3}
    first, last = table[1], table[-1]
    assert first[1].endswith("%")
    assert first[2] == "not yet"
    assert last[2].endswith("%")


def told_in_results() -> dict[str, list[str]]:
    """What recipes/RESULTS.md says of deep_figure.py: each command, and the rows of the tables under it."""
    told: dict[str, list[str]] = {}
    command = None
    lines = (EXPERIMENTS.parent / "RESULTS.md").read_text(encoding="utf-8").splitlines()
    for line in lines:
        if line.startswith(COMMAND):
            command = line.removeprefix(COMMAND)
            told[command] = []
        elif line.startswith("#"):
            command = None
        elif command is not None and line.startswith("|"):
            told[command].append(line)
    return told


@pytest.mark.parametrize("command", told_in_results())
def test_a_table_of_what_growing_saved_is_what_its_command_prints(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command.split()
    if "--figure" in arguments:
        place = arguments.index("--figure")
        del arguments[place : place + 2]
    load("deep_figure").main(arguments)
    printed = capsys.readouterr().out.splitlines()
    rows = [line for line in printed if line.startswith("|")]
    assert len(rows) >= 5
    assert rows == told_in_results()[command]


def lowest(ways: Sequence[str], variable: str) -> list[tuple[float, float]]:
    """FLOPs, and the timing or factor with the lowest loss there, where it lies between those that were tried."""
    runs = []
    for way in ways:
        for seed in (1, 2, 3):
            run = EXPERIMENTS / "results" / f"deep_24x32_{way}-{seed}"
            runs.append(read_run(run, variable))
    found = valleys(runs, variable=variable)
    assert len(found) == 6
    return [(valley.flops, valley.best) for valley in found if valley.best]


def test_the_valleys_that_are_told_are_those_of_the_records() -> None:
    factors = []
    for _, best in lowest(["scratch", "stack_g2", "stack", "stack_g8"], "factor"):
        factors.append(f"{best:.1f}")
    timings = []
    for flops, best in lowest(["stack_d500K", "stack", "stack_d3M"], "timing"):
        timings.append(f"{best / 1e6:.1f}M at {flops:.1e}".replace("e+", "e"))

    text = (EXPERIMENTS.parent / "RESULTS.md").read_text(encoding="utf-8")
    words = " ".join(text.split())
    assert f"at factors of {', '.join(factors)} from" in words
    assert f"three of six FLOPs ({', '.join(timings)})" in words


def test_runs_that_went_on_have_the_losses_of_those_that_ended() -> None:
    """As of any run with a larger budget, bit for bit."""
    results = EXPERIMENTS / "results"
    longer = sorted(results.glob("deep_*-long"))
    assert len(longer) >= 2
    for run in longer:
        ended = RunFolder(results / run.name.removesuffix("-long"))
        for stage in ended.stages():
            for name in (METRICS, VALIDATION):
                losses = losses_of(stage.record_file(name))
                gone_on = losses_of(RunFolder(run).stage(stage.name).record_file(name))
                assert len(losses) >= 5
                assert losses.items() <= gone_on.items(), f"{run.name}, {stage.name}"


def losses_of(file: Path) -> dict[int, float]:
    """By step."""
    return {row["step"]: row["loss"] for row in read_records(file)}


def test_the_first_screen_says_what_the_records_give() -> None:
    figure = load("deep_figure")
    size = figure.parameters("deep_24x32")
    given = set()
    for ending in ("", "-long"):
        runs = figure.compared("deep_24x32", "stack", "validation", ending)
        for saving in runs.savings(figure.POINTS + 1):
            low, high = f"{100 * saving.low:+.0f}", f"{100 * saving.high:+.0f}"
            per_parameter = f"{saving.tokens / size:.1f}"
            given.add((f"{saving.mean:+.0%}", f"{low} to {high}", per_parameter))

    readme = EXPERIMENTS.parents[1] / "README.md"
    caption = " ".join(readme.read_text(encoding="utf-8").split())
    said = re.findall(
        r"([+-]\d+%) \((?:95%: )?([+-]\d+ to [+-]\d+)\) at ([\d.]*\d)", caption
    )
    assert len(said) >= 3
    assert set(said) <= given


@pytest.fixture
def prepare_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModuleType]:
    """It wants a package that no apt has, and knows a server that has it, as snapshot.debian.org has them all."""
    module = load("prepare_kernel")
    archive = tmp_path / "archive"
    archive.mkdir()
    (archive / "by_sha1").write_bytes(b"a package")
    monkeypatch.setattr(module, "NAME", "linux-source-0.0")
    monkeypatch.setattr(module, "FILE", "linux-source-0.0_1_all.deb")
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(b"a package").hexdigest())
    with served(archive) as address:
        monkeypatch.setattr(module, "SNAPSHOT", f"{address}/by_sha1")
        yield module


def test_the_measured_package_is_got_where_apt_no_longer_has_it(
    prepare_kernel: ModuleType, tmp_path: Path
) -> None:
    package = prepare_kernel.download(tmp_path)
    assert package == tmp_path / "linux-source-0.0_1_all.deb"
    assert package.read_bytes() == b"a package"


def test_another_package_is_never_taken_for_the_measured_one(
    prepare_kernel: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "linux-source-0.0_1_all.deb").write_bytes(b"a pack")
    with pytest.raises(SystemExit, match=r"is damaged.*remove it"):
        prepare_kernel.download(tmp_path)
    (tmp_path / "linux-source-0.0_1_all.deb").unlink()
    (tmp_path / "linux-source-9.9_1_all.deb").write_bytes(b"a newer one")
    monkeypatch.setattr(prepare_kernel, "SNAPSHOT", prepare_kernel.SNAPSHOT + "_gone")
    with pytest.raises(SystemExit, match=r"404.*--package FILE"):
        prepare_kernel.download(tmp_path)


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
        command: list[str | Path] = [sys.executable, EXPERIMENTS / "prepare_kernel.py"]
        command += ["--package", tmp_path / "linux.deb", "--vocab", "300"]
        command += ["--work", tmp_path / where, "--out", tmp_path / where / "store"]
        told = subprocess.run(
            command, check=True, capture_output=True, text=True
        ).stdout
        hashes += [
            line.split()[-1]
            for line in told.splitlines()
            if line.startswith("content hash")
        ]
        assert "another store than was measured on" in told
        listing = json.loads(
            (tmp_path / where / "store" / "sources-00.json").read_text(encoding="utf-8")
        )["files"]
        assert sorted(row[1] for row in listing) == sorted(files)
    assert len(hashes) == 2
    assert len(set(hashes)) == 1
