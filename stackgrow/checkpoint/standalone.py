"""Growing a checkpoint without a recipe: a DCP or Hugging Face model folder in, a sealed DCP folder out.

All is written in ``<target>.tmp``, on which the ranks work together; one rename at the end makes the target.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import distributed as dist

from stackgrow import seal
from stackgrow.checkpoint import convert
from stackgrow.checkpoint.carried import carry_through_growth
from stackgrow.checkpoint.dcp import (
    CheckpointError,
    is_model_key,
    read_item,
    read_metadata,
    read_tensor,
    tensor_shapes,
)
from stackgrow.checkpoint.grow import (
    fingerprints_of,
    growth_record,
    growth_sentence,
    rules_of,
    seal_grown,
)
from stackgrow.checkpoint.hf import CONFIG, import_hf
from stackgrow.checkpoint.hf_format import config_of, model_from_config
from stackgrow.errors import RunError, disk_error, retold
from stackgrow.growth.rules import GrowthError, Rules
from stackgrow.plan.stages import GrowStage, Stage
from stackgrow.recipe.keys import Model
from stackgrow.recipe.write import canonical_hash
from stackgrow.run_folder.folder import StageFolder, run_of
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
        result: Any = None  # stays so on the other ranks, where rank 0 works alone
        failure = None
        if self.rank == 0 or not alone:
            try:
                result = work()
            except (RunError, GrowthError, OSError) as error:
                failure = _failure(error)
        for failed in self.gather(failure):
            if failed:
                raise retold(failed.exit_code, failed.message)
        return result


class Failure(NamedTuple):
    exit_code: int
    message: str


def _failure(error: RunError | GrowthError | OSError) -> Failure:
    told = disk_error(error) if isinstance(error, OSError) else error
    return Failure(getattr(told, "exit_code", 2), str(told))


@dataclass(frozen=True)
class Growing:
    """One growth of the folder ``source`` into the new folder ``target``."""

    stage: GrowStage
    rules: Rules
    source: Path
    target: Path
    ranks: Ranks

    @property
    def work(self) -> Path:
        """Where the ranks work together, until it is done."""
        return _work_folder(self.target)

    @property
    def checkpoint(self) -> Path:
        """The DCP folder that is grown: the source itself, or what a Hugging Face folder was converted to."""
        return self.work / "imported" if _is_hf(self.source) else self.source

    @property
    def grown(self) -> Path:
        return self.work / "grown"


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
    anything is written. ``given``: keys of Model that the source does not tell. The target has a seal, with its
    geometry as a Hugging Face config, growth.json inside, and what else came with a source from Hugging Face; it is
    complete or not there. ``position``: of a run that takes the source over, sequences consumed, to be sealed instead
    of the source's; such a run has a tokenizer of its own.

    Raises:
        RunError: on all ranks alike; exit code 2 for a growth that is not defined.
    """
    ranks.step(lambda: _refuse_place(source, target), alone=True)
    stage, rules = ranks.step(lambda: _prepare(source, describe, given))
    growing = Growing(stage, rules, source, target, ranks)
    if ranks.rank == 0:
        tell(stage)
    try:
        ranks.step(lambda: _begin(growing), alone=True)
        before = _facts(growing)
        # What has no seal was read for its fingerprints just now.
        fingerprints = fingerprints_of(before) if before["files"] else None
        ranks.step(lambda: _write_part(growing, fingerprints))
        return ranks.step(lambda: _finish(growing, before, position), alone=True)
    finally:
        if ranks.rank == 0:
            shutil.rmtree(growing.work, ignore_errors=True)


def _work_folder(target: Path) -> Path:
    return target.with_name(target.name + ".tmp")


# The source's geometry.


def source_model(source: Path, given: Mapping[str, Any]) -> Model:
    """The geometry of a checkpoint: config.json's, its run's, that in its seal, or what its tensors' shapes tell
    together with ``given``. RunError, or GrowthError where something is missing or given without need."""
    stated = stated_model(source)
    if stated is None:
        return _model_of_shapes(source, given)
    if given:
        raise GrowthError(
            f"{source} tells its own geometry: leave out the --source- options"
        )
    return stated


