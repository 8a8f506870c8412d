"""What a plan leaves unchecked is said, and ``--check`` looks at all that a run would look at, and starts nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recipes_for_tests import RECIPE, edited, plan_of
from test_loader import write_store

from stackgrow.cli.run import main
from stackgrow.errors import ChangedError
from stackgrow.recipe.load import RecipeError
from stackgrow.run.preflight import unchecked
from stackgrow.run_folder.folder import RunFolder

TINY = edited(
    ("seq_len = 64", "seq_len = 8"),
    ("vocab_size = 256", "vocab_size = 1000"),
    ("data/tiny", "store"),
)
TINY += "\n[validation]\nsequences = 4\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_store(tmp_path / "store")
    (tmp_path / "tiny.toml").write_text(TINY, encoding="utf-8")
    return tmp_path


def test_a_good_recipe_is_checked_and_nothing_is_made(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tiny.toml", "--check"]) == 0
    assert capsys.readouterr().out.startswith(
        "nothing is wrong with tiny.toml on 1 rank;"
    )
    assert {path.name for path in here.iterdir()} == {"store", "tiny.toml"}


def test_fewer_held_out_sequences_than_asked_for_are_told(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tiny.toml", "--check", "--set", "validation.sequences=1000000"]) == 0
    told = capsys.readouterr().out
    assert "validation.sequences asks for 1000000, and the held-out text has " in told
    assert main(["tiny.toml", "--check", "--set", "validation.sequences=1"]) == 0
    assert "to be noted" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sets", "where"),
    [
        (["model.vocab_size=999"], "model.vocab_size"),
        (["train.attention=flash_attn"], "attention"),
        (["base.from=nowhere"], "base.from"),
        (["parallel.shard=2"], "parallel"),
        (["data.path=elsewhere"], "data.path"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_the_run_would_refuse_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str], sets: list[str], where: str
) -> None:
    arguments = [
        "tiny.toml",
        *(word for assignment in sets for word in ("--set", assignment)),
    ]
    assert main([*arguments, "--plan"]) == 0, "a plan is made all the same"
    capsys.readouterr()
    assert main([*arguments, "--check"]) == RecipeError.exit_code
    assert where in capsys.readouterr().err


def test_all_that_is_wrong_is_told_at_once_where_the_store_is_missing_too(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ["data.path=elsewhere", "train.attention=flash_attn", "base.from=nowhere"]
    words = [word for assignment in sets for word in ("--set", assignment)]
    assert main(["tiny.toml", "--check", *words]) == RecipeError.exit_code
    told = capsys.readouterr().err
    for where in ("data.path: ", "train.attention: ", "base.from: "):
        assert where in told


def test_an_operator_that_is_code_is_among_what_a_plan_leaves(tmp_path: Path) -> None:
    left = "\n".join(
        unchecked(plan_of(tmp_path, RECIPE, ["growth[1].operator=mine:rules"]))
    )
    assert 'growth[1].operator = "mine:rules": the file that it is in' in left
    assert "growth[0].operator" not in left


def test_a_folder_with_another_recipe_s_run_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(here / "runs" / "tiny")
    stage = run.stage("stage-0-train-2L")
    stage.path.mkdir(parents=True)
    stage.stage_file.write_text(
        json.dumps({"stage_hash": "other", "seed": 7, "stage": {"steps": 19}}),
        encoding="utf-8",
    )
    assert main(["tiny.toml", "--check"]) == ChangedError.exit_code
    assert "was made by another recipe" in capsys.readouterr().err


def test_a_plan_says_what_it_did_not_check(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tiny.toml", "--plan", "--set", "train.attention=flex"]) == 0
    text = capsys.readouterr().out
    _, _, left = text.partition("not checked by --plan, but by --check:")
    assert "- the token stores (store)" in left
    assert '- train.attention = "flex"' in left
    assert main(["tiny.toml", "--plan", "--json"]) == 0
    assert "flex" not in str(json.loads(capsys.readouterr().out)["unchecked"])


def test_tasks_and_a_base_from_elsewhere_are_among_what_a_plan_leaves(
    tmp_path: Path,
) -> None:
    sets = [
        "base.from=models/base",
        "eval.tasks=['piqa']",
        "eval.include=my_tasks",
        "train.precision=float8",
    ]
    left = "\n".join(unchecked(plan_of(tmp_path, RECIPE, sets)))
    for part in (
        "the base model in models/base",
        "lm-eval: piqa",
        "task files in my_tasks",
        '"float8"',
    ):
        assert part in left
