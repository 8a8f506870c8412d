"""A checkpoint of a run as a Hugging Face folder, with a model card that tells how it was grown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from stackgrow import seal
from stackgrow.checkpoint.carried import carried_by, carried_files
from stackgrow.checkpoint.grow import growth_sentence
from stackgrow.checkpoint.hf import Dtype, Exported, export_hf
from stackgrow.checkpoint.hf_format import (
    architecture_title,
    model_from_config,
    model_type,
)
from stackgrow.checkpoint.hf_tokenizer import StoredTokenizer
from stackgrow.data.store import StoreError, TokenStore, read_manifest
from stackgrow.data.tokenizer import Tokenizer, store_tokenizer
from stackgrow.errors import DamagedError
from stackgrow.growth.mask import folding
from stackgrow.plan.stages import GrowStage, ImportStage, Stage
from stackgrow.recipe.keys import Model
from stackgrow.recipe.write import recipe_hash
from stackgrow.run_folder.choose import Chosen, choose, tokenizer_of
from stackgrow.run_folder.folder import RunFolder
from stackgrow.text import human

SAMPLES = 16  # texts of the store on which the exported tokenizer is compared
SAMPLE_TOKENS = 512


def export_run(
    path: Path,
    target: Path,
    *,
    stage: str | None = None,
    step: int | None = None,
    dtype: Dtype | None = None,
) -> str:
    """Exports a run, or one checkpoint; returns a line that says what.

    Of a run: the last checkpoint of its last finished stage, or of ``stage``, or the one of ``step``. A checkpoint gets
    its geometry from the run that it lies in, or from the seal of its import. The tokenizer is the token store's; where
    the store is gone, there is none. What came from Hugging Face has its own. ``dtype``: float32, or that of an import.

    Raises:
        RunError: no such checkpoint, a damaged one, or a ``target`` that exists.
        RecipeError: the run's recipe.toml cannot be read.
    """
    chosen = choose(path, stage, step)
    if chosen is None:
        return _export_imported(path, target, dtype)
    recipe = chosen.plan.recipe
    tokenizer_file = tokenizer_of(recipe, chosen.run)
    tokenizer = _stored_tokenizer(tokenizer_file.parent) if tokenizer_file else None
    exported = export_hf(
        chosen.path,
        target,
        chosen.model,
        tokenizer=tokenizer,
        dtype=dtype,
        seq_len=recipe.data.seq_len,
        card=_card(chosen),
        fold=_fold(chosen),
    )
    line = _line(target, chosen.model, exported, chosen.path)
    if exported.tokenizer is None:
        line += "; no tokenizer, since there is no token store to take it from"
    elif exported.tokenizer.differing:
        differing = exported.tokenizer.differing
        line += f"; tokenizer.json gives other ids to {len(differing)} of {exported.tokenizer.texts} texts: "
        line += ", ".join(differing)
    return line


def _stored_tokenizer(store: Path) -> StoredTokenizer:
    manifest = read_manifest(store)
    tokenizer = store_tokenizer(manifest)
    return StoredTokenizer(
        tokenizer, manifest.document_ends, _samples(store, tokenizer)
    )


def _samples(store: Path, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Texts from all over the store's training data; none where these are gone."""
    try:
        tokens = TokenStore.open(store)
        windows = tokens.windows(SAMPLE_TOKENS)
        samples = []
        for number in range(min(SAMPLES, windows)):
            start = number * windows // SAMPLES * SAMPLE_TOKENS
            samples.append(
                tokenizer.decode(tokens.tokens(start, start + SAMPLE_TOKENS).tolist())
            )
    except StoreError:
        return ()
    return tuple(samples)


def _line(target: Path, model: Model, exported: Exported, checkpoint: Path) -> str:
    return f"{target}  {human(model.parameters())} parameters in {exported.dtype} from {checkpoint}"


