"""A run on two token stores by weight: what each gave is counted, and a kill changes nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

from launch import REPOSITORY, Workplace, environment, losses, records

from stackgrow.run_folder.folder import VALIDATION, RunFolder

MIX = "data={seq_len=64, mix=[{path='store', weight=3}, {path='other', weight=1}]}"
PADDED = "model.vocab_size=576"  # of the stores' 512


def prepare_other_store(workplace: Workplace) -> None:
    command = [
        sys.executable,
        str(REPOSITORY / "tools" / "prepare_data.py"),
        "--pattern",
        "*.py",
        "--out",
        "other",
    ]
    command += [
        "--input",
        str(Path(os.__file__).parent / "http"),
        "--tokenizer",
        "store/tokenizer.model",
    ]
    command += ["--validation", "0.3"]
    subprocess.run(command, cwd=workplace.folder, env=environment(), check=True)


def test_run_on_a_mixture_with_a_padded_vocabulary(workplace: Workplace) -> None:
    prepare_other_store(workplace)
    mixed = RunFolder(workplace.folder / "mixed")
    workplace.run("run.folder=mixed", MIX, PADDED)
    ledger = json.loads(mixed.ledger_file.read_text(encoding="utf-8"))["data"]
    assert sum(store["tokens"] for store in ledger.values()) == 40 * 1024
    assert abs(ledger["other"]["tokens"] - 10 * 1024) < 3 * 1024, (
        "a quarter, by chance in so short a run"
    )
    rows = list(records(mixed.path).values())
    for row in rows:
        assert sum(store["tokens"] for store in row["data"].values()) == row["tokens"]
    assert rows[-1]["data"] == ledger

    stopped = workplace.folder / "mixed_stopped"
    workplace.kill_at("train.step 10", "run.folder=mixed_stopped", MIX, PADDED)
    workplace.run("run.folder=mixed_stopped", MIX, PADDED)
    assert losses(stopped) == losses(mixed.path)
    assert losses(stopped, VALIDATION) == losses(mixed.path, VALIDATION)

    changed = MIX.replace("weight=3", "weight=4")
    assert "made by another recipe" in workplace.run(
        "run.folder=mixed", changed, PADDED, code=65
    )
