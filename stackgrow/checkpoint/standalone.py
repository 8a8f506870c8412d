"""Growing a checkpoint without a recipe: a DCP or Hugging Face Llama folder in, a sealed DCP folder out.

All is written in ``<target>.tmp``, on which the ranks work together; one rename at the end makes the target.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import distributed as dist

from stackgrow import seal
from stackgrow.checkpoint import convert
from stackgrow.checkpoint.dcp import CheckpointError, is_model_key, read_item, read_metadata, read_tensor, tensor_shapes
from stackgrow.checkpoint.grow import fingerprints_of, growth_record, rules_of, seal_grown
from stackgrow.checkpoint.hf import CONFIG, import_hf
from stackgrow.checkpoint.hf_format import config_of, model_from_config
from stackgrow.errors import RunError, disk_error, retold
from stackgrow.growth.rules import GrowthError, Rules
from stackgrow.plan.stages import GrowStage
from stackgrow.recipe.keys import Model
from stackgrow.recipe.write import canonical_hash
from stackgrow.run_folder.folder import GROWTH, run_of
from stackgrow.run_folder.found import plan_of_run
from stackgrow.seal.tensors import fingerprint

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of this growth; torch.distributed is used only where there are several."""

    rank: int = 0
    size: int = 1

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def step(self, work: Callable[[], T], *, alone: bool = False) -> T:
        """``work`` on all ranks, or on rank 0 ``alone``; where it fails on any, all ranks raise the same RunError."""
        result, failure = None, None
        try:
            result = work() if self.rank == 0 or not alone else None
        except (RunError, GrowthError, OSError) as error:
            known = disk_error(error) if isinstance(error, OSError) else error
            failure = (getattr(known, "exit_code", 2), str(known))
        if failures := [f for f in self.gather(failure) if f]:
            raise retold(*failures[0])
        return result  # type: ignore[return-value]  # None on the other ranks, where alone


def grow_folder(
    source: Path,
    target: Path,
    describe: Callable[[Model], GrowStage],
    *,
    given: Mapping[str, Any],
    ranks: Ranks,
    tell: Callable[[GrowStage], object],
    position: int | None = None,
) -> dict[str, Any]:
    """Grows ``source`` into the new folder ``target`` and returns the record of growth.json, on rank 0.

    ``describe`` makes the growth from the source's geometry, and ``tell`` is called with it, on rank 0, before
    anything is written. ``given``: keys of Model that the source does not tell. ``position``: sequences consumed, to be
    sealed instead of the source's. The target has a seal, with its
    geometry as a Hugging Face config, and growth.json inside; it is complete or not there.

    Raises:
        RunError: on all ranks alike; exit code 2 for a growth that is not defined.
    """
    work = target.with_name(target.name + ".tmp")
    ranks.step(lambda: _refuse_place(source, target), alone=True)
    stage, rules = ranks.step(lambda: _prepare(source, describe, given))
    if ranks.rank == 0:
        tell(stage)
    try:
        ranks.step(lambda: _begin(source, work, rules), alone=True)
        checkpoint = work / "imported" if _is_hf(source) else source
        before = _facts(checkpoint, stage.source, rules, ranks)
        marks = (
            fingerprints_of(before) if before["files"] else None
        )  # of what has no seal they were read from it just now
        ranks.step(lambda: convert.write_part(checkpoint, work / "grown", rules, ranks.rank, ranks.size, marks))
        facts = {} if position is None else {"position": position}
        finish = partial(_finish, stage, source, checkpoint, target, rules, before, ranks.size, facts)
        return ranks.step(finish, alone=True)
    finally:
        if ranks.rank == 0:
            shutil.rmtree(work, ignore_errors=True)


def source_model(source: Path, given: Mapping[str, Any]) -> Model:
    """The geometry of a checkpoint: config.json's, its run's, that in its seal, or what its tensors' shapes tell
    together with ``given``. RunError, or GrowthError where something is missing or given without need."""
    known = known_model(source)
    if known is None:
        return _model_of_shapes(source, given)
    if given:
        raise GrowthError(f"{source} tells its own geometry: leave out the --source- options")
    return known


def _is_hf(source: Path) -> bool:
    return (source / CONFIG).is_file()


def known_model(source: Path) -> Model | None:
    """What a checkpoint says itself of its model."""
    if _is_hf(source):
        return model_from_config(seal.read_json(source / CONFIG) or {})
    if run := run_of(source):
        for stage in plan_of_run(run).stages:
            if stage.name in source.absolute().parts:
                return stage.output_model
    config = (seal.read_seal(source) or {}).get("config")
    return model_from_config(config) if config else None


