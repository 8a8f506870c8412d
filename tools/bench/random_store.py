"""What the benchmarks train on where the text does not matter, and what they call the device."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

TOKENIZER_FILE = "tokenizer.model"


def random_store(folder: Path, vocabulary: int, tokens: int) -> None:
    """A token store of random ids: what they are does not change the time that they take."""
    folder.mkdir()
    splits = {}
    for seed, split in enumerate(("train", "validation")):
        ids = np.random.default_rng(seed).integers(0, vocabulary, tokens)
        file = folder / f"{split}-00000.npy"
        np.save(file, ids.astype(np.uint16))
        splits[split] = {
            "tokens": tokens,
            "documents": 1,
            "shards": [_shard_record(file, tokens)],
        }
    (folder / TOKENIZER_FILE).write_bytes(b"")
    manifest = {
        "format": 1,
        "dtype": "uint16",
        "vocab_size": vocabulary,
        "bos_id": 1,
        "splits": splits,
        "tokenizer": {
            "file": TOKENIZER_FILE,
            "sha256": hashlib.sha256(b"").hexdigest(),
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def _shard_record(file: Path, tokens: int) -> dict[str, Any]:
    return {
        "file": file.name,
        "tokens": tokens,
        "documents": 1,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "bytes": file.stat().st_size,
    }


def device_name() -> str:
    """The GPU's name, or "cpu"."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "cpu"
