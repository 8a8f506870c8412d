"""AdamW's moments at growth: c m and c^2 v for the c that the weights have, or, asymmetric, for first copies alone."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from growth_for_tests import Tensors, apply, assert_same, through_checkpoints, weights

from stackgrow import seal
from stackgrow.checkpoint.convert import (
    CheckpointError,
    begin,
    grow_checkpoint,
    write_part,
)
from stackgrow.checkpoint.dcp import METADATA, is_model_key
from stackgrow.checkpoint.grow import grow, rules_of
from stackgrow.growth.depth import interleave_map, stack_map
from stackgrow.growth.moments import key
from stackgrow.growth.rules import Rules
from stackgrow.plan.stages import GrowStage
from stackgrow.recipe.keys import Model
from stackgrow.run_folder.folder import GROWTH

GQA = Model(
    family="llama2",
    dim=16,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    ffn_dim=20,
    vocab_size=31,
)
MHA = replace(GQA, n_kv_heads=4)
DEEP, WIDE = {"n_layers": 4}, {"dim": 32, "n_heads": 8, "ffn_dim": 40}
STACK, INTERLEAVE = tuple(stack_map(2, 4)), tuple(interleave_map(2, 4))
# operator, source, what grows, layer map, noise
CASES = {
    "stack": ("stack", GQA, DEEP, STACK, 0.0),
    "interleave": ("stack", GQA, DEEP, INTERLEAVE, 0.0),
    "drop a layer": ("stack", GQA, {"n_layers": 3}, (1, 1, 1), 0.0),
    "stack, noise": ("stack", GQA, DEEP, STACK, 0.2),
    "split mha": ("split", MHA, {**WIDE, "n_kv_heads": 8}, None, 0.0),
    "split gqa": ("split", GQA, {**WIDE, "n_kv_heads": 4}, None, 0.0),
    "split by 3/2": (
        "split",
        MHA,
        {"dim": 24, "n_heads": 6, "n_kv_heads": 6, "ffn_dim": 29},
        None,
        0.0,
    ),
    "split both": ("split", GQA, {**DEEP, **WIDE, "n_kv_heads": 4}, STACK, 0.0),
    "zero depth": ("zero", GQA, DEEP, INTERLEAVE, 0.0),
    "zero wider heads": ("zero", GQA, {"dim": 32, "ffn_dim": 40}, None, 0.0),
    "zero both": ("zero", GQA, {**DEEP, **WIDE, "n_kv_heads": 4}, STACK, 0.0),
    "zero both, noise": ("zero", GQA, {**DEEP, **WIDE, "n_kv_heads": 4}, STACK, 0.2),
    "shrink": ("shrink", MHA, {**WIDE, "n_kv_heads": 8}, None, 0.0),
    "random depth": ("random", GQA, DEEP, STACK, 0.0),
    "random both": ("random", GQA, {**DEEP, **WIDE, "n_kv_heads": 4}, STACK, 0.0),
}


def stage_of(case: str, optimizer: str | None) -> GrowStage:
    operator, source, grown, layer_map, noise = CASES[case]
    return GrowStage(
        1,
        source,
        replace(source, **grown),
        operator,
        layer_map,
        noise,
        5,
        optimizer=optimizer,
    )


def state_of(
    model: Model, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Weights, moments and step counters as a checkpoint holds them; the counters differ."""
    w, m = weights(model, dtype), weights(model, dtype, seed=1)
    state = dict(w)
    for i, name in enumerate(w):
        state |= {
            key(name, "exp_avg"): m[name],
            key(name, "exp_avg_sq"): m[name].square() + 1e-3,
        }
        state[key(name, "step")] = torch.tensor(float(i + 1), dtype=dtype)
    return state


def coefficients(rules: Rules, x: Tensors) -> dict[str, torch.Tensor]:
    """What the rules of the weights do to ``x``, without what does not depend on it."""
    zero = {name: torch.zeros_like(tensor) for name, tensor in x.items()}
    have, offset = apply(rules, x), apply(rules, zero)
    return {name: have[name] - offset[name] for name in have}


@pytest.mark.parametrize("optimizer", ["copy", "asymmetric"])
@pytest.mark.parametrize("case", CASES)
def test_moments_follow_the_map_of_the_weights(case: str, optimizer: str) -> None:
    stage = stage_of(case, optimizer)
    source, plain = (
        state_of(stage.source, torch.float64),
        rules_of(replace(stage, optimizer=None)),
    )
    grown = apply(rules_of(stage), source)
    names = list(stage.source.tensors())
    sizes = torch.tensor([source[name].numel() for name in names]).cumsum(0).tolist()
    starts = dict(zip(names, [0, *sizes], strict=False))
    numbers = {
        n: torch.arange(starts[n], starts[n] + source[n].numel())
        .double()
        .view_as(source[n])
        + 1
        for n in names
    }
    c = coefficients(plain, {name: torch.ones_like(source[name]) for name in names})
    which = coefficients(plain, numbers)
    m = coefficients(plain, {name: source[key(name, "exp_avg")] for name in names})
    v = coefficients(plain, {name: source[key(name, "exp_avg_sq")] for name in names})
    seen: set[int] = set()
    for name in stage.target.tensors():  # the model's own order
        kept = torch.ones_like(c[name], dtype=torch.bool)
        if optimizer == "asymmetric":
            number = (
                (which[name] / c[name].where(c[name] != 0, torch.inf))
                .round()
                .long()
                .flatten()
            )
            kept = torch.zeros(number.numel(), dtype=torch.bool)
            for i, n in enumerate(number.tolist()):
                kept[i] = n != 0 and n not in seen
                seen.add(n)
            kept = kept.view_as(c[name])
        zero = torch.zeros((), dtype=torch.float64)
        torch.testing.assert_close(
            grown[key(name, "exp_avg")],
            m[name].where(kept, zero),
            rtol=1e-12,
            atol=1e-18,
        )
        torch.testing.assert_close(
            grown[key(name, "exp_avg_sq")],
            (c[name] * v[name]).where(kept, zero),
            rtol=1e-12,
            atol=1e-18,
        )
        origin = {
            int(n)
            for n in (which[name] / c[name].where(c[name] != 0, torch.inf))
            .round()
            .flatten()
        } - {0}
        if (optimizer == "asymmetric" and not kept.any()) or not origin:
            assert grown[key(name, "step")] == 0, "a tensor of new weights begins"
        else:
            first = max(
                n
                for n in names
                if starts[n] < min(origin) <= starts[n] + source[n].numel()
            )
            assert grown[key(name, "step")] == source[key(first, "step")]


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("case", ["stack", "split both", "zero both"])
def test_moments_through_checkpoints(case: str, parts: int, tmp_path: Path) -> None:
    stage = stage_of(case, "asymmetric")
    rules, source = rules_of(stage), state_of(stage.source)
    assert_same(
        through_checkpoints(rules, source, tmp_path, parts), apply(rules, source)
    )


