"""A finished stage's model and moments are freed before the next stage's are made: on a GPU both would not fit."""

from pathlib import Path

from launch import Workplace, environment
from warm import Warm

SCRIPT = """
import sys, weakref
from stackgrow.run import engine
from stackgrow.titan.trainer import StageTrainer
plain, models = StageTrainer.__init__, []
def build(self, job):
    print("alive", sum(model() is not None for model in models))
    plain(self, job)
    models.append(weakref.ref(self.model_parts[0]))
StageTrainer.__init__ = build
engine.run("tiny.toml", sys.argv[1:])
"""


def test_the_base_is_gone_when_the_target_is_built(
    workplace: Workplace, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    sets = [
        f"run.folder={tmp_path}/run",
        "budget.tokens=4Ki",
        "growth[0].timing=2 steps",
        "train.warmup=0 steps",
    ]
    process = Warm(tmp_path / "script.py", sets, workplace.folder, environment())
    assert process.wait(300) == 0, process.output()
    assert [
        line for line in process.output().splitlines() if line.startswith("alive")
    ] == ["alive 0", "alive 0"]
