"""Every file of a run, and the one place where its name is spelled.

runs/NAME/                     RunFolder
  recipe.toml  provenance.json  requirements.lock  ledger.json  run.lock  report.html  eval/  logs/
  stage-0-train-2L/            StageFolder
    stage.json  found.json  growth.json  metrics.jsonl  validation.jsonl  tb/  DONE  extended.json
    checkpoint/step-N/         of a train stage; a grow stage has its one checkpoint in checkpoint/ itself
    quarantine/                what was torn or damaged, moved aside
    ended-at-N/                what stood here when the stage ended with step N, before it was extended: a StageFolder
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackgrow import seal
from stackgrow.errors import DamagedError
from stackgrow.plan.stages import Stage

RECIPE = "recipe.toml"
PROVENANCE = "provenance.json"
REQUIREMENTS = "requirements.lock"
LEDGER = "ledger.json"
LOCK = "run.lock"
REPORT = "report.html"
EVAL = "eval"
LOGS = "logs"

STAGE_FILE = "stage.json"
FOUND = "found.json"
EXTENDED = "extended.json"
GROWTH = "growth.json"
METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"
TENSORBOARD = "tb"
CHECKPOINT = "checkpoint"
QUARANTINE = seal.QUARANTINE
DONE = "DONE"


@dataclass(frozen=True)
class StageFolder:
    """The folder of one stage: ``stage-2-train-8L``."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def index(self) -> int | None:
        """The stage's place in the plan, from its folder's name; None for a folder that no plan has made."""
        match = re.match(r"stage-([0-9]{1,6})-", self.name)
        return int(match[1]) if match else None

    @property
    def run(self) -> RunFolder:
        """The run that the stage belongs to."""
        return RunFolder(self.path.parent)

    @property
    def stage_file(self) -> Path:
        return self.path / STAGE_FILE

    @property
    def found_file(self) -> Path:
        return self.path / FOUND

    @property
    def extended_file(self) -> Path:
        return self.path / EXTENDED

    def ended_at(self, step: int) -> StageFolder:
        """What is kept of the end with ``step`` that the stage had before it was extended, if it was."""
        return StageFolder(self.path / f"ended-at-{step}")

    @property
    def results(self) -> Path:
        """In ``ended_at``: the benchmark results of checkpoints that were taken out of the way."""
        return self.path / EVAL

    @property
    def growth_file(self) -> Path:
        return self.path / GROWTH

    @property
    def metrics_file(self) -> Path:
        return self.path / METRICS

    @property
    def validation_file(self) -> Path:
        return self.path / VALIDATION

    def record_file(self, name: str) -> Path:
        """METRICS, VALIDATION or GROWTH: what the seal of a checkpoint states the hash of."""
        return self.path / name

    @property
    def tensorboard(self) -> Path:
        return self.path / TENSORBOARD

    @property
    def done_file(self) -> Path:
        return self.path / DONE

    @property
    def checkpoints(self) -> Path:
        """Where a train stage's steps lie; of a grow stage, the checkpoint itself."""
        return self.path / CHECKPOINT

    @property
    def quarantine(self) -> Path:
        return self.path / QUARANTINE

    def set_aside(self) -> list[Path]:
        """What lies in quarantine, by name."""
        return sorted(_matching(self.quarantine, "*"))

    def checkpoint(self, step: int) -> Path:
        """The checkpoint that a train stage saves after ``step``, whether it is there or not."""
        return self.checkpoints / seal.step_name(step)

    def sealed_steps(self) -> list[int]:
        """The steps of a train stage whose checkpoints are complete, ascending."""
        return seal.sealed_steps(self.checkpoints)

    def output(self, stage: Stage) -> Path:
        """The checkpoint that ``stage``, whose folder this is, hands on."""
        if stage.output_step is None:
            return self.checkpoints
        return self.checkpoint(stage.output_step)

    def done(self) -> dict[str, Any] | None:
        """What DONE states; None while the stage is not finished."""
        return seal.read_json(self.done_file)

    def is_done(self) -> bool:
        return self.done_file.is_file()

    def final_checkpoint(self) -> Path:
        """The checkpoint that a finished stage hands on.

        Raises:
            DamagedError: it is gone or its manifest is not the one that DONE names.
        """
        done = self.done()
        if done is None:
            raise DamagedError(f"{self.path} is not finished: it has no {DONE}")
        path = self.path / str(done.get("checkpoint"))
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise DamagedError(
                f"{self.done_file} names a checkpoint outside of its stage, {path}; restore it"
            )
        if seal.read_seal(path) is None:
            raise DamagedError(
                f"{path} is missing, though {self.done_file} names it; restore it or remove {DONE}"
            )
        if seal.manifest_hash(path) != done.get("manifest_sha256"):
            raise DamagedError(
                f"{path / seal.MANIFEST} is not the one that {self.done_file} names; restore it"
            )
        return path


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    path: Path

    @property
    def recipe_file(self) -> Path:
        return self.path / RECIPE

    @property
    def provenance_file(self) -> Path:
        return self.path / PROVENANCE

    @property
    def requirements_file(self) -> Path:
        return self.path / REQUIREMENTS

    @property
    def ledger_file(self) -> Path:
        return self.path / LEDGER

    @property
    def lock_file(self) -> Path:
        return self.path / LOCK

    @property
    def report_file(self) -> Path:
        return self.path / REPORT

    @property
    def eval(self) -> Path:
        """The folder of benchmark results."""
        return self.path / EVAL

    @property
    def logs(self) -> Path:
        return self.path / LOGS

    def log_file(self, rank: int, verb: str = "") -> Path:
        """The log of one rank; ``verb`` keeps that of a tool apart from that of the run."""
        prefix = f"{verb}-" if verb else ""
        return self.logs / f"{prefix}rank-{rank}.log"

    @property
    def alerts_log(self) -> Path:
        """What the command of run.on_event prints."""
        return self.logs / "on_event.log"

    def eval_file(self, checkpoint: str, limit: int = 0) -> Path:
        """The benchmark results of a checkpoint. A try on a few examples has a file of its own: it replaces no result,
        and none replaces it."""
        suffix = f"-limit-{limit}" if limit else ""
        return self.eval / f"{checkpoint}{suffix}.json"

    def eval_files(self) -> list[Path]:
        """The benchmark results that are there, by name."""
        return sorted(_matching(self.eval, "*.json"))

    def stage(self, name: str) -> StageFolder:
        return StageFolder(self.path / name)

    def stages(self) -> list[StageFolder]:
        """The stage folders that are there, in the order of the plan; what only looks like one comes last."""

        def place(folder: StageFolder) -> tuple[bool, int, str]:
            return folder.index is None, folder.index or 0, folder.name

        folders = [StageFolder(path) for path in _matching(self.path, "stage-*")]
        return sorted(folders, key=place)

    def provenance(self) -> dict[str, Any]:
        """What provenance.json holds; {} where there is none.

        Raises:
            DamagedError: it does not list sessions.
        """
        record = self.stated_provenance()
        sessions, data = record.get("sessions", []), record.get("data", {})
        lists_sessions = isinstance(sessions, list) and all(
            isinstance(session, dict) for session in sessions
        )
        if not lists_sessions or not isinstance(data, dict):
            raise DamagedError(
                f"{self.provenance_file} is damaged: it lists no sessions; restore it"
            )
        return record

    def stated_provenance(self) -> dict[str, Any]:
        """The same, whatever a stranger's file holds: for who shows it, and checks each value."""
        return seal.read_json(self.provenance_file) or {}

    def holds_records_only(self) -> bool:
        """Whether this is what was kept of a run without its checkpoints, as in recipes/experiments/results."""
        has_more = any(
            stage.is_done() or stage.checkpoints.exists() for stage in self.stages()
        )
        return "kept" in self.stated_provenance() and not has_more

    def data_hash(self) -> str:
        """The hash of the data that the run was begun with; "" where nothing is written down yet."""
        data = self.stated_provenance().get("data")
        if not isinstance(data, dict):
            return ""
        return str(data.get("manifest_hash", ""))


def _matching(folder: Path, pattern: str) -> list[Path]:
    """What lies in ``folder`` under names like ``pattern``; [] where there is no such folder. One that may not be read
    is an error: Path.glob would find nothing in it."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.match(pattern)]


def run_of(path: Path) -> Path | None:
    """The run that a checkpoint at ``path`` lies in, or that ``path`` itself is."""
    for folder in (path, *path.absolute().parents[:4]):
        if RunFolder(folder).recipe_file.is_file():
            return folder
    return None
