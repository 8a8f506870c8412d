"""What the stages hold: checkpoints, records, grown weights and the data, each against what it was sealed with."""

from __future__ import annotations

import math
import random
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackgrow import seal
from stackgrow.audit.report import Look, NotChecked, RestsOn
from stackgrow.data.order import Order
from stackgrow.data.store import Manifest, StoreError, read_manifest
from stackgrow.errors import DamagedError
from stackgrow.growth import own
from stackgrow.growth.rules import Alias
from stackgrow.plan.stages import GrowStage, ImportStage, Stage, TrainStage
from stackgrow.recipe.load import Problem
from stackgrow.recipe.write import canonical_hash
from stackgrow.run_folder.evaluations import read_evaluation, weights_hash
from stackgrow.run_folder.folder import GROWTH, LEDGER, METRICS, PROVENANCE, VALIDATION
from stackgrow.run_folder.lines import iter_records, prefix_hash
from stackgrow.run_folder.provenance import data_facts
from stackgrow.text import numbered

if TYPE_CHECKING:
    from stackgrow.audit.case import Case, Sealed

SAMPLED = 4  # files of the token store that are read, unless all are
SAME_RATE = (
    1e-6  # relative: torchtitan multiplies the learning rate's factors in another order
)


def checkpoints(case: Case) -> Look:
    """Every file against its seal, and every tensor against its fingerprint."""
    from stackgrow.checkpoint.grow import fingerprints_of

    count = files = tensors = 0
    for stage in case.plan.stages:
        for checkpoint in case.checkpoints(stage):
            where, manifest = case.within(checkpoint.path), checkpoint.manifest
            if not stage.imports and not case.made(stage, manifest):
                yield where, "is of another recipe, or of another stage"
            faults = seal.damage(checkpoint.path, manifest) or _inside(
                case, stage, checkpoint
            )
            for fault in faults:
                yield where, fault
            count += 1
            files += len(manifest["files"])
            tensors += len(fingerprints_of(manifest))
        if case.done(stage):
            yield from _unsealed(case, stage)
    looked_at = f"{numbered(files, 'file')} by SHA-256, {numbered(tensors, 'tensor')} by fingerprint"
    yield RestsOn(
        f"the seals of {numbered(count, 'checkpoint')}, and what the stages' DONE say of them"
    )
    return f"{count} sealed; {looked_at}"


def _unsealed(case: Case, stage: Stage) -> Iterator[Problem]:
    """A train stage that is finished has nothing but sealed checkpoints; one that was killed may have a torn one."""
    folder = case.folder(stage)
    if not stage.trains or not folder.checkpoints.is_dir():
        return
    sealed = {seal.step_name(step) for step in folder.sealed_steps()}
    for path in sorted(folder.checkpoints.iterdir()):
        if path.name not in sealed:
            yield case.within(path), "has no seal"


def _inside(case: Case, stage: Stage, checkpoint: Sealed) -> Iterator[str]:
    """What an undamaged checkpoint holds, against its seal and the plan: step, position, shapes and weights."""
    from stackgrow.checkpoint.dcp import (
        is_model_key,
        read_item,
        read_metadata,
        read_tensor,
        tensor_shapes,
    )
    from stackgrow.checkpoint.grow import fingerprints_of
    from stackgrow.seal.tensors import fingerprint

    path = checkpoint.path
    manifest = checkpoint.manifest
    metadata = read_metadata(path)

    # Where in the run it is: as its seal states it, and as it holds it for whoever goes on from it.
    due = _due_place(case, stage, path)
    stated = {name: manifest[name] for name in due}
    if stated != due:
        yield f"its seal states {stated}, and must state {due}"
    if stage.trains:
        held = {
            "step": read_item(path, metadata, "train_state.step"),
            "position": read_item(path, metadata, "dataloader.position"),
        }
        if held != due:
            yield f"holds {held}, and must hold {due}"

    # The model's tensors: all of them, no other, in their shapes, and each as it was sealed.
    shapes = {
        name: shape
        for name, (shape, _) in tensor_shapes(metadata).items()
        if is_model_key(name)
    }
    due_shapes = stage.checkpoint_tensors()
    if shapes != due_shapes or manifest["tensors"].keys() != due_shapes.keys():
        yield "its tensors are not those of the stage's model"
        return
    for name, sealed_fingerprint in fingerprints_of(manifest).items():
        if fingerprint(read_tensor(path, metadata, name)) != sealed_fingerprint:
            yield f"{name} is not what was sealed"
    if stage.imports and canonical_hash(manifest["tensors"]) != case.plan.found.get(
        stage.name
    ):
        yield "holds other weights than those that were taken over"


