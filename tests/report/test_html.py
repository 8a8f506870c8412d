"""The page of a run: what it says, that it needs nothing else, and how it looks in a browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import tomli
from runs_for_tests import SCRATCH, without_speed, written_run

import stackgrow
from stackgrow.errors import ChangedError, MissingExtraError
from stackgrow.report import figure, html
from stackgrow.report.html import write_report
from stackgrow.report.run_page import STAGE_HEAD, run_page
from stackgrow.run_folder.evaluations import write_evaluation
from stackgrow.run_folder.folder import RunFolder

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


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Scratch, and grown twice, with all that a report can hold."""
    tmp_path = tmp_path_factory.mktemp("runs")
    scratch = written_run(
        tmp_path / "scratch", *SCRATCH, ('name = "tiny"', 'name = "scratch"')
    )
    grown = written_run(
        tmp_path / "grown",
        ('path = "data/tiny"', 'path = "data/<script>alert(1)</script>&"'),
        ratio=1.5,
    )
    session = {
        "started": "2026-01-01T00:00:00+00:00", "world_size": 8, "host": "secret.example", "hardware": {"gpus": ["H<b>100"] * 2},
        "packages": {"torch": "2.13.0"}, "code": {"commit": "c" * 40, "dirty_sha256": "d" * 64},
        "overrides": ["growth[1].timing=40 steps", "seed=7"],
        "ended": {"at": "2026-01-02T03:04:05+00:00", "how": "finished"},
    }  # fmt: skip
    provenance = {
        "recipe_hash": "a" * 64,
        "data": {"manifest_hash": "b" * 64},
        "sessions": [session, session],
    }
    folder = RunFolder(grown)
    folder.provenance_file.write_text(json.dumps(provenance))
    sciq = {"acc_norm": 0.5, "acc_norm_stderr": 0.0158}
    tasks = {"sciq": sciq, "a_task_with_quite_a_long_name_of_its_own": {"acc": 0.25}}
    record = {
        "stage": "s",
        "step": 9,
        "tokens": 9,
        "tasks": tasks,
        "seven_task_mean": None,
    }
    write_evaluation(folder.eval_file("s"), record)
    (folder.stage("stage-0-train-2L").quarantine / "step-4.0").mkdir(parents=True)
    return [scratch, grown]


