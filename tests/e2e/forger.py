"""Somebody who can write all of a run's folder: changes what it holds, and then computes every hash anew, from the
tensors up to DONE and the sessions. SECURITY.md says what finds that and what does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from stackgrow import seal
from stackgrow.checkpoint.dcp import read_item, read_metadata, read_tensor
from stackgrow.run_folder import provenance
from stackgrow.run_folder.folder import GROWTH, RunFolder, StageFolder
from stackgrow.run_folder.lines import prefix_hash, read_records
from stackgrow.seal.tensors import fingerprint


def leave_out_the_last_steps(stage: StageFolder, trained: int, claimed: int) -> None:
    """The checkpoint after ``trained`` steps is handed on as the one after ``claimed``."""
    facts = _facts(stage.checkpoint(claimed))
    entries = _entries(stage.checkpoint(trained))
    entries["train_state.step"] = facts["step"]
    entries["dataloader.position"] = facts["position"]
    for name in seal.contents(stage.checkpoint(claimed)):
        (stage.checkpoint(claimed) / name).unlink()
    dcp.save(entries, checkpoint_id=stage.checkpoint(claimed), no_dist=True)


def scale_losses(stage: StageFolder, after: int, factor: float) -> None:
    """The training loss of every step after ``after``."""
    lines = []
    for record in read_records(stage.metrics_file):
        if record["step"] > after:
            record["loss"] *= factor
        lines.append(json.dumps(record) + "\n")
    stage.metrics_file.write_text("".join(lines), encoding="utf-8")


def claim_another_machine(run: RunFolder) -> None:
    """One that nobody has, so that a tolerance is granted."""
    record = run.provenance()
    hardware = record["sessions"][0]["hardware"]
    hardware["cpu"] = "another"
    hardware["cpu_capability"] = "OTHER"
    seal.write_json(run.provenance_file, record)


def compute_every_hash(run: RunFolder) -> None:
    """Of a finished run of one session: seals, DONE, and what the session tells of its growths."""
    record = run.provenance()
    (session,) = record["sessions"]
    identity = provenance.identity(session)
    handed_on: Path | None = None
    for stage in run.stages():
        done = stage.done()
        assert done is not None
        for step in stage.sealed_steps():
            _seal(stage.checkpoint(step), stage, identity)
        output = stage.path / done["checkpoint"]
        if stage.growth_file.is_file():
            assert handed_on is not None
            _seal(output, stage, identity)
            noted = session["stages"][stage.name]
            noted["input"] = seal.manifest_hash(handed_on)
            noted["output"] = seal.manifest_hash(output)
        done["manifest_sha256"] = seal.manifest_hash(output)
        seal.write_json(stage.done_file, done)
        handed_on = output
    seal.write_json(run.provenance_file, record)


def _seal(checkpoint: Path, stage: StageFolder, session: str) -> None:
    facts = _facts(checkpoint)
    metadata = read_metadata(checkpoint)
    for table in ("tensors", "moments"):
        for name in facts.get(table, {}):
            tensor = read_tensor(checkpoint, metadata, name)
            facts[table][name] = fingerprint(tensor)
    for name in facts["records"]:
        file = stage.record_file(name)
        size = _bytes_up_to(file, facts["step"])
        facts["records"][name] = {"bytes": size, "sha256": prefix_hash(file, size)}
    facts["session"] = session
    names = seal.contents(checkpoint)
    seal.seal(checkpoint, seal.file_records(checkpoint, names), facts)


def _facts(checkpoint: Path) -> dict[str, Any]:
    """What a seal states beside its files."""
    manifest = seal.read_seal(checkpoint)
    assert manifest is not None
    return {name: value for name, value in manifest.items() if name != "files"}


def _entries(checkpoint: Path) -> dict[str, Any]:
    """All that a checkpoint holds."""
    metadata = read_metadata(checkpoint)
    entries: dict[str, Any] = {}
    for name, kind in metadata.state_dict_metadata.items():
        is_tensor = isinstance(kind, TensorStorageMetadata)
        read = read_tensor if is_tensor else read_item
        entries[name] = read(checkpoint, metadata, name)
    return entries


def _bytes_up_to(file: Path, step: int) -> int:
    content = file.read_bytes()
    if file.name == GROWTH:
        return len(content)
    lines = content.splitlines(keepends=True)
    return sum(len(line) for line in lines if json.loads(line)["step"] <= step)