def _due_place(case: Case, stage: Stage, path: Path) -> dict[str, Any]:
    """The step that a checkpoint must state, and the sequences of the data that were consumed by then."""
    if isinstance(stage, TrainStage):
        place = stage.place(seal.step_of(path))
        return {"step": place["step"], "position": place["position"]}
    if isinstance(stage, ImportStage):
        return {"step": 0, "position": stage.position}
    source, network = case.plan.inputs(stage)
    trained_before = network or source
    before = seal.read_seal(case.output(trained_before)) if trained_before else None
    return {"step": 0, "position": before["position"] if before else None}


def records(case: Case) -> Look:
    """Every line as it was when the checkpoint after it was sealed, no step missing or twice, tokens as planned."""
    metrics = validations = 0
    for train_stage in case.plan.train_stages:
        metrics += yield from _lines(case, train_stage, METRICS)
        validations += yield from _lines(case, train_stage, VALIDATION)
    for stage in case.plan.own_stages:
        names = [METRICS, VALIDATION] if stage.trains else [GROWTH]
        for name in names:
            yield from _as_sealed(case, stage, case.folder(stage).record_file(name))
    return f"{metrics} of metrics, {validations} of validation, each as it was sealed"


def kept_records(case: Case) -> Look:
    """Every line against the recipe: steps in order, tokens, FLOPs and learning rate as planned. Losses are in no
    recipe, and the seals that hold what was measured went with the checkpoints."""
    metrics = validations = 0
    for train_stage in case.plan.train_stages:
        metrics += yield from _lines(case, train_stage, METRICS)
        validations += yield from _lines(case, train_stage, VALIDATION)
    yield NotChecked(
        "weights, growth and the losses in the records: the checkpoints, whose seals state them, were not kept"
    )
    return f"{metrics} of metrics, {validations} of validation, each at a step and with tokens that the recipe has"


def _lines(case: Case, stage: TrainStage, name: str) -> Generator[Problem, None, int]:
    """One file of a stage's records against the plan; returns how many there are."""
    file = case.folder(stage).record_file(name)
    where = case.within(file)
    steps: list[int] = []
    try:
        for record in iter_records(file):
            step = record["step"]
            if steps and step <= steps[-1]:
                yield where, f"step {step} follows step {steps[-1]}"
            steps.append(step)
            wrong = [
                key
                for key, value in stage.place(step).items()
                if record.get(key) != value
            ]
            if name == METRICS:
                wrong += _wrong_rates(stage, step, record)
            if wrong:
                yield where, f"step {step}: {', '.join(wrong)} is not what the plan has"
    except DamagedError as error:
        yield where, f"cannot be read further: {error}"
        return len(steps)
    # Of a recipe whose intervals have changed between two sessions it is not known which steps were written down.
    recipes = {session["recipe_hash"] for session in case.record["sessions"]}
    if len(recipes) == 1 and case.done(stage):
        missing = sorted(_due_steps(case, stage, name) - set(steps))
        if missing:
            yield where, f"steps {missing[:5]} are missing"
    return len(steps)


def _wrong_rates(stage: TrainStage, step: int, record: dict[str, Any]) -> Iterator[str]:
    due = {"lr": stage.learning_rate(step)}
    if stage.new_rate:
        due["lr_new"] = stage.new_learning_rate(step)
    for name, rate in due.items():
        if not math.isclose(record[name], rate, rel_tol=SAME_RATE):
            yield name


