"""The page of a run: what it says, that it needs nothing else, and how it looks in a browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from runs_for_tests import SCRATCH, written_run

from stackgrow.errors import MissingExtraError
from stackgrow.report import figure
from stackgrow.report.html import write_report

pytest.importorskip("matplotlib")

FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
FLAGS += "--disable-component-update --disable-sync --virtual-time-budget=4000 --dump-dom --window-size=1400,900"
# What reaches beyond the page, and what holds text wider than itself, apart from tables that scroll by themselves.
MEASURE = """
const page = document.getElementById("page"), found = [];
page.onload = () => {
  const inner = page.contentDocument, width = inner.documentElement.clientWidth;
  if (inner.documentElement.scrollWidth > width) found.push("the page scrolls sideways");
  for (const e of inner.querySelectorAll("body *")) {
    if (e.closest(".wide table") || e.closest("svg") !== null && e.tagName !== "svg") continue;
    if (e.getBoundingClientRect().right > width + 1) found.push(e.tagName + " reaches beyond the page");
    if (e.scrollWidth > e.clientWidth + 1 && !e.matches(".wide, svg") && getComputedStyle(e).display !== "inline")
      found.push(e.tagName + " overflows: " + e.textContent.slice(0, 40));
  }
  document.title = "measured " + inner.querySelectorAll("svg").length + " " + JSON.stringify(found);
};
page.srcdoc = %s;
"""


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Scratch, and grown twice, with all that a report can hold."""
    scratch = written_run(tmp_path / "scratch", *SCRATCH, ('name = "tiny"', 'name = "scratch"'))
    grown = written_run(
        tmp_path / "grown", ('path = "data/tiny"', 'path = "data/<script>alert(1)</script>&"'), ratio=1.5
    )
    session = {
        "started": "2026-01-01T00:00:00+00:00", "world_size": 8, "host": "secret.example", "hardware": {"gpus": ["H<b>100"] * 2},
        "packages": {"torch": "2.13.0"}, "code": {"commit": "c" * 40, "dirty_sha256": "d" * 64},
    }  # fmt: skip
    provenance = {"recipe_hash": "a" * 64, "data": {"manifest_hash": "b" * 64}, "sessions": [session, session]}
    (grown / "provenance.json").write_text(json.dumps(provenance))
    (grown / "eval").mkdir()
    tasks = {"sciq": {"acc_norm": 0.5}, "a_task_with_quite_a_long_name_of_its_own": {"acc": 0.25}}
    record = {"stage": "s", "step": 9, "tokens": 9, "tasks": tasks, "seven_task_mean": None}
    (grown / "eval" / "s.json").write_text(json.dumps(record))
    (grown / "stage-0-train-2L" / "quarantine" / "step-4.0").mkdir(parents=True)
    return [scratch, grown]


def test_report_of_a_run_says_what_was_done(runs: list[Path], tmp_path: Path) -> None:
    write_report(runs[1:], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    for part in (
        "<h1>tiny</h1>", "2 layers<br>", "4 layers<br>", "8 layers<br>", "stage-0-train-2L", "stage-4-train-8L", "1:15",
        "stage-1-grow: 2 -&gt; 4 layers", "0 1 | 0 1", "stage-3-grow: 4 -&gt; 8 layers", "a" * 64, "b" * 64, "c" * 40,
        "2 sessions, on 8, 8 ranks", "the code had changes that are in no commit", "stage-0-train-2L/quarantine/step-4.0",
        "2 x H&lt;b&gt;100", "sciq acc_norm", "0.5000", "data/&lt;script&gt;alert(1)&lt;/script&gt;&amp;", "[[growth]]",
    ):  # fmt: skip
        assert part in text, part
    assert "not finished" not in text
    assert "secret.example" not in text, "a report is published: no names of machines"
    assert text.count("<svg") == 2 + 2, "loss against FLOPs and tokens, two layer maps"


def test_report_needs_nothing_else_and_runs_nothing(runs: list[Path], tmp_path: Path) -> None:
    write_report(runs, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text
    assert not re.search(r"<(link|img|iframe|object|embed|base)\b|\bsrc=|@import|url\((?!#)", text)
    assert {m for m in re.findall(r'href="([^"]*)"', text) if not m.startswith("#")} == set()
    assert "javascript:" not in text
    assert text.count("<svg") == 3 + 2, "the speed-up too"
    assert len(text) < 1_000_000


def test_unfinished_run_is_told(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run", done=False)
    shutil.rmtree(run / "stage-4-train-8L")
    write_report([run], run / "report.html")
    text = (run / "report.html").read_text()
    assert "not finished: stage-0-train-2L, stage-1-grow, stage-2-train-4L, stage-3-grow, stage-4-train-8L" in text


def test_without_matplotlib_the_extra_is_named(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r'pip install "stackgrow\[report\]"'):
        write_report(runs, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
    assert figure.SIZE


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_overflows_in_a_browser(runs: list[Path], tmp_path: Path, width: int) -> None:
    write_report(runs, tmp_path / "report.html")
    page = json.dumps((tmp_path / "report.html").read_text()).replace("</", "<\\/")
    frame = f'<!doctype html><iframe id="page" style="width:{width}px;height:800px;border:0"></iframe>'
    (tmp_path / "frame.html").write_text(f"{frame}<script>{MEASURE % page}</script>")
    command = [
        "chromium",
        *FLAGS.split(),
        f"--user-data-dir={tmp_path / 'browser'}",
        f"file://{tmp_path / 'frame.html'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert "<title>measured 5 []</title>" in done.stdout, (
        re.findall("<title>.*?</title>", done.stdout) or done.stderr[-2000:]
    )
