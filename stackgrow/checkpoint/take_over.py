"""A base model from elsewhere: what of it does not fit the recipe, and taking it over into the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stackgrow import seal
from stackgrow.checkpoint.dcp import read_metadata, tensor_shapes
from stackgrow.checkpoint.hf import CONFIG
from stackgrow.checkpoint.standalone import (
    Ranks,
    grow_folder,
    source_model,
    stated_model,
)
from stackgrow.errors import RunError
from stackgrow.growth.rules import GrowthError
from stackgrow.plan.stages import GrowStage, ImportStage
from stackgrow.recipe.keys import Model
from stackgrow.recipe.load import Problem
from stackgrow.recipe.write import canonical_hash

# What a model computes with; how it was initialized no longer matters.
GEOMETRY = (
    "n_layers",
    "dim",
    "n_heads",
    "n_kv_heads",
    "ffn_dim",
    "vocab_size",
    "norm_eps",
    "rope_theta",
    "rope_scaling",
    "head_dim",
    "tie_embeddings",
    "qk_norm",
    "attention_bias",
)


def import_problems(stage: ImportStage) -> list[Problem]:
    """What of the base model is not as the recipe has it; reads no weights."""
    folder = Path(stage.folder)
    wanted = stage.source
    if not folder.is_dir():
        return [
            (
                "base.from",
                f"{folder} is no folder; name a Hugging Face model folder or a DCP checkpoint",
            )
        ]
    try:
        found = source_model(folder, _untold(folder, wanted))
        dtypes = _stored_dtypes(folder, wanted)
    except (RunError, GrowthError) as error:
        return [("base.from", str(error))]
    problems = []
    for name in GEOMETRY:
        given, own = getattr(found, name), getattr(wanted, name)
        if given != own:
            problems.append(f"{name} is {given}, in the recipe {own}")
    for dtype in dtypes - {torch.float32}:
        problems.append(
            f"its weights are {dtype}, and a run keeps float32; import it from Hugging Face"
        )
    if not problems:
        return []
    return [("base.from", f"{folder} is not the base model: {'; '.join(problems)}")]


def _stored_dtypes(folder: Path, model: Model) -> set[torch.dtype]:
    """Of a DCP checkpoint's weights; what comes from Hugging Face is converted."""
    if (folder / CONFIG).is_file():
        return set()
    names = model.tensors()
    return {
        dtype
        for name, (_, dtype) in tensor_shapes(read_metadata(folder)).items()
        if name in names
    }


def _untold(folder: Path, wanted: Model) -> dict[str, Any]:
    """What the tensors of a bare checkpoint do not tell, from the recipe."""
    if stated_model(folder):
        return {}
    names = ("n_heads", "norm_eps", "rope_theta", "rope_scaling")
    return {name: getattr(wanted, name) for name in names}


def take_over(stage: ImportStage, target: Path, rank: int, world_size: int) -> str:
    """Makes the sealed checkpoint ``target`` of the base model, by all ranks, and returns a hash of its weights, on
    rank 0: by linking files of a DCP checkpoint, by converting those of Hugging Face. A growth that changes nothing."""
    ranks = Ranks(rank, world_size)
    folder = Path(stage.folder)
    is_missing = rank == 0 and seal.read_seal(target) is None
    if ranks.gather(is_missing)[0]:
        layers = tuple(range(stage.source.n_layers))
        same = GrowStage(
            stage.index, stage.source, stage.target, "stack", layers, 0.0, stage.seed
        )
        grow_folder(
            folder,
            target,
            lambda _: same,
            given=_untold(folder, stage.source),
            ranks=ranks,
            tell=lambda _: None,
            position=stage.position,
        )
    if rank != 0:
        return ""
    manifest = seal.read_seal(target) or {}
    return canonical_hash(manifest["tensors"])