def _due_steps(case: Case, stage: TrainStage, name: str) -> set[int]:
    """The steps that the recipe writes down, whatever happens at others."""
    recipe = case.plan.recipe
    if name == VALIDATION:
        if not recipe.validation.sequences:
            return set()
        every = range(0, stage.steps, stage.every(recipe.validation.interval))
        return {0, *every, stage.steps}
    if not stage.steps:
        return set()
    interval = stage.every(recipe.log.interval)
    due = {1, *range(interval, stage.steps, interval), stage.steps}
    if stage.until:
        due |= {step for step in range(1, stage.steps) if stage.until.looks_at(step)}
    return due


def _as_sealed(case: Case, stage: Stage, file: Path) -> Iterator[Problem]:
    """A file of records against its size and hash in the seal of every checkpoint."""
    for checkpoint in case.checkpoints(stage):
        name = checkpoint.path.name
        stated = checkpoint.manifest.get("records", {}).get(
            file.name, {"bytes": 0, "sha256": "not stated"}
        )
        if prefix_hash(file, stated["bytes"]) != stated["sha256"]:
            yield (
                case.within(file),
                f"is not what it was when {name} was sealed: edited, or cut",
            )
            return
        if (
            checkpoint.path == case.output(stage)
            and file.stat().st_size != stated["bytes"]
        ):
            yield case.within(file), f"was added to after {name} was sealed"


def growth(case: Case) -> Look:
    """Every grown tensor made again from its source, and compared with what was sealed and written down."""
    count = 0
    skipped = []
    for stage in case.plan.growths:
        if not case.done(stage):
            continue
        if own.is_own(stage.operator) and not own.trusted():
            skipped.append(stage)
        else:
            count += yield from _one_growth(case, stage)
    line = f"{numbered(count, 'tensor')} made again from their sources"
    for stage in skipped:
        line += f"; {stage.name} not: {stage.operator} is code, which runs with --trust alone"
        yield NotChecked(
            f"growth: {stage.name}, whose operator {stage.operator} is code, which runs with --trust alone"
        )
    return line


def _one_growth(case: Case, stage: GrowStage) -> Generator[Problem, None, int]:
    """Returns the number of tensors that were made again."""
    from stackgrow.checkpoint.grow import fingerprints_of

    source_stage, network_stage = case.plan.inputs(stage)
    source = case.output(source_stage) if source_stage else None
    network = case.output(network_stage) if network_stage else None
    output = case.output(stage)
    growth_file = case.folder(stage).growth_file
    before = seal.read_seal(source) if source else None
    after = seal.read_seal(output)
    record = seal.read_json(growth_file)
    if source is None or before is None or after is None or record is None:
        yield stage.name, "its source or its result is not there any more"
        return 0

    # Made again, and compared with what the result's seal and growth.json state.
    made = _made_again(stage, source, before, network)
    for path, stated in (
        (output, fingerprints_of(after)),
        (growth_file, fingerprints_of(record)),
    ):
        wrong = sorted(
            name
            for name in made.keys() | stated.keys()
            if made.get(name) != stated.get(name)
        )
        if wrong:
            yield (
                case.within(path),
                f"{len(wrong)} of {len(made)} tensors are not what grows, first {wrong[0]}",
            )

    # Which source it was: growth.json and the sessions name it.
    if record["source"]["stage_hash"] != before["stage_hash"]:
        yield case.within(growth_file), "names another source"
    if not _noted(case, stage, source, output):
        yield PROVENANCE, f"has other hashes for {stage.name}"
    return len(made)


def _made_again(
    stage: GrowStage, source: Path, before: Mapping[str, Any], network: Path | None
) -> dict[str, str]:
    """The fingerprints of all tensors that grow from the sealed checkpoint ``source``. What an operator leaves as it
    is has its source's."""
    from stackgrow.checkpoint.convert import computed
    from stackgrow.checkpoint.grow import fingerprints_of, rules_of
    from stackgrow.seal.tensors import fingerprint

    rules = rules_of(stage, network)
    source_fingerprints = fingerprints_of(before)
    made = {}
    for name, rule in rules.targets.items():
        if isinstance(rule, Alias):
            made[name] = source_fingerprints[rule.source]
    for name, tensor in computed(source, rules):
        made[name] = fingerprint(tensor)
    return made


