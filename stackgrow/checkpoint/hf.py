"""Hugging Face import and export of checkpoints on disk: DCP -> Llama folder -> DCP, one tensor in memory at a time.

Either is written into ``<target>.tmp``, which one rename makes the target. Weights are read from safetensors only: the
older ``.bin`` files are pickles, which run what is in them.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import safetensors
import tokenizers
import torch
import torch.distributed.checkpoint.metadata as meta
from sentencepiece import SentencePieceProcessor
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo

from stackgrow import seal
from stackgrow.checkpoint.convert import append
from stackgrow.checkpoint.dcp import METADATA, CheckpointError, is_model_key, read_metadata, read_tensor, tensor_shapes
from stackgrow.checkpoint.direct import DirectFile
from stackgrow.checkpoint.hf_format import config_of, from_hf, hf_name, read_config, to_hf
from stackgrow.data.tokenizer import HfTokenizer, Tokenizer
from stackgrow.recipe.keys import Model
from stackgrow.recipe.write import canonical_hash
from stackgrow.seal.tensors import fingerprint

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
DATA = "__0_0.distcp"  # as DCP names the file of a single rank
CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # torch's dtypes in safetensors
Shapes = Mapping[str, tuple[int, ...]]


def export_hf(
    checkpoint: Path,
    target: Path,
    model: Model,
    *,
    tokenizer: Path | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    shard_bytes: int = 5 * 10**9,
    seq_len: int | None = None,
    card: str | None = None,
    fold: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    """Writes the model in DCP folder ``checkpoint`` as a Llama folder that transformers loads.

    A shard holds at most ``shard_bytes``, or a single tensor. ``tokenizer`` is a SentencePiece model or a
    tokenizer.json, ``seq_len`` the length that was trained on, ``card`` the text of README.md. ``fold`` writes a
    growth's mask into each tensor (see growth/mask.py). The tensors of a sealed checkpoint are compared with the
    fingerprints in its seal.

    Raises:
        CheckpointError: the checkpoint is damaged, has not the tensors of ``model``, or ``target`` exists.
    """
    metadata, sealed = read_metadata(checkpoint), seal.read_seal(checkpoint)
    problems = _shape_problems(_stored(metadata), model.tensors())
    vocabulary = Tokenizer.load(tokenizer) if tokenizer else None
    if vocabulary and vocabulary.vocab_size != model.vocab_size:
        problems.append(f"the tokenizer has {vocabulary.vocab_size} tokens, the model {model.vocab_size}")
    _refuse(f"{checkpoint} cannot be exported", problems)
    prints = (sealed or {}).get("tensors", {})

    def read(name: str) -> Tensor:
        tensor = read_tensor(checkpoint, metadata, name)
        if name in prints and fingerprint(tensor) != prints[name]:
            raise CheckpointError(f"{checkpoint}: {name} is not what was saved; the checkpoint is damaged")
        tensor = fold(name, tensor) if fold else tensor
        return to_hf(tensor.to(getattr(torch, dtype)), name, model)

    with _new_folder(target) as work:
        config = {**config_of(model, seq_len), "torch_dtype": dtype, "bos_token_id": None, "eos_token_id": None}
        if vocabulary:
            config |= _write_tokenizer(work, vocabulary, seq_len)
        seal.write_json(work / CONFIG, config)
        _write_shards(work, model, getattr(torch, dtype), shard_bytes, read)
        if card is not None:
            (work / "README.md").write_text(card, encoding="utf-8")


def import_hf(source: Path, target: Path) -> Model:
    """Reads a Llama folder (config.json, safetensors) into the sealed DCP folder ``target``, in float32.

    The seal names the files that it came from with their SHA-256, and the fingerprint of every tensor; its
    ``stage_hash`` is that of the geometry and the weights.

    Raises:
        CheckpointError: all that prevents the import, and what to do; or ``target`` exists.
    """
    model, files = _read_folder(source)
    prints: dict[str, str] = {}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in model.tensors():
            # Opened for each tensor: the file is mapped, and what was read of it stays in memory until it is closed.
            with safetensors.safe_open(files[hf_name(name)], "pt") as file:
                tensor = file.get_tensor(hf_name(name)).to(torch.float32, copy=True)
            tensor = from_hf(tensor, name, model)
            prints[name] = fingerprint(tensor)
            yield name, tensor

    with _new_folder(target) as work:
        _write_dcp(work, tensors())
        config = config_of(model)
        names = [CONFIG, *sorted({file.name for file in files.values()})]
        facts = {
            "step": 0,
            "position": 0,
            "stage_hash": canonical_hash({"config": config, "tensors": prints}),
            "config": config,
            "source": {"folder": str(source), "files": seal.file_records(source, names)},
            "tensors": prints,
        }
        seal.seal(work, seal.file_records(work, seal.contents(work)), facts)
    return model


def _stored(metadata: meta.Metadata) -> dict[str, tuple[tuple[int, ...], Any]]:
    return {name: entry for name, entry in tensor_shapes(metadata).items() if is_model_key(name)}


def _shape_problems(stored: Mapping[str, tuple[tuple[int, ...], Any]], wanted: Shapes) -> list[str]:
    """What of ``stored``, {tensor: (shape, dtype)}, is not as ``wanted``."""
    problems = [f"{name} is missing" for name in wanted if name not in stored]
    for name, (shape, dtype) in stored.items():
        if name not in wanted:
            problems.append(f"{name} {shape} is not in the model")
        elif shape != wanted[name]:
            problems.append(f"{name} is {shape}, in the model {wanted[name]}")
        elif dtype not in CODES and dtype not in CODES.values():
            problems.append(f"{name} is of {dtype}; only float32, bfloat16 and float16 are read")
    return problems


def _refuse(what: str, problems: list[str], most: int = 20) -> None:
    if problems:
        more = [f"and {len(problems) - most} more"] if len(problems) > most else []
        raise CheckpointError("\n  ".join([f"{what}:", *problems[:most], *more]))


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``target`` when all is written."""
    if target.exists():
        raise CheckpointError(f"{target} exists already: remove it, or name another folder")
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


