"""Tensors of a sealed checkpoint, each compared with what its seal says of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from stackgrow import seal
from stackgrow.fingerprint import fingerprint
from stackgrow.growth.dcp import CheckpointError, read_metadata, read_tensor


def read_sealed(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Whole tensors, on the CPU. Raises CheckpointError for a folder that is not sealed, and unless each tensor has
    the fingerprint that was sealed."""
    manifest = seal.read_seal(folder)
    if manifest is None:
        raise CheckpointError(f"{folder} is not sealed: it is incomplete, or no run made it")
    metadata, tensors = read_metadata(folder), {}
    for name in names:
        if name not in metadata.state_dict_metadata:
            raise CheckpointError(f"{folder} has no tensor {name}")
        tensors[name] = read_tensor(folder, metadata, name)
        if manifest["tensors"].get(name) != fingerprint(tensors[name]):
            raise CheckpointError(f"{folder}: {name} is not what was saved; restore the checkpoint")
    return tensors
