"""Tensors of a sealed checkpoint, each compared with what its seal says of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from stackgrow import seal
from stackgrow.checkpoint.dcp import CheckpointError, read_metadata, read_tensor
from stackgrow.seal.tensors import fingerprint


class Reader:
    """Reads whole tensors, on the CPU. Raises CheckpointError unless each has its fingerprint in ``fingerprints``."""

    def __init__(
        self, folder: Path, metadata: Metadata, fingerprints: Mapping[str, str] | None
    ):
        self.folder = folder
        self.metadata = metadata
        self.fingerprints = fingerprints
        self.checked: set[str] = set()

    def __call__(self, name: str) -> Tensor:
        tensor = read_tensor(self.folder, self.metadata, name)
        if self.fingerprints is not None and name not in self.checked:
            if self.fingerprints.get(name) != fingerprint(tensor):
                raise CheckpointError(
                    f"{self.folder}: {name} is not what was saved; restore the checkpoint"
                )
            self.checked.add(name)
        return tensor


def read_sealed(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Whole tensors, on the CPU. Raises CheckpointError for a folder that is not sealed, and unless each tensor has
    the fingerprint that was sealed."""
    manifest = seal.read_seal(folder)
    if manifest is None:
        raise CheckpointError(
            f"{folder} is not sealed: it is incomplete, or no run made it"
        )
    metadata = read_metadata(folder)
    names = list(names)
    missing = set(names) - metadata.state_dict_metadata.keys()
    if missing:
        raise CheckpointError(f"{folder} has no tensor {min(missing)}")
    read = Reader(folder, metadata, manifest["tensors"])
    return {name: read(name) for name in names}