def _model_of_shapes(source: Path, given: Mapping[str, Any]) -> Model:
    shapes = {name: shape for name, (shape, _) in tensor_shapes(read_metadata(source)).items()}
    layers = {name.split(".")[1] for name in shapes if name.startswith("layers.")}
    try:
        vocabulary, dim = shapes["tok_embeddings.weight"]
        (key_rows, _), (ffn, _) = (shapes[f"layers.0.{n}.weight"] for n in ("attention.wk", "feed_forward.w1"))
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{source} is no Llama checkpoint with torchtitan's tensor names: {error}") from error
    if "n_heads" not in given:
        raise GrowthError(f"{source} does not tell its number of attention heads: give --source-heads")
    width = dim // given["n_heads"]
    if width * given["n_heads"] != dim or key_rows % width:
        raise GrowthError(
            f"{given['n_heads']} attention heads do not fit {source}: heads of dim / heads channels must divide dim = "
            f"{dim} and the {key_rows} rows of attention.wk"
        )
    sizes = {"dim": dim, "n_layers": len(layers), "n_kv_heads": key_rows // width, "ffn_dim": ffn}
    return Model(family="llama2", vocab_size=vocabulary, **{**sizes, **given})


def _refuse_place(source: Path, target: Path) -> None:
    if not source.is_dir():
        raise CheckpointError(f"{source} is no folder: name a checkpoint, or a Hugging Face model folder")
    if target.exists():
        raise CheckpointError(f"{target} exists already: remove it, or grow into another folder")
    if not target.absolute().parent.is_dir():
        raise CheckpointError(f"{target} cannot be made: there is no folder {target.parent}")
    if target.resolve().is_relative_to(source.resolve()):
        raise CheckpointError(f"{target} lies in {source}, which would change it: grow into another folder")


def _prepare(source: Path, describe: Callable[[Model], GrowStage], given: Mapping[str, Any]) -> tuple[GrowStage, Rules]:
    """The growth, refused before anything is written."""
    _refuse_masked(source)
    stage = describe(source_model(source, given))
    if stage.optimizer and not (seal.read_seal(source) or {"moments": True}).get("moments"):
        raise GrowthError(f"{source} has no optimizer state to grow: leave out --optimizer")
    if stage.optimizer and _is_hf(source):
        raise GrowthError(f"{source} has weights alone, and no optimizer state to grow: leave out --optimizer")
    for which, model in (("source", stage.source), ("grown", stage.target)):
        if model.dim % (2 * model.n_heads) or model.n_heads % model.kv_heads:
            raise GrowthError(
                f"the {which} model: {model.n_heads} heads and {model.kv_heads} key/value heads for dim {model.dim}; "
                "heads must divide dim into even widths, key/value heads must divide heads"
            )
    return stage, rules_of(stage)


def _refuse_masked(source: Path) -> None:
    """Where the mask of "random" has not come to 1, the weights alone are another function than the model's."""
    if _is_hf(source):
        return
    metadata, c = read_metadata(source), 1.0
    if "train_state.mask" in metadata.state_dict_metadata:
        c = float(read_item(source, metadata, "train_state.mask"))
    elif any(stage.mask and stage.name in source.absolute().parts for stage in _grow_stages(source)):
        c = 0.0
    if c < 1:
        raise GrowthError(
            f"{source} is masked, at {c:.2f}: export it with tools/export_hf.py, and grow what that makes"
        )


def _grow_stages(source: Path) -> list[GrowStage]:
    run = run_of(source)
    return plan_of_run(run).grow_stages if run else []


def _begin(source: Path, work: Path, rules: Rules) -> None:
    if work.exists():  # of an attempt that was killed
        shutil.rmtree(work)
    work.mkdir()
    if _is_hf(source):
        import_hf(source, work / "imported")
    convert.begin(work / "imported" if _is_hf(source) else source, work / "grown", rules)


def _facts(source: Path, model: Model, rules: Rules, ranks: Ranks) -> Mapping[str, Any]:
    """The manifest of the source; of one without a seal, what can be known. The ranks share the reading."""
    before = seal.read_seal(source)
    if before is not None:
        return before
    mine = ranks.step(lambda: _fingerprints(source, sorted(rules.source_shapes)[ranks.rank :: ranks.size]))
    marks = {name: mark for part in ranks.gather(mine) for name, mark in part.items()}
    tensors = {name: mark for name, mark in marks.items() if is_model_key(name)}
    stage_hash = canonical_hash({"config": config_of(model), "tensors": tensors})
    return {"stage_hash": stage_hash, "position": 0, "tensors": tensors, "moments": marks, "files": {}}


def _fingerprints(source: Path, names: list[str]) -> dict[str, str]:
    metadata = read_metadata(source)
    return {name: fingerprint(read_tensor(source, metadata, name)) for name in names}


def _finish(
    stage: GrowStage,
    source: Path,
    checkpoint: Path,
    target: Path,
    rules: Rules,
    before: Mapping[str, Any],
    world_size: int,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    grown = target.with_name(target.name + ".tmp") / "grown"
    growth = growth_record(stage, source, before, rules, convert.commit(checkpoint, grown, rules, world_size))
    seal.write_json(grown / GROWTH, growth)
    stage_hash = canonical_hash({"parent": before["stage_hash"], "stage": stage.identity()})
    seal_grown(grown, stage_hash, before, growth, config=config_of(stage.target), **facts)
    grown.rename(target)
    seal.sync_folder(target.absolute().parent)
    return growth
