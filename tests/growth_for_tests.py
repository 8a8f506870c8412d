"""Small models, their weights, and what growth rules make of them: in memory, and through a checkpoint on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from stackgrow.checkpoint.convert import begin, commit, grow_checkpoint, write_part
from stackgrow.growth.rules import Compute, Rules, Zeros
from stackgrow.recipe.keys import Model

Tensors = Mapping[str, Tensor]


def weights(
    model: Model, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """Weights as large as trained ones: every norm's differ, and no tensor resembles another."""
    rng = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.rand(shape, generator=rng) + 0.5
            if len(shape) == 1
            else torch.randn(shape, generator=rng) * shape[1] ** -0.5
        ).to(dtype)
        for name, shape in model.tensors().items()
    }


def apply(rules: Rules, source: Tensors) -> dict[str, Tensor]:
    """The grown tensors, without a checkpoint. A Compute may overwrite what it gets."""
    grown = {}
    for name, rule in rules.targets.items():
        if isinstance(rule, Compute):
            grown[name] = rule.fn(*(source[s].clone() for s in rule.sources))
        elif isinstance(rule, Zeros):
            grown[name] = source[rule.like].new_zeros(rules.target_shapes[name])
        else:
            grown[name] = source[rule.source]
    return grown


def through_checkpoints(
    rules: Rules, source: Tensors, folder: Path, parts: int
) -> dict[str, Tensor]:
    """The grown tensors, read by DCP itself from a checkpoint that ``parts`` ranks have written."""
    small, grown = folder / "source", folder / f"grown-{parts}"
    if not small.exists():
        dcp.save(dict(source), checkpoint_id=small, no_dist=True)
    if parts == 1:
        grow_checkpoint(small, grown, rules)
    else:
        begin(small, grown, rules)
        for rank in reversed(range(parts)):
            write_part(small, grown, rules, rank, parts)
        commit(small, grown, rules, parts)
    dtype = next(iter(source.values())).dtype
    loaded = {
        name: torch.full(shape, torch.nan, dtype=dtype)
        for name, shape in rules.target_shapes.items()
    }
    dcp.load(loaded, checkpoint_id=grown, no_dist=True)
    return loaded


def assert_same(have: Tensors, want: Tensors) -> None:
    """Bit for bit."""
    assert set(have) == set(want)
    for name in want:
        assert have[name].dtype == want[name].dtype, name
        assert torch.equal(have[name], want[name]), name


def llama(model: Model, state: Tensors) -> torch.nn.Module:
    """torchtitan's own model, with these weights."""
    import stackgrow.titan  # noqa: F401  (the device comes before torchtitan)
    from stackgrow.titan.model import Llama, model_args

    args = model_args(model, 0)
    args.max_seq_len = 32
    built = Llama(args)
    built.load_state_dict(dict(state), strict=True)
    return built


def logits(model: Model | torch.nn.Module, state: Tensors | None = None) -> Tensor:
    """Of a fixed batch, [2, 32, V]."""
    built = llama(model, state or {}) if isinstance(model, Model) else model
    vocabulary = built.output.weight.shape[0]
    tokens = torch.randint(
        0, vocabulary, (2, 32), generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        return built(tokens)


def deviation(have: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest logit."""
    return ((have - want).abs().max() / want.abs().max()).item()