@pytest.fixture(scope="module")
def page(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of the grown run."""
    file = tmp_path_factory.mktemp("page") / "page.html"
    write_report(runs[1:], file)
    return file.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def compared(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of both."""
    file = tmp_path_factory.mktemp("compared") / "page.html"
    write_report(runs, file)
    return file.read_text(encoding="utf-8")


PICTURES_OF_A_RUN = 3  # learning rate, gradient norm, tokens per second
LAYER_MAPS = 2


def test_report_of_a_run_says_what_was_done(page: str) -> None:
    for part in (
        "<h1>tiny</h1>", "2 layers<br>", "4 layers<br>", "8 layers<br>", "stage-0-train-2L", "stage-4-train-8L", "1:15",
        "stage-1-grow: 2 -&gt; 4 layers", "0 1 | 0 1", "stage-3-grow: 4 -&gt; 8 layers", "a" * 64, "b" * 64, "c" * 40,
        "2 sessions, on 8, 8 ranks", "the code had changes that are in no commit", "stage-0-train-2L/quarantine/step-4.0",
        "2 x H&lt;b&gt;100", "sciq acc_norm", "0.5000", "data/&lt;script&gt;alert(1)&lt;/script&gt;&amp;", "[[growth]]",
    ):  # fmt: skip
        assert part in page, part
    assert "not finished" not in page
    assert "secret.example" not in page, "a report is published: no names of machines"
    # Training and validation loss over FLOPs and tokens.
    assert page.count("<svg") == 2 * 2 + PICTURES_OF_A_RUN + LAYER_MAPS


def test_a_run_that_wrote_down_no_speed_has_a_page_without_it(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run")
    speed = STAGE_HEAD.index("tok/s")
    assert [row[speed] for row in run_page(run).stages[1:]] == ["1K", "1K", "1K"]
    without_speed(run)
    page = run_page(run)
    assert [row[speed] for row in page.stages[1:]] == ["-", "-", "-"]
    assert len(page.pictures) == PICTURES_OF_A_RUN - 1


def test_status_date_seed_and_a_verdict_stand_on_top(
    runs: list[Path], page: str, compared: str
) -> None:
    top = page[page.index("<h1>") : page.index("<h3>")]
    assert "finished 2026-01-02 03:04; seed 7; recipe tiny" in top
    loss = json.loads(
        RunFolder(runs[1])
        .stage("stage-4-train-8L")
        .validation_file.read_text()
        .splitlines()[-1]
    )["loss"]
    assert f"grown by G_stack, 2 growths: validation loss {loss:.4f} after" in top
    top = compared[compared.index("<h1>") : compared.index("<h2>")]
    assert "<h1>tiny against scratch</h1>" in top
    assert re.search(
        r"tiny \(G_stack, 2 growths, 1 seed\): speed-up in FLOPs \+49\.[0-9]% to \+50\.[0-9]% at equal",
        top,
    )
    assert "one seed: within-run noise only" in top


def test_keys_that_the_command_line_set_are_marked(page: str) -> None:
    assert re.findall("<mark>(.*?)</mark>", page) == [
        "seed = 7",
        "timing = &#34;40 steps&#34;",
    ]


def test_benchmarks_have_errors_and_chance_level(page: str) -> None:
    assert "0.5000 ± 0.0158" in page
    assert "<th>chance</th>" in page


def test_axes_of_a_picture_are_amounts_that_people_read(compared: str) -> None:
    assert ">20K<" in compared
    assert ">100B<" in compared
    assert "mathdefault" not in compared
    assert not [
        svg for svg in re.findall("<svg.*?</svg>", compared, re.DOTALL) if "1e+" in svg
    ]


def test_legends_are_the_page_s_and_cover_no_curve(compared: str) -> None:
    assert 'id="legend' not in compared
    assert compared.count('<ul class="legend">') == 2
    assert "</i>from scratch, 1 seed (scratch)</li>" in compared


def test_report_needs_nothing_else_and_runs_nothing(compared: str) -> None:
    assert "<script" not in compared
    assert not re.search(
        r"<(link|img|iframe|object|embed|base)\b|\bsrc=|@import|url\((?!#)", compared
    )
    assert {
        m for m in re.findall(r'href="([^"]*)"', compared) if not m.startswith("#")
    } == set()
    assert "javascript:" not in compared
    assert compared.count("<svg") == PICTURES, "the speed-up too"
    assert len(compared) < 1_000_000


PICTURES = 2 * 3 + 2 * PICTURES_OF_A_RUN + LAYER_MAPS


def test_unfinished_run_is_told(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run", done=False)
    folder = RunFolder(run)
    shutil.rmtree(folder.stage("stage-4-train-8L").path)
    write_report([run], folder.report_file)
    text = folder.report_file.read_text()
    assert (
        "not finished: stage-0-train-2L, stage-1-grow, stage-2-train-4L, stage-3-grow, stage-4-train-8L"
        in text
    )
    assert "not finished: running, or killed; begun at an unknown time; seed 7" in text


def test_runs_that_cannot_be_compared_are_on_one_page_by_force_alone(
    runs: list[Path], tmp_path: Path
) -> None:
    other = written_run(
        tmp_path / "c",
        ("vocab_size = 256", "vocab_size = 512"),
        ('name = "tiny"', 'name = "other"'),
    )
    with pytest.raises(ChangedError, match="vocabulary: 256 -> 512"):
        write_report([runs[0], other], tmp_path / "page.html")
    write_report([runs[0], other], tmp_path / "page.html", force=True)
    assert (
        "<li>other: vocabulary: 256 -&gt; 512</li>"
        in (tmp_path / "page.html").read_text()
    )


@pytest.mark.parametrize(
    "provenance",
    [
        {"sessions": 5},
        {
            "sessions": [
                5,
                {
                    "code": 5,
                    "packages": [1],
                    "hardware": {"gpus": 8},
                    "overrides": 5,
                    "ended": "now",
                },
            ]
        },
        {
            "data": "data",
            "sessions": [{"code": {"commit": [1]}}, {"code": {"commit": {}}}],
        },
    ],
)
def test_a_provenance_that_holds_anything_is_shown_as_far_as_it_goes(
    tmp_path: Path, provenance: object
) -> None:
    folder = RunFolder(written_run(tmp_path / "run"))
    folder.provenance_file.write_text(json.dumps(provenance))
    page = run_page(folder.path)
    assert page.status.startswith("finished")
    assert dict(page.facts)["data"] == "SHA-256 unknown"


def test_templates_are_installed_with_the_package() -> None:
    pyproject = tomli.loads(
        (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    )
    patterns = pyproject["tool"]["setuptools"]["package-data"]["stackgrow"]
    package = Path(stackgrow.__file__).parent
    installed = {file for pattern in patterns for file in package.glob(pattern)}
    templates = {*package.rglob("*.jinja"), *package.rglob("*.css")}
    assert package / html.TEMPLATE in templates
    assert templates <= installed


def test_without_matplotlib_the_extra_is_named(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r'pip install "stackgrow\[report\]"'):
        write_report(runs, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    assert figure.SIZE


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_overflows_in_a_browser(
    compared: str, tmp_path: Path, width: int
) -> None:
    page = json.dumps(compared).replace("</", "<\\/")
    frame = f'<!doctype html><iframe id="page" style="width:{width}px;height:800px;border:0"></iframe>'
    (tmp_path / "frame.html").write_text(f"{frame}<script>{MEASURE % page}</script>")
    command = [
        "chromium",
        *FLAGS.split(),
        f"--user-data-dir={tmp_path / 'browser'}",
        f"file://{tmp_path / 'frame.html'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert f"<title>measured {PICTURES} []</title>" in done.stdout, (
        re.findall("<title>.*?</title>", done.stdout) or done.stderr[-2000:]
    )