def _is_hf(source: Path) -> bool:
    return (source / CONFIG).is_file()


def stated_model(source: Path) -> Model | None:
    """What a checkpoint says itself of its model."""
    if _is_hf(source):
        return model_from_config(seal.read_json(source / CONFIG) or {})
    stage = _run_stage(source)
    if stage is not None:
        return stage.output_model
    config = (seal.read_seal(source) or {}).get("config")
    return model_from_config(config) if config else None


def _run_stage(source: Path) -> Stage | None:
    """The stage of a run that a checkpoint lies in."""
    run = run_of(source)
    if run is None:
        return None
    for stage in plan_of_run(run).stages:
        if stage.name in source.absolute().parts:
            return stage
    return None


def _model_of_shapes(source: Path, given: Mapping[str, Any]) -> Model:
    shapes = {
        name: shape for name, (shape, _) in tensor_shapes(read_metadata(source)).items()
    }
    layers = {name.split(".")[1] for name in shapes if name.startswith("layers.")}
    try:
        vocabulary, dim = shapes["tok_embeddings.weight"]
        query_rows, _ = shapes["layers.0.attention.wq.weight"]
        key_rows, _ = shapes["layers.0.attention.wk.weight"]
        ffn_dim, _ = shapes["layers.0.feed_forward.w1.weight"]
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{source} is no Llama checkpoint with torchtitan's tensor names: {error}"
        ) from error
    if "n_heads" not in given:
        raise GrowthError(
            f"{source} does not tell its number of attention heads: give --source-heads"
        )
    n_heads = given["n_heads"]
    width = query_rows // n_heads
    if width * n_heads != query_rows or key_rows % width:
        raise GrowthError(
            f"{n_heads} attention heads do not fit {source}: they must divide the {query_rows} rows of attention.wq "
            f"into heads whose width divides the {key_rows} rows of attention.wk"
        )
    sizes = {
        "vocab_size": vocabulary,
        "dim": dim,
        "n_layers": len(layers),
        "n_kv_heads": key_rows // width,
        "ffn_dim": ffn_dim,
        "head_dim_": None if query_rows == dim else width,
        "tie_embeddings": "output.weight" not in shapes,
        "qk_norm": "layers.0.attention.q_norm.weight" in shapes,
        "attention_bias": "layers.0.attention.wq.bias" in shapes,
        **given,
    }
    return Model(family="llama2", **sizes)


# Before anything is written.


def _refuse_place(source: Path, target: Path) -> None:
    if not source.is_dir():
        raise CheckpointError(
            f"{source} is no folder: name a checkpoint, or a Hugging Face model folder"
        )
    if target.exists():
        raise CheckpointError(
            f"{target} exists already: remove it, or grow into another folder"
        )
    if not target.absolute().parent.is_dir():
        raise CheckpointError(
            f"{target} cannot be made: there is no folder {target.parent}"
        )
    if target.resolve().is_relative_to(source.resolve()):
        raise CheckpointError(
            f"{target} lies in {source}, which would change it: grow into another folder"
        )


def _prepare(
    source: Path, describe: Callable[[Model], GrowStage], given: Mapping[str, Any]
) -> tuple[GrowStage, Rules]:
    """The growth, refused before anything is written."""
    _refuse_masked(source)
    stage = describe(source_model(source, given))
    if stage.optimizer:
        _refuse_without_optimizer(source)
    _refuse_heads("source", stage.source)
    _refuse_heads("grown", stage.target)
    return stage, rules_of(stage)


def _refuse_without_optimizer(source: Path) -> None:
    manifest = seal.read_seal(source)
    if manifest is not None and not manifest.get("moments"):
        raise GrowthError(
            f"{source} has no optimizer state to grow: leave out --optimizer"
        )
    if _is_hf(source):
        raise GrowthError(
            f"{source} has weights alone, and no optimizer state to grow: leave out --optimizer"
        )


