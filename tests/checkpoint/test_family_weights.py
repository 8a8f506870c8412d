"""Every family against transformers' own class of it: logits of imports and exports, tied and untied."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from families_for_tests import SCALING, TINY
from growth_for_tests import assert_same, deviation, llama, weights
from safetensors import safe_open
from torch import Tensor

from stackgrow.checkpoint.dcp import CheckpointError
from stackgrow.checkpoint.hf import export_hf, import_hf
from stackgrow.checkpoint.hf_format import config_of, hf_name, model_from_config
from stackgrow.checkpoint.standalone import source_model
from stackgrow.recipe.keys import Model

transformers = pytest.importorskip("transformers")

ROUNDING = 1e-5  # of the largest logit: float32 through the layers
CLASSES = {
    "llama2": "Llama",
    "llama3": "Llama",
    "mistral": "Mistral",
    "qwen3": "Qwen3",
    "smollm2": "Llama",
    "qwen2": "Qwen2",
}


def loaded(folder: Path, model: Model) -> dict[str, Tensor]:
    state = {
        name: torch.full(shape, torch.nan) for name, shape in model.tensors().items()
    }
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


def tokens(model: Model) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.randint(0, model.vocab_size, (2, 32), generator=rng)


def pretrained(folder: Path, case: str) -> Any:
    """A random model of transformers' own class, with its own config, saved by it; no two weights are alike."""
    model = TINY[case]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling:
        rope |= {
            "rope_type": "llama3",
            "factor": SCALING.factor,
            "low_freq_factor": SCALING.low_freq_factor,
            "high_freq_factor": SCALING.high_freq_factor,
            "original_max_position_embeddings": SCALING.original_length,
        }
    more: dict[str, Any] = {}
    if model.family == "mistral":
        more["sliding_window"] = None
    if model.states_head_dim:
        more["head_dim"] = model.head_dim
    name = CLASSES[model.family]
    config = getattr(transformers, f"{name}Config")(
        hidden_size=model.dim,
        intermediate_size=model.ffn_dim,
        num_hidden_layers=model.n_layers,
        num_attention_heads=model.n_heads,
        num_key_value_heads=model.n_kv_heads,
        vocab_size=model.vocab_size,
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tie_embeddings,
        rope_parameters=rope,
        **more,
    )
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                weight.normal_()
            else:
                weight.normal_(0, weight.shape[1] ** -0.5)
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("case", TINY)
def test_a_model_of_transformers_has_the_same_logits_here(
    case: str, tmp_path: Path
) -> None:
    theirs = pretrained(tmp_path / "source", case)
    model = import_hf(tmp_path / "source", tmp_path / "imported")
    kept = dataclasses.asdict(TINY[case])
    if CLASSES[model.family] == "Llama":
        kept["family"] = "llama2"  # Hugging Face's name is the same for all Llamas
    assert dataclasses.asdict(model) == kept
    ours = llama(model, loaded(tmp_path / "imported", model))
    with torch.no_grad():
        expected = theirs(tokens(model)).logits
        assert deviation(ours(tokens(model)), expected) < ROUNDING


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000], ids=["one file", "shards"])
@pytest.mark.parametrize("case", TINY)
def test_an_export_has_the_same_logits_in_transformers_and_comes_back(
    case: str, shard_bytes: int, tmp_path: Path
) -> None:
    model = TINY[case]
    state = weights(model)
    dcp.save(dict(state), checkpoint_id=tmp_path / "step-1", no_dist=True)
    export_hf(tmp_path / "step-1", tmp_path / "hf", model, shard_bytes=shard_bytes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32
    )
    assert type(theirs).__name__ == f"{CLASSES[model.family]}ForCausalLM"
    with torch.no_grad():
        found = llama(model, state)(tokens(model))
        assert deviation(found, theirs(tokens(model)).logits) < ROUNDING
    back = import_hf(tmp_path / "hf", tmp_path / "back")
    assert_same(loaded(tmp_path / "back", back), state)


@pytest.mark.parametrize("case", TINY)
def test_config_tells_the_model(case: str) -> None:
    model = TINY[case]
    config = json.loads(json.dumps(config_of(model)))
    found = model_from_config(config)
    assert dataclasses.replace(found, family=model.family) == model


@pytest.mark.parametrize("case", TINY)
def test_shapes_tell_what_a_bare_checkpoint_does_not_state(
    case: str, tmp_path: Path
) -> None:
    model = TINY[case]
    dcp.save(weights(model), checkpoint_id=tmp_path / "step-1", no_dist=True)
    told = {
        name: getattr(model, name)
        for name in ("n_heads", "norm_eps", "rope_theta", "rope_scaling")
    }
    found = source_model(tmp_path / "step-1", told)
    assert found.tensors() == model.tensors()
    assert found.head_dim == model.head_dim


def test_a_tied_export_has_one_matrix(tmp_path: Path) -> None:
    """As transformers saves it, and reads it again as the head's."""
    model = TINY["smollm2"]
    dcp.save(weights(model), checkpoint_id=tmp_path / "step-1", no_dist=True)
    export_hf(tmp_path / "step-1", tmp_path / "hf", model)
    [file] = (tmp_path / "hf").glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        names = set(opened.keys())
    assert names == {hf_name(name) for name in model.tensors()}
    assert "lm_head.weight" not in names


ONLY = 'only "llama", "mistral", "Yi", "qwen2", "qwen3" can be read; '
MIXTURE = f"{ONLY}no operator here grows the router of a mixture of experts"
REFUSED = {
    "mixture of experts": ({"model_type": "qwen3_moe", "num_experts": 128}, MIXTURE),
    "another's": ({"model_type": "mixtral", "num_local_experts": 8}, MIXTURE),
    "layers without RoPE": (
        {"model_type": "smollm3", "no_rope_layers": [1, 1, 1, 0]},
        f"{ONLY}every layer here has RoPE",
    ),
    "sliding window": ({"use_sliding_window": True}, "use_sliding_window is True"),
    "windows in some layers": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        "attention is the same in every layer here",
    ),
    "yarn": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        "RoPE is scaled here by",
    ),
    "half a scaling": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}},
        "low_freq_factor is None; it must be",
    ),
    "bias of wo": ({"attention_bias": True}, "it has a bias of wo, too"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_model_here_can_be_is_refused_by_name(case: str) -> None:
    change, message = REFUSED[case]
    config = {**config_of(TINY["qwen3"]), **change}
    with pytest.raises(CheckpointError) as caught:
        model_from_config(config)
    assert message in str(caught.value)