def _write_shards(
    work: Path, model: Model, dtype: torch.dtype, shard_bytes: int, read: Callable[[str], Tensor]
) -> None:
    """The weights in model order, cut into files, and the index that says what is in which."""
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in model.tensors().items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        _write_safetensors(work / file, {hf_name(n): model.tensors()[n] for n in names}, dtype, map(read, names))
    where = {hf_name(name): file for file, names in zip(files, shards, strict=True) for name in names}
    total = {"total_parameters": model.parameters(), "total_size": sum(sizes.values())}
    seal.write_json(work / INDEX, {"metadata": total, "weight_map": where})


def _write_safetensors(file: Path, shapes: Shapes, dtype: torch.dtype, tensors: Iterable[Tensor]) -> None:
    """Eight bytes with the length of the header, the header, the tensors' bytes. The library's own writer takes all
    tensors of a file at once, that is, a whole shard in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            stream.write(tensor.contiguous().view(torch.uint8).numpy().data)


def _write_tokenizer(work: Path, tokenizer: Tokenizer, seq_len: int | None) -> dict[str, int | None]:
    """The tokenizer, and how transformers is to use it: as stackgrow does, with BOS before every text.

    Returns the ids for config.json. transformers still has its own way with a literal U+2581, with special tokens
    spelled out in a text, and, where the tokenizer puts a space before every text, with one that begins with a space.
    """
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    config: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    if seq_len:
        config["model_max_length"] = seq_len
    if isinstance(tokenizer, HfTokenizer):
        model = tokenizers.Tokenizer.from_buffer(tokenizer.model)
        config |= {f"{name}_token": model.id_to_token(i) for name, i in ids.items() if i >= 0}
        if model.encode("").ids != [tokenizer.bos_id]:
            bos = config["bos_token"]
            model.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_id)])
        model.save(str(work / tokenizer.file))
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    else:
        pieces = SentencePieceProcessor(model_proto=tokenizer.model)
        every = {**ids, "unk": pieces.unk_id()}
        config |= {f"{name}_token": pieces.id_to_piece(i) if i >= 0 else None for name, i in every.items()}
        config |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False}
        config["add_prefix_space"] = tokenizer.adds_prefix
        (work / tokenizer.file).write_bytes(tokenizer.model)
    seal.write_json(work / "tokenizer_config.json", config)
    return {f"{name}_token_id": i if i >= 0 else None for name, i in ids.items()}


def _read_folder(source: Path) -> tuple[Model, dict[str, Path]]:
    """The Model in a Llama folder, and the file of each of its tensors, in transformers' names."""
    config = seal.read_json(source / CONFIG)
    if config is None:
        raise CheckpointError(f"{source} is not a Hugging Face model folder: it has no {CONFIG}")
    model, problems = read_config(config)
    files, file_problems = _weight_files(source)
    problems += file_problems
    stored: dict[str, tuple[tuple[int, ...], Any]] = {}
    where: dict[str, Path] = {}
    for file in files:
        try:
            with safetensors.safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (it is no mapping)
                    if name in where:
                        problems.append(f"{name} is both in {where[name].name} and in {file.name}")
                    view, where[name] = opened.get_slice(name), file
                    stored[name] = (tuple(view.get_shape()), view.get_dtype())
        except (OSError, safetensors.SafetensorError) as error:
            problems.append(f"{file.name} cannot be read: {error}; download or copy it again")
    if model and not file_problems:
        # Older conversions stored the rotary frequencies, which follow from rope_theta.
        weights = {name: entry for name, entry in stored.items() if not name.endswith("rotary_emb.inv_freq")}
        problems += _shape_problems(weights, {hf_name(name): shape for name, shape in model.tensors().items()})
    _refuse(f"{source} cannot be imported", problems)
    assert model is not None
    return model, where


