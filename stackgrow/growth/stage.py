"""A grow stage of a run: a sealed checkpoint in, a sealed checkpoint and growth.json out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stackgrow import seal
from stackgrow.growth import convert
from stackgrow.growth.depth import depth_rules
from stackgrow.growth.rules import Alias, Rules
from stackgrow.plan import GrowStage


def grow(stage: GrowStage, stage_hash: str, source: Path, target: Path) -> str:
    """Grows checkpoint ``source`` into ``target`` and returns a line that says so; one rank calls this.

    Whatever an interrupted attempt left is moved aside and the growth done again: it is a function of its source.
    """
    if seal.read_seal(target) is not None:
        return f"{stage.name}  grown before"
    if target.exists():
        seal.move_to_quarantine(target)
    rules = depth_rules(stage.layer_map, stage.source, stage.target)
    record = convert.grow_checkpoint(source, target, rules)
    _seal_grown(stage, stage_hash, source, target, rules, record)
    return (
        f"{stage.name}  {stage.operator} {stage.source.n_layers} -> {stage.target.n_layers} layers in "
        f"{1000 * record['seconds']:.0f} ms, {record['bytes_written']} bytes written"
    )


def _seal_grown(
    stage: GrowStage, stage_hash: str, source: Path, target: Path, rules: Rules, record: dict[str, Any]
) -> None:
    """A linked file is the source's own, so its SHA-256 is known; an aliased tensor has its source's fingerprint,
    which the next stage must find again in what it loads."""
    before = seal.read_seal(source)
    assert before is not None, "run.py hands over sealed checkpoints only"
    tensors = {name: before["tensors"][r.source] for name, r in rules.targets.items() if isinstance(r, Alias)}
    growth = {
        "operator": stage.operator,
        "layer_map": list(stage.layer_map),
        "source": {
            "checkpoint": str(source),
            "stage_hash": before["stage_hash"],
            "position": before["position"],
        },
        **record,
        "tensors": tensors,
    }
    seal.write_json(target.parent / "growth.json", growth)
    linked = {name: before["files"][name] for name in record["linked_files"]}
    fresh = [name for name in seal.contents(target) if name not in linked]
    facts = {"step": 0, "position": before["position"], "stage_hash": stage_hash, "tensors": tensors}
    seal.seal(target, linked | seal.file_records(target, fresh), facts)
