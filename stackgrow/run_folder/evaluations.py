"""Benchmark results of a run: a JSON file per checkpoint in eval/, sealed by a hash of all that it states, among it the
hash of the weights that were evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stackgrow import seal
from stackgrow.errors import DamagedError
from stackgrow.recipe.write import canonical_hash

SEAL = "sha256"


def weights_hash(fingerprints: Mapping[str, str]) -> str:
    """Of a model, by the fingerprints of its tensors, as a checkpoint's seal states them."""
    return canonical_hash(dict(fingerprints))


def write_evaluation(file: Path, record: Mapping[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    seal.sync_folder(file.parent.parent)
    seal.write_json(file, {**record, SEAL: canonical_hash(dict(record))})


def read_evaluation(file: Path) -> dict[str, Any]:
    """The results in ``file``; {} where there is none. They name no ``weights`` where they have no seal.

    Raises:
        DamagedError: they are not what was written.
    """
    record = seal.read_json(file)
    if record is None:
        return {}
    stated = record.pop(SEAL, None)
    if stated is None:  # an earlier version wrote it
        record.pop("weights", None)
    elif stated != canonical_hash(record):
        raise DamagedError(
            f"{file} is not what was written: it was edited, or is damaged; evaluate again"
        )
    return record