def test_a_stack_with_its_moments_moves_no_bytes(tmp_path: Path) -> None:
    stage = stage_of("stack", "copy")
    through_checkpoints(
        rules_of(replace(stage, optimizer=None)), state_of(stage.source), tmp_path, 1
    )
    record = grow_checkpoint(tmp_path / "source", tmp_path / "moments", rules_of(stage))
    assert record["bytes_written"] == (tmp_path / "moments" / METADATA).stat().st_size
    assert all(map(is_model_key, record["map"]))


def test_zeros_are_written_once_for_each_shape(tmp_path: Path) -> None:
    stage = stage_of("stack", "asymmetric")
    rules, source = rules_of(stage), state_of(stage.source)
    through_checkpoints(rules, source, tmp_path, 2)
    data = sum(file.stat().st_size for file in (tmp_path / "grown-2").glob("__grown*"))
    shapes = {
        shape
        for name, shape in stage.source.tensors().items()
        if name.startswith("layers.")
    }
    assert data < 4 * sum(math.prod(shape) for shape in shapes) + 2000 * (
        len(shapes) + 1
    )


def test_a_source_without_moments_is_refused(tmp_path: Path) -> None:
    stage = stage_of("stack", "copy")
    through_checkpoints(
        rules_of(replace(stage, optimizer=None)), weights(stage.source), tmp_path, 1
    )
    with pytest.raises(
        CheckpointError,
        match=r"optimizer\.state\.layers\.0\.attention\.wk\.weight\.exp_avg is missing",
    ):
        begin(tmp_path / "source", tmp_path / "moments", rules_of(stage))


def sealed(folder: Path, stage: GrowStage) -> Path:
    """A source as a run leaves it, with its seal."""
    from stackgrow.seal.tensors import fingerprint

    state = state_of(stage.source)
    through_checkpoints(rules_of(replace(stage, optimizer=None)), state, folder, 1)
    source = folder / "source"
    marks = {name: fingerprint(tensor) for name, tensor in state.items()}
    facts = {
        "position": 3, "stage_hash": "0", "tensors": {n: m for n, m in marks.items() if is_model_key(n)},
        "moments": {n: m for n, m in marks.items() if not is_model_key(n)},
    }  # fmt: skip
    seal.seal(source, seal.file_records(source, seal.contents(source)), facts)
    return source


def test_a_grown_checkpoint_has_the_fingerprint_of_every_moment(tmp_path: Path) -> None:
    stage = stage_of("split gqa", "copy")
    source = sealed(tmp_path, stage)
    grow(stage, "1", source, tmp_path / "target")
    manifest = seal.read_seal(tmp_path / "target")
    assert manifest is not None
    assert manifest["moments"].keys() == {
        n for n in rules_of(stage).targets if not is_model_key(n)
    }
    assert manifest["tensors"].keys() == stage.target.tensors().keys()
    assert json.loads((tmp_path / GROWTH).read_text())["optimizer"] == "copy"


@pytest.mark.parametrize(
    "name", ["layers.1.attention.wq.weight", key("norm.weight", "exp_avg_sq")]
)
def test_a_damaged_source_tensor_is_not_folded_in(tmp_path: Path, name: str) -> None:
    stage = stage_of("split gqa", "copy")
    source = sealed(tmp_path, stage)
    manifest = seal.read_seal(source)
    assert manifest is not None
    marks = {**manifest["tensors"], **manifest["moments"], name: "0123456789abcdef"}
    begin(source, tmp_path / "target", rules_of(stage))
    with pytest.raises(
        CheckpointError, match=f"{name} is not what was saved; restore the checkpoint"
    ):
        write_part(source, tmp_path / "target", rules_of(stage), fingerprints=marks)


def test_a_seal_without_moments_is_refused(tmp_path: Path) -> None:
    stage = stage_of("stack", "copy")
    source = sealed(tmp_path, stage)
    manifest = seal.read_seal(source)
    assert manifest is not None
    seal.write_json(
        source / seal.MANIFEST,
        {name: value for name, value in manifest.items() if name != "moments"},
    )
    with pytest.raises(
        CheckpointError, match=r"its seal has no fingerprint of optimizer\.state"
    ):
        grow(stage, "1", source, tmp_path / "target")
