"""Wrong recipes: every one ends in a RecipeError that says where, what was given, and what to write instead."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recipes_for_tests import RECIPE, edited, plan_of, problems_of, recipe_of, written

from stackgrow.plan.resolve import make_plan
from stackgrow.recipe.load import MAX_BYTES, RecipeError, load_recipe
from stackgrow.recipe.values import Duration
from stackgrow.recipe.write import to_toml
from stackgrow.report.plan_table import render_plan

LR = "learning_rate = 1e-3"
BATCH = "global_batch_tokens = 1024"

# (what is changed, by what, TOML path of the problem, parts of the message)
NASTY: list[tuple[str, str, str, tuple[str, ...]]] = [
    ("seq_len = 64", "seq_len = 64\nseqlen = 64", "data.seqlen", ("unknown key", "did you mean data.seq_len?")),
    ("seq_len = 64", "seq-len = 64", "data.seq-len", ("did you mean data.seq_len?",)),
    ("seq_len = 64", "Seq_Len = 64", "data.Seq_Len", ("did you mean data.seq_len?",)),
    ("[train]", "[Train]", "Train", ("did you mean train?",)),
    ("seed = 7", "seed = 7\nqwertz = 1", "qwertz", ("known here: name, seed, budget",)),
    ("[budget]", "[mlflow]\nx = 1\n[budget]", "mlflow", ("unknown key", "known here")),
    ("[budget]", "[wandb]\nx = 1\n[budget]", "wandb", ("unknown key", "it belongs in [log]")),
    ("[budget]", "[custom]\nimport = 'os'\n[budget]", "custom", ("unknown key",)),
    ("seed = 7", "seed = 7\n'a\\u0000 b' = 1", '"a\\\\u0000 b"', ("unknown key",)),
    ("n_layers = 8", 'n_layers = "8"', "model.n_layers", ('"8"', "whole number of at least 1")),
    ("n_layers = 8", "n_layers = 8.5", "model.n_layers", ("8.5", "whole number")),
    ("n_layers = 8", "n_layers = 1e3", "model.n_layers", ("1000.0", "whole number")),
    ("n_layers = 8", "n_layers = true", "model.n_layers", ("true", "whole number")),
    ("n_layers = 8", "n_layers = 1979-05-27", "model.n_layers", ("1979-05-27", "whole number")),
    ("n_layers = 8", "n_layers = [8]", "model.n_layers", ("[8]", "whole number")),
    ("n_layers = 8", "n_layers = {a = 8}", "model.n_layers", ('{"a": 8}', "whole number")),
    ("n_layers = 8", "n_layers = -8", "model.n_layers", ("-8", "at least 1")),
    ("seed = 7", "seed = 9223372036854775808", "seed", ("9223372036854775808", "at most 4294967295")),
    ("dim = 64", "dim = 9223372036854775808", "model.dim", ("9223372036854775808", "whole number")),
    ("dim = 64", f"dim = 0x{'f' * 6000}", "model.dim", ("this int", "whole number")),
    ("seq_len = 64", "seq_len = 0", "data.seq_len", ("0 must", "at least 2")),
    ("seq_len = 64", "", "data.seq_len", ("is missing", "whole number", "tokens in one training sequence")),
    (LR, "learning_rate = nan", "train.learning_rate", ("nan must", "above 0")),
    (LR, "learning_rate = inf", "train.learning_rate", ("inf must", "above 0")),
    (LR, "learning_rate = 1e400", "train.learning_rate", ("inf must", "above 0")),
    (LR, f"learning_rate = 1{'0' * 400}", "train.learning_rate", ("1000", "above 0")),
    (LR, "learning_rate = -1e-3", "train.learning_rate", ("-0.001 must", "above 0")),
    (LR, 'learning_rate = "1e-3"', "train.learning_rate", ('"1e-3" must', "a number")),
    (LR, f"{LR}\nbeta1 = 1.0", "train.beta1", ("1.0 must", "below 1")),
    (LR, f'{LR}\nschedule = "Cosine"', "train.schedule", ('"Cosine"', 'one of "cosine", "linear", "wsd"')),
    (LR, f"{LR}\nhorizon = 3000", "train.horizon", ("3000", '"3000 steps"')),
    (LR, f'{LR}\nhorizon = "0 steps"', "train.horizon", ('"0 steps"', "at least 1")),
    ('timing = "40 steps"', f'timing = "40 steps"\n{LR}', "growth[1].learning_rate", ("[growth.train]",)),
    ("seed = 7", "seed = 7\nn_layers = 4", "n_layers", ("it belongs in [model] or [base]",)),
    ("[base]\n", "[base]\nffn_dim = 8\n", "base.ffn_dim", ("it belongs in [base.model]",)),
    (LR, f"{LR}\n[train.x]\ny = 1", "train.x", ("unknown key",)),
    (LR, f'{LR}\n[checkpoint]\ninterval = "0 steps"', "checkpoint.interval", ('"0 steps"', "at least 1")),
    (BATCH, "global_batch_tokens = 1e3", "train.global_batch_tokens", ("1000.0", '"2Mi"')),
    ('tokens = "100K"', 'tokens = "-1B"', "budget.tokens", ('"-1B" must', "at least 1")),
    ('tokens = "100K"', "tokens = 0", "budget.tokens", ("0 must", "at least 1")),
    ('tokens = "100K"', 'tokens = "100 GB"', "budget.tokens", ('"100 GB"', '"750B"')),
    ('[budget]\ntokens = "100K"', "", "budget", ("is missing", "add a table [budget]")),
    ('[budget]\ntokens = "100K"', "[[budget]]\ntokens = 5", "budget", ('[{"tokens": 5}]', "must be a table [budget]")),
    ("seed = 7\n\n[budget]\n", "seed = 7\nbudget = 5\n[run]\n#", "budget", ("5 must be a table [budget]",)),
    ("[base]\nn_layers = 2", "[base]\nn_layers = 2\ntrain = 5", "base.train", ("5 must be a table [base.train]",)),
    ("[base]", "[base.train]\nlr = 1\n[base]", "base.train.lr", ("unknown key",)),
    ("[base]", "[base.train]\nlearningrate = 1\n[base]", "base.train.learningrate", ("base.train.learning_rate?",)),
    ("[base]", "[base.train]\nbeta2 = 2\n[base]", "base.train.beta2", ("2 must", "below 1")),
    ('path = "data/tiny"', 'path = "data/\\u0000"', "data.path", ('"data/\\u0000" must', "control")),
    ('path = "data/tiny"', 'path = "data/\\u202Egnp"', "data.path", ('"data/\\u202egnp" must', "invisible")),
    ('path = "data/tiny"', 'path = "../../etc"', "data.path", ('"../../etc" leaves', "--set data.path=")),
    ('path = "data/tiny"', 'path = "/etc/passwd"', "data.path", ('"/etc/passwd" leaves', "--set data.path=")),
    ('path = "data/tiny"', 'path = "~/x"', "data.path", ('"~/x" leaves', "--set data.path=")),
    (LR, f'{LR}\n[eval]\ntasks = ["x"]\ninclude = "/tmp/tasks"', "eval.include", ("leaves the", "--set eval.include=")),
    (LR, f"{LR}\n[eval]\ntasks = [1]", "eval.tasks", ("[1] must be a list of names",)),
    (LR, f'{LR}\n[eval]\nafter = "each"', "eval.tasks", ("is missing", "a list of names")),
    (LR, f'{LR}\n[run]\nfolder = "a/../../b"', "run.folder", ("leaves the working directory", "--set run.folder=")),
    ('name = "tiny"', 'name = "ti\\u202Eny"', "name", ('"ti\\u202eny" must', "letters")),
    ('name = "tiny"', 'name = "ti\\u200Bny"', "name", ('"ti\\u200bny" must', "letters")),
    ('name = "tiny"', 'name = "../tiny"', "name", ('"../tiny" must', "letters")),
    ('name = "tiny"', f"name{'.a' * 900} = 1", "name", ("must be", "letters")),
    ('factor = 2\ntiming = "20K"', 'factr = 2\ntiming = "20K"', "growth[0].factr", ("growth[0].factor?",)),
    ('timing = "40 steps"', 'timing = "soon"', "growth[1].timing", ('"soon"', '"auto"')),
    ('timing = "40 steps"', "timing = 40", "growth[1].timing", ("40 must", '"3000 steps"')),
    ('timing = "40 steps"', 'timing = "0 steps"', "growth[1].timing", ('"0 steps"', "at least one step")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "where", "parts"),
    NASTY,
    ids=lambda v: v[:30] if isinstance(v, str) else "",
)
def test_one_wrong_value_is_told_with_its_place_and_rule(
    tmp_path: Path, old: str, new: str, where: str, parts: tuple[str, ...]
) -> None:
    problems = problems_of(tmp_path, edited((old, new)))
    assert where in problems, problems
    for part in parts:
        assert part in problems[where]
    assert all(
        line.isprintable() and line.isascii()
        for line in "".join(problems.values()).splitlines()
    )


BROKEN: list[tuple[str, str | bytes, str]] = [
    ("empty", "", "is empty"),
    ("only a comment", "# nothing\n", "is empty"),
    ("binary", bytes(range(256)) * 8, "is not UTF-8 text (byte 128)"),
    (
        "invalid UTF-8",
        RECIPE.encode().replace(b"tiny", b"t\xffny", 1),
        "is not UTF-8 text (byte 9)",
    ),
    ("Latin-1", "# größer\n".encode("latin-1") + RECIPE.encode(), "is not UTF-8 text"),
    ("UTF-16", RECIPE.encode("utf-16"), "is not UTF-8 text"),
    ("NUL byte", RECIPE.replace("tiny", "ti\0ny"), "is not valid TOML"),
    ("duplicate key", edited(("seed = 7", "seed = 7\nseed = 8")), "is not valid TOML"),
    ("duplicate table", RECIPE + "\n[data]\n", "is not valid TOML"),
    ("cut off", RECIPE[: RECIPE.index("64")] + "[", "is not valid TOML"),
    ("JSON", '{"name": "tiny"}', "is not valid TOML"),
    ("nested brackets", "x = " + "[" * 5000, "nested too deeply"),
    ("nested tables", "x = " + "{a=" * 5000, "nested too deeply"),
    ("key of 5000 parts", ".".join("a" * 5000) + " = 1", "nested too deeply"),
    ("5000 digits", "seed = " + "9" * 5000, "is not valid TOML"),
    (
        "unquoted amount",
        edited(('"100K"', "600K  # tokens")),
        'put the value in quotes: tokens = "600K"',
    ),
    (
        "unquoted share",
        edited(('"20K"', "5%")),
        'put the value in quotes: timing = "5%"',
    ),
    (
        "unquoted steps",
        edited(('"40 steps"', "3000 steps")),
        'put the value in quotes: timing = "3000 steps"',
    ),
    (
        "unquoted word",
        edited(("seed = 7", "seed = 7\norder = stack")),
        'put the value in quotes: order = "stack"',
    ),
    (
        "unquoted at the end",
        RECIPE.rstrip().rpartition("\n")[0] + "\nwarmup = 4K",
        'quotes: warmup = "4K"',
    ),
    (
        "unquoted with CRLF",
        edited(('"20K"', "5%")).replace("\n", "\r\n"),
        'in quotes: timing = "5%"',
    ),
    ("Python's True", RECIPE + "compile = True\n", "; write compile = true"),
    ("table and array", RECIPE + "\n[growth]\nfactor = 2\n", "is not valid TOML"),
]


@pytest.mark.parametrize(
    ("content", "message"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN]
)
def test_a_file_that_is_no_toml_is_told_why(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    assert message in problems_of(tmp_path, content)[""]


def test_a_recipe_that_cannot_be_read_is_told_why(tmp_path: Path) -> None:
    huge = tmp_path / "huge.toml"
    huge.touch()
    os.truncate(huge, 50 * 2**20)
    pipe = tmp_path / "pipe.toml"
    os.mkfifo(pipe)
    cases = {
        pipe: "cannot be read (a pipe, which would be waited for without end)",
        tmp_path: "is a directory; name the recipe file in it",
        tmp_path / "missing.toml": "cannot be read (No such file or directory)",
        "a\0b": "cannot be read (embedded null byte)",
        tmp_path / ("x" * 300): "cannot be read (File name too long)",
        huge: f"is larger than {MAX_BYTES} bytes",
    }
    for file, message in cases.items():
        with pytest.raises(RecipeError) as caught:
            load_recipe(file)
        assert str(caught.value).startswith(f"{file}: 1 problem\n  {message}")
        assert len(caught.value.problems) == 1


def test_growth_must_be_an_array_of_tables(tmp_path: Path) -> None:
    one = RECIPE[: RECIPE.index("[[growth]]")] + RECIPE[RECIPE.index("[train]") :]
    problems = problems_of(tmp_path, one + "\n[growth]\nfactor = 2\n")
    assert (
        '{"factor": 2} must be an array of tables: write [[growth]]'
        in problems["growth"]
    )
    problems = problems_of(tmp_path, "growth = [1, {}]\n" + one)
    assert problems["growth[0]"] == "1 must be a table [[growth]]"
    assert "is missing" in problems["growth[1].timing"]


def test_all_problems_at_once(tmp_path: Path) -> None:
    text = edited(
        ("seed = 7", "sed = 7"),
        ("dim = 64", "dim = 0"),
        ('factor = 2\ntiming = "20K"', "factor = 1"),
    )
    problems = problems_of(tmp_path, text, ["parallel.tensor=x", "nonsense"])
    assert list(problems) == [
        "--set nonsense", "sed", "seed", "model.dim", "growth[0].timing", "growth[0].factor", "parallel.tensor",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        RECIPE.replace("\n", "\r\n"),
        "\ufeff" + RECIPE,
        edited(("dim = 64", "dim = 0x40"), (BATCH, "global_batch_tokens = 1_024")),
        "#:schema ../stackgrow/recipe.schema.json\n# größer\n" + RECIPE,
    ],
    ids=["CRLF", "BOM", "other integers", "comments"],
)
def test_other_spellings_of_the_same_recipe(tmp_path: Path, text: str) -> None:
    assert recipe_of(tmp_path, text) == recipe_of(tmp_path, RECIPE)


SETS: list[tuple[str, tuple[str, ...], Any]] = [
    ("train.compile=true", ("train", "compile"), True),
    ("parallel.tensor=2", ("parallel", "tensor"), 2),
    ("train.learning_rate=3e-4", ("train", "learning_rate"), 3e-4),
    ("budget.tokens=750B", ("budget", "tokens"), 750 * 10**9),
    ('budget.tokens="750B"', ("budget", "tokens"), 750 * 10**9),
    ("name=other", ("name",), "other"),
    ("growth[1].factor=3", ("growth", 1, "factor"), 3),
    ("growth[0].train.beta1=0.5", ("growth", 0, "train"), {"beta1": 0.5}),
    ("base.n_layers=4", ("base", "n_layers"), 4),
    ("data.path=/mnt/data", ("data", "path"), "/mnt/data"),
    (" data.path = ../data ", ("data", "path"), "../data"),
    ('run={folder="/mnt/runs"}', ("run", "folder"), "/mnt/runs"),
    ("growth=[]", ("growth",), ()),
    # Words stay words where the key's type is text, whatever TOML would read in them.
    ("name=2024-01-05", ("name",), "2024-01-05"),
    ("name=7", ("name",), "7"),
    ("name=1e3", ("name",), "1e3"),
    ("name=true", ("name",), "true"),
    ("name='x'", ("name",), "x"),
    ("data.path=2024", ("data", "path"), "2024"),
    ("data.path = 2024-01-05 ", ("data", "path"), "2024-01-05"),
    (f"data.tokenizer={'1' * 64}", ("data", "tokenizer"), "1" * 64),
    ("growth[0].train.schedule=wsd", ("growth", 0, "train"), {"schedule": "wsd"}),
    ("growth[0].timing=10K", ("growth", 0, "timing"), Duration(10_000, "tokens")),
]


@pytest.mark.parametrize(
    ("assignment", "path", "value"), SETS, ids=[s[0] for s in SETS]
)
def test_set_writes_a_value_where_it_points(
    tmp_path: Path, assignment: str, path: tuple[str | int, ...], value: Any
) -> None:
    node: Any = recipe_of(tmp_path, RECIPE, [assignment])
    for step in path:
        node = node[step] if isinstance(step, int) else getattr(node, step)
    assert node == value


def test_paths_of_a_mixture_stay_below_the_working_directory_too(
    tmp_path: Path,
) -> None:
    mix = "[[data.mix]]\npath = '../web'\nweight = 0.7\n[[data.mix]]\npath = 'books'\nweight = 0.3\n"
    text = edited(('path = "data/tiny"\n', ""), ("[model]", f"{mix}[model]"))
    assert "--set data.mix[0].path=" in problems_of(tmp_path, text)["data.mix[0].path"]
    data = recipe_of(tmp_path, text, ["data.mix[0].path=/data/web"]).data
    assert data.stores == [("/data/web", 0.7), ("books", 0.3)]


def test_set_may_replace_a_path_that_the_file_may_not_name(tmp_path: Path) -> None:
    text = edited(('path = "data/tiny"', 'path = "/data/tiny"'))
    assert "data.path" in problems_of(tmp_path, text)
    assert recipe_of(tmp_path, text, ["data.path=/data/tiny"]).data.path == "/data/tiny"


@pytest.mark.parametrize(
    ("assignment", "where", "part"),
    [
        ("train.compile", "--set train.compile", "section.key=value"),
        ("=1", "--set =1", "section.key=value"),
        ("a..b=1", "--set a..b=1", "section.key=value"),
        (
            "growth[2].factor=2",
            "--set growth[2].factor=2",
            "no entry [2]: the recipe has 2 there",
        ),
        ("growth[9]=2", "--set growth[9]=2", "no entry [9]"),
        ("growth.factor=2", "--set growth.factor=2", '"factor" cannot be set'),
        (
            "growth.factor=2",
            "--set growth.factor=2",
            "counted from 0, as in growth[0].factor",
        ),
        ("timing", "--set timing", "--set growth[0].timing=10B"),
        (
            "train.warmup=3000",
            "train.warmup",
            "3000 must be an amount of at least 0 with its unit",
        ),
        ("name.x=2", "--set name.x=2", '"x" cannot be set'),
        ("evil[0].x=2", "--set evil[0].x=2", "no entry [0]: the recipe has 0 there"),
        ("train.compil=true", "train.compil", "did you mean train.compile?"),
        ("trian.compile=true", "trian", "did you mean train?"),
        ("train.compile=yes", "train.compile", '"yes" must be true or false'),
        ("run.folder=", "run.folder", '"" must be a path'),
        (f"seed={'9' * 5000}", "seed", "whole number"),
    ],
)
def test_a_wrong_set_is_told_with_what_to_write(
    tmp_path: Path, assignment: str, where: str, part: str
) -> None:
    problems = problems_of(tmp_path, RECIPE, [assignment])
    assert part in problems[where], problems


def test_a_bad_recipe_is_refused_at_once(tmp_path: Path) -> None:
    """A file within the size limit cannot make the reader slow."""
    worst = [
        "[[a]]\n" * 20000,
        "".join(f"[a{i}]\n" for i in range(10000)),
        "a = '''" + "x" * 120000 + "'''",
    ]
    for text in worst:
        file = written(tmp_path, text)
        start = time.monotonic()
        with pytest.raises(RecipeError):
            load_recipe(file)
        assert time.monotonic() - start < 10


VALUES = [
    "-1",
    "0",
    "1e400",
    "nan",
    "true",
    '""',
    '"9T"',
    "[]",
    "[[]]",
    "{}",
    "1979-05-27",
    "9223372036854775807",
    "3",
]
LINES = RECIPE.splitlines()


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """The recipe with some lines removed, doubled, moved or given other values, then with some bytes changed."""
    lines = list(LINES)
    for _ in range(draw(st.integers(0, 3))):
        index = draw(st.integers(0, len(lines) - 1))
        other = lines[draw(st.integers(0, len(lines) - 1))]
        key = lines[index].partition("=")[0]
        value = draw(
            st.sampled_from(VALUES)
            | st.integers().map(str)
            | st.floats().map(repr)
            | st.just(other)
        )
        lines[index] = draw(
            st.sampled_from([f"{key}= {value}", "", f"{other}\n{lines[index]}"])
        )
    content = bytearray("\n".join(lines).encode())
    for _ in range(draw(st.integers(0, 2))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content)


@settings(
    max_examples=400,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(content=mutated() | st.binary(max_size=64))
def test_whatever_a_file_holds_is_a_plan_or_a_recipe_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    """Whatever the file holds: a plan that can be shown and written down again, or a RecipeError."""
    folder = tmp_path_factory.getbasetemp()
    try:
        plan = plan_of(folder, content)
    except RecipeError:
        return
    assert render_plan(plan)
    again = load_recipe(written(folder, to_toml(plan.recipe)), trusted=True)
    assert again == plan.recipe
    assert make_plan(again) == plan