def _export_imported(path: Path, target: Path, dtype: Dtype | None) -> str:
    """A checkpoint that lies in no run: it was imported from Hugging Face, or grown from what was."""
    config = (seal.read_seal(path) or {}).get("config")
    if config is None:
        raise DamagedError(
            f"{path} is neither a run, nor a checkpoint of a run or of an import; name one"
        )
    model = model_from_config(config)
    exported = export_hf(
        path, target, model, dtype=dtype, card=_imported_card(path, target, model)
    )
    line = _line(target, model, exported, path)
    names = {file.name for file in carried_files(path)}
    if not names & {"hf-tokenizer.json", "hf-tokenizer.model"}:
        line += "; no tokenizer, since none came with the source: copy the files of the base model's into it"
    return line


def _fold(chosen: Chosen) -> Callable[[str, Tensor], Tensor] | None:
    """What writes the mask of a G_random growth, as it stood at the checkpoint's step, into the weights."""
    mask = chosen.stage.mask
    if mask is None:
        return None
    return folding(
        mask.source,
        chosen.model,
        mask.layer_map,
        chosen.train_stage.mask_value(chosen.step),
    )


CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [{tag}, stackgrow]
---
# {name}

{geometry} It is a base model, pre-trained on {tokens} tokens in sequences of {seq_len}.

## How it was trained and grown

{history}

## Provenance

- checkpoint: {checkpoint}
- recipe: SHA-256 {recipe}, seed {seed}
- training data: SHA-256 {data}
- code: stackgrow {code}
"""


GROWN_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
base_model: {base}
tags: [{tag}, stackgrow]
---
# {name}

{geometry} It was made from {base}, whose license applies, and has not been trained since.

## How it was grown

{history}
"""


def _geometry(model: Model) -> str:
    """The first sentence of a card."""
    return (
        f"A language model of the {architecture_title(model)} architecture with "
        f"{human(model.parameters())} parameters: "
        f"{model.n_layers} layers of width {model.dim}, {model.n_heads} attention heads "
        f"({model.kv_heads} for keys and values), FFN width {model.ffn_dim}, a vocabulary of {model.vocab_size} tokens."
    )


def _numbered(lines: list[str]) -> str:
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, start=1))


def _imported_card(checkpoint: Path, target: Path, model: Model) -> str | None:
    """README.md of what came from Hugging Face; None where nothing is known of that."""
    carried = carried_by(checkpoint)
    if not carried:
        return None
    history = carried["history"] or [
        "Not at all: its weights are those of the base model."
    ]
    return GROWN_CARD.format(
        base=carried["base_model"],
        tag=model_type(model),
        name=target.name,
        geometry=_geometry(model),
        history=_numbered(history),
    )


def _card(chosen: Chosen) -> str:
    """README.md: the model, the stages that led to it, and what identifies them."""
    plan = chosen.plan
    seal_facts = seal.read_seal(chosen.path) or {}
    provenance = RunFolder(chosen.run).provenance()

    history = []
    for stage in plan.stages[: chosen.stage.index + 1]:
        step = seal_facts.get("step") if stage is chosen.stage else None
        history.append(_history(stage, step))
    commits = []
    for session in provenance.get("sessions", []):
        commit = session.get("code", {}).get("commit", "unknown")
        if commit not in commits:
            commits.append(commit)

    return CARD.format(
        name=plan.recipe.name,
        tag=model_type(chosen.model),
        geometry=_geometry(chosen.model),
        tokens=human(seal_facts.get("position", 0) * plan.recipe.data.seq_len),
        seq_len=plan.recipe.data.seq_len,
        history=_numbered(history),
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
        return growth_sentence(stage)
    steps = stage.steps if step is None else step
    tokens = human(stage.batches.tokens(steps))
    batch = human(stage.train.global_batch_tokens)
    model = (
        f"{stage.model.n_layers} layers, {human(stage.model.parameters())} parameters"
    )
    return f"Trained {model}, for {tokens} tokens ({steps} of {stage.steps} steps of {batch})."
