"""What a model from Hugging Face brings along beside its weights, through growth and out again: its tokenizer's files,
generation_config.json, how long its texts may be, which tokens begin and end them, its dtype and its name."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stackgrow import seal

# Files that are taken as they are. In a checkpoint their names begin with PREFIX.
FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
PREFIX = "hf-"
# Keys of config.json that are no geometry.
KEYS = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
CARRIED = "carried"  # the fact in a seal


def carry_from_hf(
    source: Path, config: Mapping[str, Any], dtype: str, target: Path
) -> dict[str, Any]:
    """Copies the files of a Hugging Face folder into checkpoint ``target``; returns what its seal is to state."""
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / (PREFIX + name))
    return {
        CARRIED: {
            "base_model": base_model_name(source, config),
            "dtype": dtype,
            "config": {key: config[key] for key in KEYS if config.get(key) is not None},
            "history": [],
        }
    }


def carry_through_growth(source: Path, target: Path, growth: str) -> dict[str, Any]:
    """The same from one checkpoint to the one that ``growth``, told in a sentence, makes of it."""
    carried = carried_by(source)
    if not carried:
        return {}
    for file in carried_files(source):
        shutil.copyfile(file, target / file.name)
    return {CARRIED: {**carried, "history": [*carried["history"], growth]}}


def carried_by(checkpoint: Path) -> dict[str, Any]:
    """``base_model``, ``dtype``, ``config`` and ``history`` of what came from Hugging Face; {} of other checkpoints."""
    manifest = seal.read_seal(checkpoint) or {}
    return dict(manifest.get(CARRIED, {}))


def carried_files(checkpoint: Path) -> list[Path]:
    return [
        checkpoint / (PREFIX + name)
        for name in FILES
        if (checkpoint / (PREFIX + name)).is_file()
    ]


def give_back(checkpoint: Path, target: Path) -> None:
    """Copies the files of a checkpoint into the Hugging Face folder ``target``, under their own names."""
    for file in carried_files(checkpoint):
        shutil.copyfile(file, target / file.name.removeprefix(PREFIX))


def base_model_name(source: Path, config: Mapping[str, Any]) -> str:
    """The name on the hub: of a folder in the hub's cache (models--owner--name), or what config.json has; else the
    folder's own. No path of this machine."""
    for part in source.absolute().parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    name = config.get("_name_or_path")
    if (
        isinstance(name, str)
        and name.count("/") == 1
        and not name.startswith(("/", ".", "~"))
    ):
        return name
    return source.absolute().name
