"""Hugging Face import and export of checkpoints on disk: DCP -> folder -> DCP, one tensor in memory at a time.

Either is written into ``<target>.tmp``, which one rename makes the target. Weights are read from safetensors only: the
older ``.bin`` files are pickles, which run what is in them.
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import safetensors
import torch
import torch.distributed.checkpoint.metadata as meta
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo

from stackgrow import seal
from stackgrow.checkpoint.carried import carried_by, carry_from_hf, give_back
from stackgrow.checkpoint.convert import append
from stackgrow.checkpoint.dcp import (
    METADATA,
    CheckpointError,
    is_model_key,
    read_metadata,
    read_tensor,
    tensor_shapes,
)
from stackgrow.checkpoint.direct import DirectFile
from stackgrow.checkpoint.hf_format import (
    config_of,
    from_hf,
    hf_name,
    read_config,
    to_hf,
)
from stackgrow.checkpoint.hf_tokenizer import (
    ExportedTokenizer,
    StoredTokenizer,
    write_generation_config,
    write_tokenizer,
)
from stackgrow.checkpoint.hf_weights import (
    CODES,
    DTYPES,
    Shapes,
    Weights,
    read_weights,
    write_shards,
)
from stackgrow.recipe.keys import Model
from stackgrow.recipe.write import canonical_hash
from stackgrow.seal.tensors import fingerprint

CONFIG = "config.json"
DATA = "__0_0.distcp"  # as DCP names the file of a single rank
MOST_PROBLEMS = 20  # told in one message
Dtype: TypeAlias = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Exported:
    """What ``export_hf`` wrote: the dtype, and of the tokenizer where one was given."""

    dtype: str
    tokenizer: ExportedTokenizer | None


def export_hf(
    checkpoint: Path,
    target: Path,
    model: Model,
    *,
    tokenizer: StoredTokenizer | None = None,
    dtype: Dtype | None = None,
    shard_bytes: int = 5 * 10**9,
    seq_len: int | None = None,
    card: str | None = None,
    fold: Callable[[str, Tensor], Tensor] | None = None,
) -> Exported:
    """Writes the model in DCP folder ``checkpoint`` as a folder that transformers loads.

    A shard holds at most ``shard_bytes``, or a single tensor. ``tokenizer`` is that of a token store, ``seq_len`` the
    length that was trained on, ``card`` the text of README.md. ``fold`` writes a growth's mask into each tensor (see
    growth/mask.py). The tensors of a sealed checkpoint are compared with the fingerprints in its seal.

    A checkpoint that came from Hugging Face has its own tokenizer, config and ``dtype`` (see carried.py).

    Raises:
        CheckpointError: the checkpoint is damaged, has not the tensors of ``model``, or ``target`` exists.
    """
    metadata = read_metadata(checkpoint)
    _refuse_to_export(checkpoint, metadata, model, tokenizer)
    carried = carried_by(checkpoint)
    dtype = dtype or carried.get("dtype", "float32")
    torch_dtype = getattr(torch, str(dtype))
    fingerprints = (seal.read_seal(checkpoint) or {}).get("tensors", {})

    def read(name: str) -> Tensor:
        tensor = read_tensor(checkpoint, metadata, name)
        if name in fingerprints and fingerprint(tensor) != fingerprints[name]:
            raise CheckpointError(
                f"{checkpoint}: {name} is not what was saved; the checkpoint is damaged"
            )
        if fold:
            tensor = fold(name, tensor)
        return to_hf(tensor.to(torch_dtype), name, model)

    config = {
        **config_of(model, seq_len),
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config.update(carried.get("config", {}))
    with _new_folder(target) as work:
        give_back(checkpoint, work)
        written = None
        if tokenizer:
            written = write_tokenizer(work, tokenizer, seq_len)
            write_generation_config(work, written)
            config["bos_token_id"] = written.bos_token_id
            config["eos_token_id"] = written.eos_token_id
        seal.write_json(work / CONFIG, config)
        write_shards(work, model, torch_dtype, shard_bytes, read)
        if card is not None:
            section = written.card_section if written else ""
            (work / "README.md").write_text(card + section, encoding="utf-8")
    return Exported(str(dtype), written)


def _refuse_to_export(
    checkpoint: Path,
    metadata: meta.Metadata,
    model: Model,
    tokenizer: StoredTokenizer | None,
) -> None:
    """CheckpointError for a checkpoint that is not of ``model``, or a tokenizer with more tokens than it has."""
    shapes = {}
    dtypes = {}
    for name, (shape, dtype) in tensor_shapes(metadata).items():
        if is_model_key(name):
            shapes[name] = shape
            dtypes[name] = dtype
    problems = _tensor_problems(shapes, model.tensors(), dtypes, CODES)
    if tokenizer and tokenizer.vocab_size > model.vocab_size:
        problems.append(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.vocab_size}"
        )
    _refuse(f"{checkpoint} cannot be exported", problems)


def import_hf(source: Path, target: Path) -> Model:
    """Reads a Hugging Face folder (config.json, safetensors) into the sealed DCP folder ``target``, in float32.

    The seal names the files that it came from with their SHA-256, and the fingerprint of every tensor; its
    ``stage_hash`` is that of the geometry and the weights. What else an export needs is carried along.

    Raises:
        CheckpointError: all that prevents the import, and what to do; or ``target`` exists.
    """
    hf_config = seal.read_json(source / CONFIG)
    if hf_config is None:
        raise CheckpointError(
            f"{source} is not a Hugging Face model folder: it has no {CONFIG}"
        )
    model, weights = _read_folder(source, hf_config)
    fingerprints: dict[str, str] = {}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in model.tensors():
            # Opened for each tensor: the file is mapped, and what was read of it stays in memory until it is closed.
            with safetensors.safe_open(weights.files[hf_name(name)], "pt") as file:
                tensor = file.get_tensor(hf_name(name)).to(torch.float32, copy=True)
            tensor = from_hf(tensor, name, model)
            fingerprints[name] = fingerprint(tensor)
            yield name, tensor

    with _new_folder(target) as work:
        write_dcp(work, tensors())
        config = config_of(model)
        names = [CONFIG, *sorted({file.name for file in weights.files.values()})]
        facts = {
            "step": 0,
            "position": 0,
            "stage_hash": canonical_hash({"config": config, "tensors": fingerprints}),
            "config": config,
            "source": {
                "folder": str(source),
                "files": seal.file_records(source, names),
            },
            "tensors": fingerprints,
            **carry_from_hf(source, hf_config, weights.dtype, work),
        }
        seal.seal(work, seal.file_records(work, seal.contents(work)), facts)
    return model


def _read_folder(source: Path, config: Mapping[str, Any]) -> tuple[Model, Weights]:
    """The Model in a Hugging Face folder, and its weights, whose shapes are the model's."""
    model, problems = read_config(config)
    weights = read_weights(source)
    problems += weights.problems
    if model and weights.files:
        # Older conversions stored the rotary frequencies, which follow from rope_theta.
        shapes = {
            name: shape
            for name, shape in weights.shapes.items()
            if not name.endswith("rotary_emb.inv_freq")
        }
        # Beside a tied embedding, transformers reads no matrix of the head.
        if model.tie_embeddings:
            shapes.pop(hf_name("output.weight"), None)
        wanted = {hf_name(name): shape for name, shape in model.tensors().items()}
        problems += _tensor_problems(shapes, wanted, weights.codes, DTYPES)
    _refuse(f"{source} cannot be imported", problems)
    assert model is not None
    return model, weights


