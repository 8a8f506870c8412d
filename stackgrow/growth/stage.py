"""A grow stage of a run: a sealed checkpoint in, a sealed checkpoint and growth.json out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from stackgrow import seal
from stackgrow.growth import convert
from stackgrow.growth.noise import noisy_rules
from stackgrow.growth.operators import growth_rules
from stackgrow.growth.rules import Alias, Rules
from stackgrow.plan import GrowStage


def grow(
    stage: GrowStage,
    stage_hash: str,
    source: Path,
    target: Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], object] = lambda: None,
) -> str:
    """Grows checkpoint ``source`` into ``target``, all ranks together, and returns a line that says so.

    Whatever an interrupted attempt left is moved aside and the growth done again: it is a function of its source.
    """
    done = seal.read_seal(target) is not None
    barrier()  # before rank 0 changes what the others look at
    if done:
        return f"{stage.name}  grown before"
    rules = rules_of(stage)
    if rank == 0:
        if target.exists():
            seal.move_to_quarantine(target)
        convert.begin(source, target, rules)
    barrier()
    convert.write_part(source, target, rules, rank, world_size)
    barrier()
    line = ""
    if rank == 0:
        record = convert.commit(source, target, rules, world_size)
        _seal_grown(stage, stage_hash, source, target, rules, record)
        line = f"{stage.name}  {stage.operator} {stage.change}, {record['bytes_written']} bytes written"
    barrier()
    return line


def rules_of(stage: GrowStage) -> Rules:
    """The rule of every target tensor of a stage."""
    rules = growth_rules(stage.operator, stage.source, stage.target, stage.layer_map, stage.seed)
    return noisy_rules(rules, stage.target.n_layers, stage.noise, stage.seed) if stage.noise else rules


def _seal_grown(
    stage: GrowStage, stage_hash: str, source: Path, target: Path, rules: Rules, record: dict[str, Any]
) -> None:
    """A linked file is the source's own, so its SHA-256 is known; an aliased tensor has its source's fingerprint.
    The next stage must find every fingerprint again in what it loads."""
    before = seal.read_seal(source)
    assert before is not None, "run.py hands over sealed checkpoints only"
    aliased = {name: before["tensors"][r.source] for name, r in rules.targets.items() if isinstance(r, Alias)}
    tensors = aliased | record.pop("fingerprints")
    growth = {
        "operator": stage.operator,
        "layer_map": list(stage.layer_map) if stage.layer_map else None,
        "noise": stage.noise,
        "seed": stage.seed,
        "source": {"checkpoint": str(source), "stage_hash": before["stage_hash"], "position": before["position"]},
        **record,
        "tensors": tensors,
    }
    seal.write_json(target.parent / "growth.json", growth)
    linked = {name: before["files"][name] for name in record["linked_files"]}
    fresh = [name for name in seal.contents(target) if name not in linked]
    facts = {"step": 0, "position": before["position"], "stage_hash": stage_hash, "tensors": tensors}
    seal.seal(target, linked | seal.file_records(target, fresh), facts)