def _weight_files(source: Path) -> tuple[list[Path], list[str]]:
    """The safetensors of a folder, those that its index names where it has one; and what is wrong with them."""
    index = seal.read_json(source / INDEX)
    if index is None:
        files = sorted(source.glob("*.safetensors"))
    else:
        names = index.get("weight_map")
        if not isinstance(names, dict) or not all(_is_plain(name) for name in names.values()):
            return [], [f"{INDEX} names files that are not plain *.safetensors in the folder; download it again"]
        files = [source / name for name in sorted(set(names.values()))]
    if missing := [f"{file.name} is missing; download it again" for file in files if not file.is_file()]:
        return [], missing
    if not files and any(source.glob("*.bin")):
        remedy = "load it with transformers where you trust it, and save_pretrained it as safetensors"
        return [], [f"its weights are pickles (*.bin), which can run anything and are never read; {remedy}"]
    return files, [] if files else ["it has no *.safetensors"]


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and not set(name) & set("/\\\0")


def _write_dcp(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """A DCP checkpoint of whole tensors in one file, as one rank would save it, written as they come."""
    entries: dict[str, Any] = {}
    places: dict[meta.MetadataIndex, _StorageInfo] = {}
    with DirectFile(folder / DATA) as stream:
        for name, tensor in tensors:
            _, start, size = append(tensor, stream)
            chunk = meta.ChunkStorageMetadata(torch.Size([0] * tensor.dim()), tensor.shape)
            entries[name] = meta.TensorStorageMetadata(meta.TensorProperties(tensor.dtype), tensor.shape, [chunk])
            places[meta.MetadataIndex(name, chunk.offsets)] = _StorageInfo(DATA, start, size)
        stream.finish()
    planner = {name: (name,) for name in entries}
    metadata = meta.Metadata(entries, planner, places, meta.StorageMeta(), CURRENT_DCP_VERSION)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
