"""The safetensors of a Hugging Face folder: which of its files are the model, what is in them, and writing new ones."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from stackgrow import seal
from stackgrow.checkpoint.hf_format import hf_name
from stackgrow.recipe.keys import Model

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-[0-9]+-of-[0-9]+\.safetensors")
# What stands beside a model in published folders: the original's own format, a LoRA, an optimizer, what a Mac adds.
NOT_THE_MODEL = ("consolidated", "adapter", "optimizer", ".")
CODES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}  # torch's dtypes in safetensors
DTYPES = {
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F64": "float64",
}  # that are read
Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class Weights:
    """What the safetensors of a folder hold, in transformers' names; ``problems``: why that is no model."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    codes: dict[str, str] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> str:
        """The dtype to write such a model in: its own, where all tensors have one, and it is no wider than float32."""
        codes = set(self.codes.values())
        if len(codes) == 1 and codes <= set(CODES.values()):
            return DTYPES[codes.pop()]
        return "float32"


def read_weights(source: Path) -> Weights:
    """Shapes, dtypes and files of all tensors; no weight is read."""
    found = Weights()
    files, found.problems = _weight_files(source)
    for file in files:
        try:
            with safetensors.safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (it is no mapping)
                    if name in found.files:
                        found.problems.append(
                            f"{name} is both in {found.files[name].name} and in {file.name}"
                        )
                    entry = opened.get_slice(name)
                    found.shapes[name] = tuple(entry.get_shape())
                    found.codes[name] = entry.get_dtype()
                    found.files[name] = file
        except (OSError, safetensors.SafetensorError) as error:
            found.problems.append(
                f"{file.name} cannot be read: {error}; download or copy it again"
            )
    return found


def _weight_files(source: Path) -> tuple[list[Path], list[str]]:
    """The files that transformers takes: model.safetensors alone where it is there, else those of the index; where
    there is none, the model's shards. And what is wrong with them."""
    if (source / SINGLE).is_file():
        return [source / SINGLE], []
    index = seal.read_json(source / INDEX)
    if index is None:
        files = _unlisted_files(source)
    else:
        names = index.get("weight_map")
        if not isinstance(names, dict) or not all(
            _is_plain(name) for name in names.values()
        ):
            return [], [
                f"{INDEX} names files that are not plain *.safetensors in the folder; download it again"
            ]
        files = [source / name for name in sorted(set(names.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        return [], [f"{name} is missing; download it again" for name in missing]
    if files:
        return files, []
    if any(source.glob("*.bin")):
        remedy = "load it with transformers where you trust it, and save_pretrained it as safetensors"
        return [], [
            f"its weights are pickles (*.bin), which can run anything and are never read; {remedy}"
        ]
    return [], ["it has no *.safetensors"]


def _unlisted_files(source: Path) -> list[Path]:
    files = sorted(
        file
        for file in source.glob("*.safetensors")
        if not file.name.startswith(NOT_THE_MODEL)
    )
    shards = [file for file in files if SHARD.fullmatch(file.name)]
    return shards or files


def _is_plain(name: Any) -> bool:
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and not set(name) & set("/\\\0")
    )


def write_shards(
    folder: Path,
    model: Model,
    dtype: torch.dtype,
    shard_bytes: int,
    read: Callable[[str], Tensor],
) -> None:
    """The weights in model order, cut into files of at most ``shard_bytes`` or one tensor, and the index that says what
    is in which. ``read`` gives the tensor of one of our names, in transformers' order and in ``dtype``."""
    shapes = model.tensors()
    shards: list[list[str]] = [[]]
    filled = 0
    total = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
        total += size

    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        shard_shapes = {hf_name(name): shapes[name] for name in names}
        write_safetensors(folder / file, shard_shapes, dtype, map(read, names))
        for name in shard_shapes:
            weight_map[name] = file
    metadata = {"total_parameters": model.parameters(), "total_size": total}
    seal.write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})


def write_safetensors(
    file: Path, shapes: Shapes, dtype: torch.dtype, tensors: Iterable[Tensor]
) -> None:
    """Eight bytes with the length of the header, the header, the tensors' bytes. The library's own writer takes all
    tensors of a file at once, that is, a whole shard in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start = end
        end += math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": CODES[dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)))
        stream.write(text)
        for tensor in tensors:
            stream.write(tensor.contiguous().view(torch.uint8).numpy().data)