def _tensor_problems(
    shapes: Shapes,
    wanted: Shapes,
    dtypes: Mapping[str, Any],
    readable: Mapping[Any, str],
) -> list[str]:
    """What of the stored tensors is not as ``wanted``, or of a dtype that is not ``readable``."""
    problems = [f"{name} is missing" for name in wanted if name not in shapes]
    for name, shape in shapes.items():
        if name not in wanted:
            problems.append(f"{name} {shape} is not in the model")
        elif shape != wanted[name]:
            problems.append(f"{name} is {shape}, in the model {wanted[name]}")
        elif dtypes[name] not in readable:
            problems.append(
                f"{name} is of {dtypes[name]}; only float32, bfloat16, float16 and float64 are read"
            )
    return problems


def _refuse(what: str, problems: list[str]) -> None:
    if not problems:
        return
    lines = [f"{what}:", *problems[:MOST_PROBLEMS]]
    if len(problems) > MOST_PROBLEMS:
        lines.append(f"and {len(problems) - MOST_PROBLEMS} more")
    raise CheckpointError("\n  ".join(lines))


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``target`` when all is written."""
    if target.exists():
        raise CheckpointError(
            f"{target} exists already: remove it, or name another folder"
        )
    work = target.with_name(target.name + ".tmp")
    if work.exists():  # of an attempt that was killed
        shutil.rmtree(work)
    work.mkdir(parents=True)
    try:
        yield work
        for file in work.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        seal.sync_folder(work)
        work.rename(target)
    except BaseException:
        shutil.rmtree(work)
        raise
    seal.sync_folder(target.parent)


def write_dcp(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """A DCP checkpoint of whole tensors in one file, as one rank would save it, written as they come."""
    entries: dict[str, Any] = {}
    storage: dict[meta.MetadataIndex, _StorageInfo] = {}
    with DirectFile(folder / DATA) as stream:
        for name, tensor in tensors:
            place = append(tensor, stream)
            chunk = meta.ChunkStorageMetadata(
                torch.Size([0] * tensor.dim()), tensor.shape
            )
            entries[name] = meta.TensorStorageMetadata(
                meta.TensorProperties(tensor.dtype), tensor.shape, [chunk]
            )
            storage[meta.MetadataIndex(name, chunk.offsets)] = _StorageInfo(
                DATA, place.offset, place.length
            )
        stream.finish()
    metadata = meta.Metadata(
        state_dict_metadata=entries,
        planner_data={name: (name,) for name in entries},
        storage_data=storage,
        storage_meta=meta.StorageMeta(),
        version=CURRENT_DCP_VERSION,
    )
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
