"""Whether a run's records still are what its newest checkpoints were sealed with: cheap enough for every page and
table that is made of them."""

from __future__ import annotations

from collections.abc import Iterator

from stackgrow import seal
from stackgrow.run_folder.folder import METRICS, VALIDATION, RunFolder, StageFolder
from stackgrow.run_folder.lines import prefix_hash


def edited_records(run: RunFolder) -> list[str]:
    """A line for each file of records that is not what was sealed; [] also where no checkpoint that says is kept."""
    lines: list[str] = []
    for stage in run.stages():
        lines += _edited(stage)
    return lines


def _edited(stage: StageFolder) -> Iterator[str]:
    steps = stage.sealed_steps()
    if not steps:
        return
    checkpoint = stage.checkpoint(steps[-1])
    sealed = (seal.read_seal(checkpoint) or {}).get("records", {})
    for name in (METRICS, VALIDATION):
        if name not in sealed:
            continue
        file = stage.record_file(name)
        size = sealed[name]["bytes"]
        where = f"{stage.name}/{name}"
        if not file.is_file():
            if size:
                yield f"{where} is missing, which {checkpoint.name} was sealed with"
        elif prefix_hash(file, size) != sealed[name]["sha256"]:
            yield f"{where} is not what {checkpoint.name} was sealed with: edited, or cut"
        elif stage.is_done() and file.stat().st_size != size:
            yield f"{where} was added to after {checkpoint.name} was sealed, the stage's last"