def _noted(case: Case, stage: GrowStage, source: Path, output: Path) -> bool:
    """Whether the sessions that have grown it name what went in and what came out."""
    hashes = {"input": seal.manifest_hash(source), "output": seal.manifest_hash(output)}
    notes = []
    for session in case.record["sessions"]:
        stages = session.get("stages", {})
        if stage.name in stages:
            notes.append(stages[stage.name])
    return bool(notes) and all(
        note[key] == hashes[key] for note in notes for key in hashes
    )


def evaluations(case: Case) -> Look:
    """Every file of benchmark results against its own seal, and the weights that it is of against their checkpoint."""
    count = compared = 0
    for file in case.run.eval_files():
        record = read_evaluation(file)
        count += 1
        weights = _weights_evaluated(case, record)
        if "weights" not in record:
            yield NotChecked(
                f"eval: {file.name}, which has no seal, as an earlier version wrote it"
            )
        elif weights is None:
            yield NotChecked(
                f"eval: the weights that {file.name} is of, whose checkpoint is not kept"
            )
        else:
            compared += 1
            if record["weights"] != weights:
                yield (
                    case.within(file),
                    "is of other weights than the checkpoint that it names",
                )
    if count:
        yield NotChecked(
            "eval: the scores themselves, which only evaluating again can show"
        )
    return f"{numbered(count, 'result')}, {compared} of weights that are kept"


def _weights_evaluated(case: Case, record: Mapping[str, Any]) -> str | None:
    """The hash of the weights in the checkpoint that results are of; None where it is not there any more."""
    for stage in case.plan.stages:
        if stage.name != record["stage"]:
            continue
        folder = case.folder(stage)
        path = folder.checkpoint(record["step"]) if stage.trains else folder.checkpoints
        manifest = seal.read_seal(path)
        return None if manifest is None else weights_hash(manifest["tensors"])
    raise DamagedError(f"{record['stage']} is no stage of the recipe")


def data(case: Case, full: bool) -> Look:
    """The token stores against the hashes that the run has of them; their files whole, or a few of them."""
    recipe = case.plan.recipe
    stores = [Path(path) for path, _ in recipe.data.stores]
    weights = [weight for _, weight in recipe.data.stores]
    outside = case.stores_outside()
    if outside:
        why = f"{', '.join(outside)} leaves the working directory; name every store with --data"
        yield NotChecked(f"data: {why}")
        return f"not checked: {why}"
    try:
        manifests = [read_manifest(store) for store in stores]
        order = Order(manifests, weights, recipe.data.seq_len, recipe.seed)
    except StoreError as error:
        if not case.data_from_recipe:
            yield "data", str(error)
        yield NotChecked(f"data: {error}")
        return f"not checked: {error}"

    # The stores are the run's, and give what the ledger says that they gave.
    names = ", ".join(map(str, stores))
    facts = data_facts(case.plan, order)
    for name in ("manifest_hash", "validation_hash", "tokenizer_sha256"):
        if case.record["data"][name] != facts[name]:
            yield names, f"its {name} is not the run's"
    ledger = seal.read_json(case.run.ledger_file)
    if ledger:
        stated = list(ledger["data"].values())
        due = list(order.seen(case.plan.sequences).values())
        if stated != due:
            yield (
                LEDGER,
                f"states {stated} of the stores, the order of the data gives {due}",
            )

    # And their files are what their manifests say.
    files = _files_of_stores(manifests)
    chosen = sorted(files)
    if not full:
        chosen = random.sample(chosen, min(SAMPLED, len(files)))
    for file in chosen:
        if not file.is_file() or seal.sha256(file) != files[file]:
            yield str(file), "is damaged or missing"
    if len(chosen) < len(files):
        yield NotChecked(
            f"data: {numbered(len(files) - len(chosen), 'file')} of the token stores (--full)"
        )
    return f"{names}: {len(chosen)} of {numbered(len(files), 'file')} read"


def _files_of_stores(manifests: list[Manifest]) -> dict[Path, str]:
    """Every shard and tokenizer, with its SHA-256."""
    files: dict[Path, str] = {}
    for manifest in manifests:
        for split in manifest.splits.values():
            for shard in split.shards:
                files[manifest.folder / shard.file] = shard.sha256
        files[manifest.folder / manifest.tokenizer] = manifest.tokenizer_sha256
    return files