def _refuse_heads(which: str, model: Model) -> None:
    divided = model.states_head_dim or model.dim % model.n_heads == 0
    if not divided or model.head_dim % 2 or model.n_heads % model.kv_heads:
        raise GrowthError(
            f"the {which} model: {model.n_heads} heads and {model.kv_heads} key/value heads for dim {model.dim}; "
            "heads must divide dim into even widths, key/value heads must divide heads"
        )


def _refuse_masked(source: Path) -> None:
    """Where the mask of "random" has not come to 1, the weights alone are another function than the model's."""
    if _is_hf(source):
        return
    metadata = read_metadata(source)
    stage = _run_stage(source)
    mask = 1.0
    if "train_state.mask" in metadata.state_dict_metadata:
        mask = float(read_item(source, metadata, "train_state.mask"))
    elif isinstance(stage, GrowStage) and stage.mask:
        mask = 0.0  # as it is grown
    if mask < 1:
        raise GrowthError(
            f"{source} is masked, at {mask:.2f}: export it with tools/export_hf.py, and grow what that makes"
        )


# The work.


def _begin(growing: Growing) -> None:
    if growing.work.exists():  # of an attempt that was killed
        shutil.rmtree(growing.work)
    growing.work.mkdir()
    if _is_hf(growing.source):
        import_hf(growing.source, growing.checkpoint)
    convert.begin(growing.checkpoint, growing.grown, growing.rules)


def _facts(growing: Growing) -> Mapping[str, Any]:
    """The manifest of the source; of one without a seal, what can be known. The ranks share the reading."""
    source, ranks = growing.checkpoint, growing.ranks
    manifest = seal.read_seal(source)
    if manifest is not None:
        return manifest
    names = sorted(growing.rules.source_shapes)
    mine = names[ranks.rank :: ranks.size]
    parts = ranks.gather(ranks.step(lambda: _fingerprints(source, mine)))
    fingerprints: dict[str, str] = {}
    for part in parts:
        fingerprints.update(part)
    tensors = {
        name: value for name, value in fingerprints.items() if is_model_key(name)
    }
    identity_of_source = {"config": config_of(growing.stage.source), "tensors": tensors}
    return {
        "stage_hash": canonical_hash(identity_of_source),
        "position": 0,
        "tensors": tensors,
        "moments": fingerprints,
        "files": {},
    }


def _fingerprints(source: Path, names: list[str]) -> dict[str, str]:
    metadata = read_metadata(source)
    return {name: fingerprint(read_tensor(source, metadata, name)) for name in names}


def _write_part(growing: Growing, fingerprints: Mapping[str, str] | None) -> None:
    ranks = growing.ranks
    convert.write_part(
        growing.checkpoint,
        growing.grown,
        growing.rules,
        ranks.rank,
        ranks.size,
        fingerprints,
    )


def _finish(
    growing: Growing, before: Mapping[str, Any], position: int | None
) -> dict[str, Any]:
    """Joins what the ranks have written, seals it, and makes it the target; returns the record of growth.json."""
    stage, grown = growing.stage, growing.grown
    record = convert.commit(
        growing.checkpoint, grown, growing.rules, growing.ranks.size
    )
    growth = growth_record(stage, growing.source, before, growing.rules, record)
    seal.write_json(StageFolder(grown).growth_file, growth)
    stage_hash = canonical_hash(
        {"parent": before["stage_hash"], "stage": stage.identity()}
    )
    facts: dict[str, Any] = {}
    if position is None:
        facts = carry_through_growth(growing.checkpoint, grown, growth_sentence(stage))
    else:
        facts["position"] = position
    seal_grown(
        grown, stage_hash, before, growth, config=config_of(stage.target), **facts
    )
    grown.rename(growing.target)
    seal.sync_folder(growing.target.absolute().parent)
    return growth
