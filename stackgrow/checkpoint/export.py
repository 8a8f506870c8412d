"""A checkpoint of a run as a Hugging Face folder, with a model card that tells how it was grown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from stackgrow import seal
from stackgrow.checkpoint.hf import export_hf
from stackgrow.checkpoint.hf_format import model_from_config
from stackgrow.errors import DamagedError
from stackgrow.growth.mask import folding
from stackgrow.plan.stages import GrowStage, ImportStage, Stage
from stackgrow.recipe.keys import Model
from stackgrow.recipe.write import recipe_hash
from stackgrow.run_folder.choose import Chosen, choose, tokenizer_of
from stackgrow.run_folder.folder import RunFolder
from stackgrow.text import human


def export_run(
    path: Path,
    target: Path,
    *,
    stage: str | None = None,
    step: int | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> str:
    """Exports a run, or one checkpoint; returns a line that says what.

    Of a run: the last checkpoint of its last finished stage, or of ``stage``, or the one of ``step``. A checkpoint gets
    its geometry from the run that it lies in, or from the seal of its import. The tokenizer is the token store's; where
    the store is gone, there is none.

    Raises:
        RunError: no such checkpoint, a damaged one, or a ``target`` that exists.
        RecipeError: the run's recipe.toml cannot be read.
    """
    chosen = choose(path, stage, step)
    if chosen is None:
        model = _imported_model(path)
        export_hf(path, target, model, dtype=dtype)
        return _told(path, target, model, dtype, None)
    recipe = chosen.plan.recipe
    tokenizer = tokenizer_of(recipe, chosen.run)
    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "seq_len": recipe.data.seq_len,
        "card": _card(chosen),
        "fold": _fold(chosen),
    }
    export_hf(chosen.path, target, chosen.model, dtype=dtype, **options)
    return _told(chosen.path, target, chosen.model, dtype, tokenizer)


def _fold(chosen: Chosen) -> Callable[[str, Tensor], Tensor] | None:
    """What writes the mask of a G_random growth, as it stood at the checkpoint's step, into the weights."""
    mask = chosen.stage.mask
    if mask is None:
        return None
    return folding(mask.source, chosen.model, mask.layer_map, chosen.train_stage.mask_value(chosen.step))


def _imported_model(path: Path) -> Model:
    config = (seal.read_seal(path) or {}).get("config")
    if config is None:
        raise DamagedError(f"{path} is neither a run, nor a checkpoint of a run or of an import; name one")
    return model_from_config(config)


CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [llama, stackgrow]
---
# {name}

A language model of the Llama architecture with {parameters} parameters: {m.n_layers} layers of width {m.dim}, \
{m.n_heads} attention heads ({m.kv_heads} for keys and values), FFN width {m.ffn_dim}, a vocabulary of {m.vocab_size} \
tokens. It is a base model, pre-trained on {tokens} tokens in sequences of {seq_len}.

## How it was trained and grown

{history}

## Provenance

- checkpoint: {checkpoint}
- recipe: SHA-256 {recipe}, seed {seed}
- training data: SHA-256 {data}
- code: stackgrow {code}
"""


def _card(chosen: Chosen) -> str:
    """README.md: the model, the stages that led to it, and what identifies them."""
    plan, model, facts = chosen.plan, chosen.model, seal.read_seal(chosen.path) or {}
    provenance = RunFolder(chosen.run).provenance()
    stages = plan.stages[: plan.stages.index(chosen.stage) + 1]
    lines = [_history(s, facts.get("step") if s is chosen.stage else None) for s in stages]
    commits = dict.fromkeys(s.get("code", {}).get("commit", "unknown") for s in provenance.get("sessions", []))
    return CARD.format(
        name=plan.recipe.name,
        m=model,
        parameters=human(model.parameters()),
        tokens=human(facts.get("position", 0) * plan.recipe.data.seq_len),
        seq_len=plan.recipe.data.seq_len,
        history="\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1)),
        checkpoint=chosen.path.absolute().relative_to(chosen.run.absolute()),
        recipe=recipe_hash(plan.recipe),
        seed=plan.recipe.seed,
        data=provenance.get("data", {}).get("manifest_hash", "unknown"),
        code=", ".join(commits) or "unknown",
    )


def _history(stage: Stage, step: int | None) -> str:
    """One stage in one line; ``step``: how far it had come."""
    if isinstance(stage, ImportStage):
        return f"Taken over: {stage.change}."
    if isinstance(stage, GrowStage):
        layers = f"; source layer of each layer: {' '.join(map(str, stage.layer_map))}" if stage.layer_map else ""
        noise = f"; noise {stage.noise:g}" if stage.noise else ""
        return f"Grown by `{stage.operator}`: {stage.change}{layers}{noise}."
    steps, batch = stage.steps if step is None else step, stage.train.global_batch_tokens
    tokens = stage.batches.tokens(steps)
    model = f"{stage.model.n_layers} layers, {human(stage.model.parameters())} parameters"
    return f"Trained {model}, for {human(tokens)} tokens ({steps} of {stage.steps} steps of {human(batch)})."


def _told(checkpoint: Path, target: Path, model: Model, dtype: str, tokenizer: Path | None) -> str:
    missing = "" if tokenizer else "; no tokenizer, since there is no token store to take it from"
    return f"{target}  {human(model.parameters())} parameters in {dtype} from {checkpoint}{missing}"
