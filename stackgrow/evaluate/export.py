"""A checkpoint of a run as a Hugging Face folder, with a model card that tells how it was grown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor

from stackgrow import seal
from stackgrow.data.order import read_order
from stackgrow.data.store import StoreError
from stackgrow.errors import ChangedError, DamagedError
from stackgrow.evaluate.hf import export_hf
from stackgrow.evaluate.hf_format import model_from_config
from stackgrow.found import plan_of_run
from stackgrow.growth.mask import folding
from stackgrow.kinds import human
from stackgrow.load import recipe_hash
from stackgrow.plan import GrowStage, ImportStage, LearnStage, Plan, Stage
from stackgrow.recipe import Model, Recipe


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
    run = next((f for f in (path, *path.absolute().parents[:3]) if (f / "recipe.toml").is_file()), None)
    if run is None:
        model = _imported_model(path)
        export_hf(path, target, model, dtype=dtype)
        return _told(path, target, model, dtype, None)
    plan = plan_of_run(run)
    if run == path:
        chosen = _stage(plan, [stage] if stage else _finished(plan, run))
        path = _checkpoint(run / chosen.name, chosen, step)
    else:
        chosen = _stage(plan, path.absolute().parts)
    model, tokenizer = _model(chosen), _tokenizer(plan.recipe, run)
    card, seq_len = _card(plan, run, chosen, path), plan.recipe.data.seq_len
    fold = _fold(chosen, path)
    export_hf(path, target, model, tokenizer=tokenizer, dtype=dtype, seq_len=seq_len, card=card, fold=fold)
    return _told(path, target, model, dtype, tokenizer)


def _fold(stage: Stage, checkpoint: Path) -> Callable[[str, Tensor], Tensor] | None:
    """What writes the mask of a G_random growth, as it stood at the checkpoint's step, into the weights."""
    if stage.mask is None:
        return None
    step = (seal.read_seal(checkpoint) or {}).get("step", 0)
    c = 0.0 if isinstance(stage, GrowStage) else stage.mask_value(step)
    return folding(stage.mask.source, _model(stage), stage.mask.layer_map, c)


def _imported_model(path: Path) -> Model:
    config = (seal.read_seal(path) or {}).get("config")
    if config is None:
        raise DamagedError(f"{path} is neither a run, nor a checkpoint of a run or of an import; name one")
    return model_from_config(config)


def _finished(plan: Plan, run: Path) -> list[str]:
    return [s.name for s in _exportable(plan) if (run / s.name / "DONE").is_file()][-1:]


def _exportable(plan: Plan) -> list[Stage]:
    """A learn stage trains linear maps: what it leaves is no model."""
    return [stage for stage in plan.stages if not isinstance(stage, LearnStage)]


def _stage(plan: Plan, names: Sequence[str]) -> Stage:
    """The stage that has one of the names."""
    for stage in _exportable(plan):
        if stage.name in names:
            return stage
    what = f"{names[-1]} is not among" if names else "none is finished of"
    raise DamagedError(f"{what} the run's models; name one: {', '.join(s.name for s in _exportable(plan))}")


def _checkpoint(folder: Path, stage: Stage, step: int | None) -> Path:
    """The checkpoint of a step, or the newest."""
    folder = folder / "checkpoint"
    if isinstance(stage, GrowStage) and step is None:
        return folder
    steps = seal.sealed_steps(folder)
    if not steps or step not in (None, *steps):
        raise DamagedError(f"{folder} has not the checkpoint asked for; it has those of steps {steps}")
    return folder / f"step-{steps[-1] if step is None else step}"


def _model(stage: Stage) -> Model:
    return stage.target if isinstance(stage, GrowStage) else stage.model


def _tokenizer(recipe: Recipe, run: Path) -> Path | None:
    """The store's tokenizer; None where there is no store. ChangedError for a store that is not the run's."""
    try:
        order = read_order(recipe.data, recipe.seed)
    except StoreError:
        return None
    data = (seal.read_json(run / "provenance.json") or {}).get("data", {})
    manifest = order.manifests[0]
    if data.get("manifest_hash") != order.data_hash:
        raise ChangedError(f"{manifest.folder} is not the token store that {run} was trained on; move it away or back")
    return manifest.folder / manifest.tokenizer


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


def _card(plan: Plan, run: Path, chosen: Stage, checkpoint: Path) -> str:
    """README.md: the model, the stages that led to it, and what identifies them."""
    model, facts = _model(chosen), seal.read_seal(checkpoint) or {}
    provenance = seal.read_json(run / "provenance.json") or {}
    stages = plan.stages[: plan.stages.index(chosen) + 1]
    lines = [_history(s, facts.get("step") if s is chosen else None) for s in stages]
    commits = dict.fromkeys(s.get("code", {}).get("commit", "unknown") for s in provenance.get("sessions", []))
    return CARD.format(
        name=plan.recipe.name,
        m=model,
        parameters=human(model.parameters()),
        tokens=human(facts.get("position", 0) * plan.recipe.data.seq_len),
        seq_len=plan.recipe.data.seq_len,
        history="\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1)),
        checkpoint=checkpoint.absolute().relative_to(run.absolute()),
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
