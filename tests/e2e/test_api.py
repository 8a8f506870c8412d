"""The Python API on a real run, and the notebook that shows it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from launch import PROCESS_GROUP, REPOSITORY, Workplace, losses

import stackgrow

NOTEBOOK = REPOSITORY / "examples" / "grow_a_model.ipynb"


def test_a_run_is_read_from_python(
    workplace: Workplace, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(workplace.folder)
    run = stackgrow.load_run(reference)
    columns = run.curves()
    assert dict(
        zip(
            zip(columns["stage"], columns["step"], strict=True),
            columns["loss"],
            strict=True,
        )
    ) == losses(reference)
    assert columns["tokens"] == sorted(columns["tokens"])
    assert len(run.curves("validation")["loss"]) > 2
    assert run.model().config.num_hidden_layers == 4
    assert run.model(stage="stage-0-train-2L").config.num_hidden_layers == 2
    ids = run.tokenizer.encode("import json")
    assert run.tokenizer.decode(ids).strip() == "import json"


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in PROCESS_GROUP:
        monkeypatch.delenv(name, raising=False)
    # It works in a folder beside recipes/, as examples/ is.
    shutil.copytree(
        REPOSITORY / "recipes",
        tmp_path / "recipes",
        ignore=shutil.ignore_patterns("results"),
    )
    (tmp_path / "examples").mkdir()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        resources={"metadata": {"path": str(tmp_path / "examples")}},
    )
    client.execute()
    last = notebook.cells[-1].outputs[-1]["data"]["text/plain"]
    assert last == "True"
    assert (tmp_path / "examples" / "runs" / "example").is_dir()
