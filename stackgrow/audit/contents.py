"""What the stages hold: checkpoints, records, grown weights and the data, each against what it was sealed with."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackgrow import seal
from stackgrow.audit.report import Look
from stackgrow.data.order import Order
from stackgrow.data.store import StoreError, read_manifest
from stackgrow.growth.rules import Alias
from stackgrow.plan.stages import ImportStage, Stage, TrainStage
from stackgrow.recipe.load import Problem
from stackgrow.recipe.write import canonical_hash
from stackgrow.run_folder.folder import GROWTH, LEDGER, METRICS, PROVENANCE, VALIDATION, RunFolder
from stackgrow.run_folder.lines import iter_records
from stackgrow.run_folder.provenance import data_facts

if TYPE_CHECKING:
    from stackgrow.audit.case import Case

SAMPLED = 4  # files of the token store that are read, unless all are
BLOCK = 1 << 22


def checkpoints(case: Case) -> Look:
    """Every file against its seal, and every tensor against its fingerprint."""
    from stackgrow.checkpoint.grow import marks_of

    count, files, tensors = 0, 0, 0
    for stage in case.plan.stages:
        for path, manifest in case.checkpoints(stage):
            if not stage.imports and manifest["stage_hash"] != case.hashes[stage.name]:
                yield case.within(path), "is of another recipe, or of another stage"
            faults = seal.damage(path, manifest) or _inside(case, stage, path, manifest)
            yield from ((case.within(path), fault) for fault in faults)
            count, files, tensors = count + 1, files + len(manifest["files"]), tensors + len(marks_of(manifest))
        folder = case.folder(stage).checkpoints
        if stage.trains and case.done(stage) and folder.is_dir():
            torn = {p.name for p in folder.iterdir()} - {seal.step_name(n) for n in seal.sealed_steps(folder)}
            yield from ((case.within(folder / name), "has no seal") for name in sorted(torn))
    return f"{count} sealed; {files} files by SHA-256, {tensors} tensors by fingerprint"


def _inside(case: Case, stage: Stage, path: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """What an undamaged checkpoint holds, against its seal and the plan: step, position, shapes and weights."""
    from stackgrow.checkpoint.dcp import is_model_key, read_item, read_metadata, read_tensor, tensor_shapes
    from stackgrow.checkpoint.grow import marks_of
    from stackgrow.seal.tensors import fingerprint

    metadata, due = read_metadata(path), _place(case, stage, path)
    if (stated := {name: manifest[name] for name in due}) != due:
        yield f"its seal states {stated}, and must state {due}"
    if stage.trains:
        items = {"step": "train_state.step", "position": "dataloader.position"}
        if (held := {name: read_item(path, metadata, item) for name, item in items.items()}) != due:
            yield f"holds {held}, and must hold {due}"
    wanted = stage.checkpoint_tensors()
    held = {name: shape for name, (shape, _) in tensor_shapes(metadata).items() if is_model_key(name)}
    if held != wanted or manifest["tensors"].keys() != wanted.keys():
        yield "its tensors are not those of the stage's model"
        return
    for name, mark in marks_of(manifest).items():
        if fingerprint(read_tensor(path, metadata, name)) != mark:
            yield f"{name} is not what was sealed"
    if stage.imports and canonical_hash(manifest["tensors"]) != case.plan.found.get(stage.name):
        yield "holds other weights than those that were taken over"


def _place(case: Case, stage: Stage, path: Path) -> dict[str, Any]:
    """The step of a checkpoint, and the sequences of the data that were consumed by then."""
    if isinstance(stage, TrainStage):
        place = stage.place(int(path.name.removeprefix("step-")))
        return {"step": place["step"], "position": place["position"]}
    if isinstance(stage, ImportStage):
        return {"step": 0, "position": stage.position}
    source, network = case.plan.inputs(stage)
    before = seal.read_seal(case.output(network or source)) if source else None
    return {"step": 0, "position": before and before["position"]}


def records(case: Case) -> Look:
    """Every line as it was when the checkpoint after it was sealed, no step missing or twice, tokens as planned."""
    counts = {METRICS: 0, VALIDATION: 0}
    steady = len({session["recipe_hash"] for session in case.record["sessions"]}) == 1  # in its intervals, too
    for stage in case.plan.train_stages:
        for name in counts:
            file, steps = case.path(stage) / name, list[int]()
            for row in iter_records(file):
                if steps and row["step"] <= steps[-1]:
                    yield case.within(file), f"step {row['step']} follows step {steps[-1]}"
                steps.append(row["step"])
                wrong = [key for key, value in stage.place(row["step"]).items() if row.get(key) != value]
                if name == METRICS and not math.isclose(row["lr"], stage.learning_rate(row["step"]), rel_tol=1e-6):
                    wrong.append("lr")
                if wrong:
                    yield case.within(file), f"step {row['step']}: {', '.join(wrong)} is not what the plan has"
            counts[name] += len(steps)
            if steady and case.done(stage) and (missing := sorted(_logged(case, stage, name) - set(steps))):
                yield case.within(file), f"steps {missing[:5]} are missing"
    yield from _as_sealed(case)
    return f"{counts[METRICS]} of metrics, {counts[VALIDATION]} of validation, each as it was sealed"


def _logged(case: Case, stage: TrainStage, name: str) -> set[int]:
    """The steps that the recipe writes down, whatever happens at others."""
    recipe = case.plan.recipe
    if name == METRICS:
        ending = [step for step in range(1, stage.steps) if stage.until and stage.until.looks_at(step)]
        return {1, stage.steps, *ending, *range(0, stage.steps, stage.every(recipe.log.interval))} - {0}
    if not recipe.validation.sequences:
        return set()
    return {0, stage.steps, *range(0, stage.steps, stage.every(recipe.validation.interval))}


def _as_sealed(case: Case) -> Iterator[Problem]:
    for stage in case.plan.own_stages:
        names = (METRICS, VALIDATION) if stage.trains else (GROWTH,)
        for name in names:
            file = case.path(stage) / name
            for path, manifest in case.checkpoints(stage):
                stated = manifest.get("records", {}).get(name, {"bytes": 0, "sha256": "not stated"})
                if _prefix_hash(file, stated["bytes"]) != stated["sha256"]:
                    yield case.within(file), f"is not what it was when {path.name} was sealed: edited, or cut"
                    break
                if path == case.output(stage) and file.stat().st_size != stated["bytes"]:
                    yield case.within(file), f"was added to after {path.name} was sealed"


def _prefix_hash(file: Path, size: int) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while size > 0 and (block := stream.read(min(size, BLOCK))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()


def growth(case: Case) -> Look:
    """Every grown tensor made again from its source, and compared with what was sealed and written down."""
    from stackgrow.checkpoint.convert import computed
    from stackgrow.checkpoint.grow import marks_of, rules_of
    from stackgrow.seal.tensors import fingerprint

    count = 0
    for stage in case.plan.growths:
        if not case.done(stage):
            continue
        source, network = (case.output(s) if s else None for s in case.plan.inputs(stage))
        record = seal.read_json(case.path(stage) / GROWTH)
        before, after = (seal.read_seal(path) if path else None for path in (source, case.output(stage)))
        if source is None or before is None or after is None or record is None:
            yield stage.name, "its source or its result is not there any more"
            continue
        rules = rules_of(stage, network)
        made = {n: marks_of(before)[rule.source] for n, rule in rules.targets.items() if isinstance(rule, Alias)}
        made |= {name: fingerprint(tensor) for name, tensor in computed(source, rules)}
        for where, stated in ((case.output(stage), marks_of(after)), (case.path(stage) / GROWTH, marks_of(record))):
            if wrong := sorted(n for n in made.keys() | stated.keys() if made.get(n) != stated.get(n)):
                yield case.within(where), f"{len(wrong)} of {len(made)} tensors are not what grows, first {wrong[0]}"
        if record["source"]["stage_hash"] != before["stage_hash"]:
            yield case.within(case.path(stage) / GROWTH), "names another source"
        marks = {"input": seal.manifest_hash(source), "output": seal.manifest_hash(case.output(stage))}
        noted = [s["stages"][stage.name] for s in case.record["sessions"] if stage.name in s.get("stages", {})]
        if not noted or any(n[key] != mark for n in noted for key, mark in marks.items()):
            yield PROVENANCE, f"has other hashes for {stage.name}"
        count += len(made)
    return f"{count} tensors made again from their sources"


def data(case: Case, full: bool) -> Look:
    """The token stores against the hashes that the run has of them; their files whole, or a few of them."""
    recipe, stated = case.plan.recipe, case.record["data"]
    stores = [Path(path) for path, _ in recipe.data.stores]
    if case.data_from_recipe and (far := [str(p) for p in stores if p.is_absolute() or ".." in p.parts]):
        return f"not checked: {', '.join(far)} leaves the working directory; name every store with --data"
    try:
        manifests = [read_manifest(store) for store in stores]
        order = Order(manifests, [weight for _, weight in recipe.data.stores], recipe.data.seq_len, recipe.seed)
    except StoreError as error:
        if not case.data_from_recipe:
            yield "data", str(error)
        return f"not checked: {error}"
    found = data_facts(case.plan, order)
    for name in ("manifest_hash", "validation_hash", "tokenizer_sha256"):
        if stated[name] != found[name]:
            yield ", ".join(map(str, stores)), f"its {name} is not the run's"
    if ledger := seal.read_json(RunFolder(case.run).ledger_file):
        gave, due = (list(seen.values()) for seen in (ledger["data"], order.seen(case.plan.sequences)))
        if gave != due:
            yield LEDGER, f"states {gave} of the stores, the order of the data gives {due}"
    files: dict[Path, str] = {}
    for manifest in manifests:
        shards = [shard for split in manifest.splits.values() for shard in split.shards]
        files |= {manifest.folder / shard.file: shard.sha256 for shard in shards}
        files[manifest.folder / manifest.tokenizer] = manifest.tokenizer_sha256
    chosen = sorted(files) if full else random.sample(sorted(files), min(SAMPLED, len(files)))
    for file in chosen:
        if not file.is_file() or seal.file_records(file.parent, [file.name])[file.name]["sha256"] != files[file]:
            yield str(file), "is damaged or missing"
    return f"{', '.join(map(str, stores))}: {len(chosen)} of {len(files)} files read"
