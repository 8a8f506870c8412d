"""A base model from elsewhere: what of it does not fit the recipe, and taking it over into the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stackgrow import seal
from stackgrow.checkpoint.dcp import read_metadata, tensor_shapes
from stackgrow.checkpoint.hf import CONFIG
from stackgrow.checkpoint.standalone import Ranks, grow_folder, known_model, source_model
from stackgrow.errors import RunError
from stackgrow.growth.rules import GrowthError
from stackgrow.plan.stages import GrowStage, ImportStage
from stackgrow.recipe.keys import Model
from stackgrow.recipe.load import Problem
from stackgrow.recipe.write import canonical_hash

# What a model computes with; how it was initialized no longer matters.
GEOMETRY = ("n_layers", "dim", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size", "norm_eps", "rope_theta")


def import_problems(stage: ImportStage) -> list[Problem]:
    """What of the base model is not as the recipe has it; reads no weights."""
    folder, wanted = Path(stage.folder), stage.source
    if not folder.is_dir():
        return [("base.from", f"{folder} is no folder; name a Hugging Face Llama folder or a DCP checkpoint")]
    try:
        found = source_model(folder, _told(folder, wanted))
        stored = {} if (folder / CONFIG).is_file() else tensor_shapes(read_metadata(folder))
    except (RunError, GrowthError) as error:
        return [("base.from", str(error))]
    pairs = [(name, getattr(found, name), getattr(wanted, name)) for name in GEOMETRY]
    problems = [f"{name} is {given}, in the recipe {own}" for name, given, own in pairs if given != own]
    dtypes = {dtype for name, (_, dtype) in stored.items() if name in wanted.tensors()} - {torch.float32}
    problems += [f"its weights are {dtype}, and a run keeps float32; import it from Hugging Face" for dtype in dtypes]
    return [("base.from", f"{folder} is not the base model: {'; '.join(problems)}")] if problems else []


def _told(folder: Path, wanted: Model) -> dict[str, Any]:
    """What the tensors of a bare checkpoint do not tell."""
    return {} if known_model(folder) else {n: getattr(wanted, n) for n in ("n_heads", "norm_eps", "rope_theta")}


def take_over(stage: ImportStage, target: Path, rank: int, world_size: int) -> str:
    """Makes the sealed checkpoint ``target`` of the base model, by all ranks, and returns a hash of its weights, on
    rank 0: by linking files of a DCP checkpoint, by converting those of Hugging Face. A growth that changes nothing."""
    ranks = Ranks(rank, world_size)
    folder, layers = Path(stage.folder), tuple(range(stage.source.n_layers))
    if ranks.gather(rank == 0 and seal.read_seal(target) is None)[0]:
        same = GrowStage(stage.index, stage.source, stage.target, "stack", layers, 0.0, stage.seed)
        given, place = _told(folder, stage.source), stage.position
        grow_folder(folder, target, lambda _: same, given=given, ranks=ranks, tell=lambda _: None, position=place)
    return canonical_hash((seal.read_seal(target) or {})["tensors"]) if rank == 0 else ""
