"""A run on two token stores by weight: what each gave is counted, and a kill changes nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

from launch import REPOSITORY, Workplace, environment, losses, records

MIX = "data={seq_len=64, mix=[{path='store', weight=3}, {path='other', weight=1}]}"


def test_run_on_a_mixture(workplace: Workplace) -> None:
    prepare = [sys.executable, str(REPOSITORY / "tools" / "prepare_data.py"), "--pattern", "*.py", "--out", "other"]
    inputs = ["--input", str(Path(os.__file__).parent / "http"), "--tokenizer", "store/tokenizer.model"]
    options = ["--validation", "0.3"]
    subprocess.run([*prepare, *inputs, *options], cwd=workplace.folder, env=environment(), check=True)
    workplace.run("run.folder=mixed", MIX)
    ledger = json.loads((workplace.folder / "mixed" / "ledger.json").read_text())["data"]
    assert sum(store["tokens"] for store in ledger.values()) == 40 * 1024
    assert abs(ledger["other"]["tokens"] - 10 * 1024) < 3 * 1024, "a quarter, by chance in so short a run"
    rows = list(records(workplace.folder / "mixed").values())
    for row in rows:
        assert sum(store["tokens"] for store in row["data"].values()) == row["tokens"]
    assert rows[-1]["data"] == ledger
    stopped = workplace.folder / "mixed_stopped"
    workplace.kill_at("train.step 10", "run.folder=mixed_stopped", MIX)
    workplace.run("run.folder=mixed_stopped", MIX)
    assert losses(stopped) == losses(workplace.folder / "mixed")
    assert losses(stopped, "validation.jsonl") == losses(workplace.folder / "mixed", "validation.jsonl")
    changed = MIX.replace("weight=3", "weight=4")
    assert "made by another recipe" in workplace.run("run.folder=mixed", changed, code=65)
