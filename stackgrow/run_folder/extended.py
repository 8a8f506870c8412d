"""A stage that had ended and goes on to more steps (extended.json): from which checkpoint, and what was there before.

Checkpoints are not sealed anew: those up to the one that is gone on from keep the hash of the stage that made them, and
count as the longer stage's own. What the stage had at its earlier end stays in ``StageFolder.ended_at``. No torch.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackgrow import seal
from stackgrow.errors import DamagedError
from stackgrow.recipe.write import canonical_hash
from stackgrow.run_folder.folder import StageFolder

SEAL = "sha256"


@dataclass(frozen=True)
class Extension:
    """The stage that ended with ``steps`` goes on to ``new_steps`` from its checkpoint of ``from_step``."""

    decided: str  # date and time, UTC
    stage_hash: str
    recipe_hash: str
    steps: int
    new_stage_hash: str
    new_recipe_hash: str
    new_steps: int
    from_step: int
    manifest_sha256: str  # of that checkpoint
    records: dict[str, Any]  # what its seal states of the stage's records
    done_sha256: str  # of the DONE that is kept

    @property
    def hash(self) -> str:
        """By which a session names it."""
        return canonical_hash(dataclasses.asdict(self))

    def __str__(self) -> str:
        return f"{self.steps} -> {self.new_steps} steps, from the checkpoint of step {self.from_step}"


def read_extensions(folder: StageFolder) -> list[Extension]:
    """From the first to the last; the last may be announced only: then stage.json is still the old one.

    Raises:
        DamagedError: the file is not what was written.
    """
    record = seal.read_json(folder.extended_file)
    if record is None:
        return []
    stated = record.pop(SEAL, None)
    try:
        if stated != canonical_hash(record):
            raise TypeError
        return [Extension(**entry) for entry in record["extensions"]]
    except (TypeError, KeyError) as error:
        raise DamagedError(
            f"{folder.extended_file} is not what was written: it was edited, or is damaged; restore it"
        ) from error


def write_extensions(folder: StageFolder, extensions: Sequence[Extension]) -> None:
    record = {"extensions": [dataclasses.asdict(extension) for extension in extensions]}
    seal.write_json(folder.extended_file, {**record, SEAL: canonical_hash(record)})


def that_led_to(folder: StageFolder, stage_hash: str) -> list[Extension]:
    """The extensions by which the stage became the one with ``stage_hash``, from the first; none where it never was
    another. One that was announced and never begun leads nowhere, and is left out."""
    led: list[Extension] = []
    for extension in reversed(read_extensions(folder)):
        if extension.new_stage_hash == stage_hash:
            led.insert(0, extension)
            stage_hash = extension.stage_hash
    return led


def counted_from_before(folder: StageFolder, stage_hash: str) -> dict[str, int]:
    """The hash of every shorter stage that this one was -> the last step whose checkpoint of it counts as this one's
    own."""
    counted: dict[str, int] = {}
    last: int | None = None
    for extension in reversed(that_led_to(folder, stage_hash)):
        last = extension.from_step if last is None else min(last, extension.from_step)
        counted[extension.stage_hash] = last
    return counted


def is_made_by(
    manifest: Mapping[str, Any], stage_hash: str, shorter: Mapping[str, int]
) -> bool:
    """Whether a sealed checkpoint is one that the stage with ``stage_hash`` makes, or made when it was shorter.
    ``shorter``: see ``counted_from_before``."""
    made_by = manifest["stage_hash"]
    if made_by == stage_hash:
        return True
    return bool(manifest["step"] <= shorter.get(made_by, -1))


def is_announced_only(folder: StageFolder, stage_hash: str) -> bool:
    """Whether the extension that leads to ``stage_hash`` was killed before the stage was the longer one."""
    led = that_led_to(folder, stage_hash)
    stored = seal.read_json(folder.stage_file) or {}
    return bool(led) and stored.get("stage_hash") == led[-1].stage_hash


def keep_ended(
    folder: StageFolder, extension: Extension, results: Sequence[Path]
) -> None:
    """Puts what the finished stage has, as far as the extension replaces it, into its own folder: stage.json, DONE,
    records and ``results`` as copies, checkpoints as hard links. It stands there whole, or not at all."""
    ended = folder.ended_at(extension.steps)
    making = StageFolder(ended.path.with_name(ended.path.name + ".tmp"))
    if making.path.is_dir():  # torn
        shutil.rmtree(making.path)
    making.checkpoints.mkdir(parents=True)
    for file in (
        folder.stage_file,
        folder.metrics_file,
        folder.validation_file,
        folder.done_file,
    ):
        if file.is_file():
            seal.copy(file, making.path / file.name)
    if results:
        making.results.mkdir()
    for file in results:
        seal.copy(file, making.results / file.name)
    for step in folder.sealed_steps():
        if step > extension.from_step or step == extension.steps:
            _link_checkpoint(folder.checkpoint(step), making.checkpoint(step))
    for made in (making.results, making.checkpoints, making.path):
        if made.is_dir():
            seal.sync_folder(made)
    if ended.path.is_dir():  # of an extension that was never begun
        shutil.rmtree(ended.path)
    making.path.rename(ended.path)
    seal.sync_folder(folder.path)


def _link_checkpoint(source: Path, target: Path) -> None:
    target.mkdir()
    for file in sorted(source.iterdir()):
        seal.link(file, target / file.name)
    seal.sync_folder(target)
