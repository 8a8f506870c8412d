"""A grow stage of a run: a sealed checkpoint in, a sealed checkpoint and growth.json out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from stackgrow import seal
from stackgrow.checkpoint import convert
from stackgrow.checkpoint.dcp import is_model_key
from stackgrow.checkpoint.verified import read_sealed
from stackgrow.growth import own
from stackgrow.growth.learned import HyperNetwork
from stackgrow.growth.learned_shapes import matrix_names, shapes
from stackgrow.growth.moments import with_moments
from stackgrow.growth.noise import noisy_rules
from stackgrow.growth.operators import growth_rules, operator_named, settings_of
from stackgrow.growth.rules import Alias, Moment, Rules
from stackgrow.plan.stages import GrowStage
from stackgrow.recipe.keys import Model
from stackgrow.run_folder.folder import StageFolder


def grow(
    stage: GrowStage,
    stage_hash: str,
    source: Path,
    target: Path,
    *,
    network: Path | None = None,
    session: str = "",
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], object] = lambda: None,
) -> str:
    """Grows checkpoint ``source`` into ``target``, all ranks together, and returns a line that says so.

    ``network`` is the checkpoint of the maps that "learn" folds in.
    Whatever an interrupted attempt left is moved aside and the growth done again: it is a function of its source.
    """
    before = seal.read_seal(source)
    assert before is not None, "run.py hands over sealed checkpoints only"
    rules = rules_of(stage, network)
    fingerprints = fingerprints_of(before)
    _refuse_unsealed_sources(source, rules, fingerprints)

    if rank == 0:
        if target.exists():
            seal.move_to_quarantine(target)
        convert.begin(source, target, rules)
    barrier()
    convert.write_part(source, target, rules, rank, world_size, fingerprints)
    barrier()
    line = ""
    if rank == 0:
        record = convert.commit(source, target, rules, world_size)
        line = f"{stage.name}  {stage.operator} {stage.change}, {record['bytes_written']} bytes written"
        growth = growth_record(stage, source, before, rules, record)
        facts = {}
        learned = seal.read_seal(network) if network is not None else None
        if learned is not None:
            # The maps were trained on data that the source has not seen: the data go on from there.
            facts["position"] = learned["position"]
            growth["network"] = {
                "checkpoint": str(network),
                "stage_hash": learned["stage_hash"],
                **facts,
            }
        growth_file = StageFolder(target.parent).growth_file
        seal.write_json(growth_file, growth)
        records = seal.file_records(growth_file.parent, [growth_file.name])
        seal_grown(
            target,
            stage_hash,
            before,
            growth,
            session=session,
            records=records,
            **facts,
        )
    barrier()
    return line


def _refuse_unsealed_sources(
    source: Path, rules: Rules, fingerprints: Mapping[str, str]
) -> None:
    needed: set[str] = set()
    for rule in rules.targets.values():
        needed.update(rule.sources)
    unknown = needed - fingerprints.keys()
    if unknown:
        raise convert.CheckpointError(
            f"{source}: its seal has no fingerprint of {min(unknown)}; train its stage again"
        )


def rules_of(stage: GrowStage, network: Path | None = None) -> Rules:
    """The rule of every target tensor of a stage."""
    learned = None
    if network is not None:
        learned = read_network(network, stage.source, stage.target, stage.maps)

    def rules(moment: Moment | None = None) -> Rules:
        """Of the weights, or of one of AdamW's moments."""
        made = growth_rules(
            stage.operator,
            stage.source,
            stage.target,
            stage.layer_map,
            stage.seed,
            network=learned,
            moment=moment,
            **settings_of(stage),
        )
        if stage.noise:
            made = noisy_rules(
                made, stage.target.n_layers, stage.noise, stage.seed, moment
            )
        return made

    if stage.optimizer:
        return with_moments(rules, stage.optimizer == "asymmetric")
    return rules()


def fingerprints_of(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The fingerprint of every tensor in a sealed checkpoint, the optimizer's included."""
    return {**manifest["tensors"], **manifest.get("moments", {})}


def growth_record(
    stage: GrowStage,
    source: Path,
    before: Mapping[str, Any],
    rules: Rules,
    record: dict[str, Any],
) -> dict[str, Any]:
    """growth.json; ``before`` is the source's manifest, ``record`` what convert.commit returned.

    An aliased tensor has its source's fingerprint. The next stage must find every fingerprint again in what it loads.
    """
    before_fingerprints = fingerprints_of(before)
    fingerprints = {}
    for name, rule in rules.targets.items():
        if isinstance(rule, Alias):
            fingerprints[name] = before_fingerprints[rule.source]
    fingerprints.update(record.pop("fingerprints"))
    tensors = {}
    moments = {}
    for name, value in fingerprints.items():
        if is_model_key(name):
            tensors[name] = value
        else:
            moments[name] = value

    source_facts = {
        "checkpoint": str(source),
        "stage_hash": before["stage_hash"],
        "position": before["position"],
    }
    if "source" in before:  # of an import
        source_facts["files"] = before["source"]["files"]
    growth = {
        "operator": stage.operator,
        "layer_map": list(stage.layer_map) if stage.layer_map else None,
        "noise": stage.noise,
        "optimizer": stage.optimizer or "reset",
        "seed": stage.seed,
        "source": source_facts,
        **record,
        "tensors": tensors,
    }
    if moments:
        growth["moments"] = moments
    for name, value in settings_of(stage).items():
        if name in operator_named(stage.operator).keys:
            growth[name] = value
    if own.is_own(stage.operator):
        growth["operator_file_sha256"] = own.file_hash(stage.operator)
    return growth


def growth_sentence(stage: GrowStage) -> str:
    """A growth in words, as a model card tells it."""
    sentence = f"Grown by `{stage.operator}`: {stage.change}"
    if stage.layer_map:
        sentence += (
            f"; source layer of each layer: {' '.join(map(str, stage.layer_map))}"
        )
    if stage.noise:
        sentence += f"; noise {stage.noise:g}"
    return sentence + "."


def seal_grown(
    target: Path,
    stage_hash: str,
    before: Mapping[str, Any],
    growth: Mapping[str, Any],
    **facts: Any,
) -> None:
    """Seals a grown checkpoint. A linked file is the source's own: where that is sealed, its SHA-256 is known."""
    records = {}
    for name in growth["linked_files"]:
        if name in before["files"]:
            records[name] = before["files"][name]
    fresh = [name for name in seal.contents(target) if name not in records]
    records.update(seal.file_records(target, fresh))

    stated = {"step": 0, "position": before["position"], "stage_hash": stage_hash}
    for name in ("tensors", "moments"):
        if name in growth:
            stated[name] = growth[name]
    stated.update(facts)
    seal.seal(target, records, stated)


def read_network(
    checkpoint: Path, source: Model, target: Model, maps: str = "paper"
) -> HyperNetwork:
    """The matrices in a learn stage's sealed checkpoint. Raises DamagedError where one is not what was sealed."""
    names = matrix_names(shapes(source, target, maps))
    parts: dict[str, dict[str, Tensor]] = {"widths": {}, "depths": {}}
    for stored, tensor in read_sealed(checkpoint, names).items():
        part, name = names[stored]
        parts[part][name] = tensor
    return HyperNetwork(**parts)
