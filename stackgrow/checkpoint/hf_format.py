"""What a Hugging Face Llama is: the names of its tensors, its order of rotary channels, its config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stackgrow.checkpoint.dcp import CheckpointError
from stackgrow.recipe.keys import Model

_HF_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# A Model's numbers in config.json, with what transformers takes where one is absent.
_NUMBERS: dict[str, tuple[str, Any]] = {
    "dim": ("hidden_size", None),
    "n_layers": ("num_hidden_layers", None),
    "n_heads": ("num_attention_heads", None),
    "n_kv_heads": ("num_key_value_heads", 0),  # as many as n_heads
    "ffn_dim": ("intermediate_size", None),
    "vocab_size": ("vocab_size", None),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "rope_theta": ("rope_theta", 10000.0),
}


@dataclass(frozen=True)
class Setting:
    """What a Model cannot have otherwise: the values that mean it, of which the first is what transformers takes where
    there is none, and the remedy."""

    accepted: tuple[Any, ...]
    remedy: str


_BEFORE = "take the weights as they were before"
_SETTINGS = {
    "hidden_act": Setting(("silu", "swish"), "no other activation is supported"),
    "attention_bias": Setting((False,), "biases are not supported"),
    "mlp_bias": Setting((False,), "biases are not supported"),
    "tie_word_embeddings": Setting(
        (False,),
        "set it to false in transformers, give lm_head a copy of the embedding, save again",
    ),
    "quantization_config": Setting((None,), f"{_BEFORE} quantization"),
    "rope_type": Setting(
        ("default",), f"RoPE is not scaled here; {_BEFORE} the scaling"
    ),
    "type": Setting(("default",), f"RoPE is not scaled here; {_BEFORE} the scaling"),
    "partial_rotary_factor": Setting((1.0,), "RoPE turns whole heads here"),
}
_WRITTEN = ("hidden_act", "attention_bias", "mlp_bias", "tie_word_embeddings")
# {model_type: the class whose head and names are Llama's, and what of its defaults is not}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "mistral": (
        "MistralForCausalLM",
        {"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "Yi": ("YiForCausalLM", {}),
}


def hf_name(name: str) -> str:
    """transformers' name of a torchtitan parameter; KeyError for what is none."""
    if not name.startswith("layers."):
        return _HF_NAMES[name]
    index, _, rest = name.removeprefix("layers.").partition(".")
    return f"model.layers.{index}.{_HF_NAMES[rest]}"


def to_hf(tensor: Tensor, name: str, model: Model) -> Tensor:
    """A torchtitan parameter in transformers' order; ``name`` is torchtitan's.

    RoPE turns channels 2i and 2i + 1 of a head together in torchtitan, i and i + head_dim / 2 in transformers: the
    rows of wq and wk, [heads x head_dim, D], trade places within each head, query and key heads alike.
    """
    return _regrouped(tensor, name, (model.head_dim // 2, 2))


def from_hf(tensor: Tensor, name: str, model: Model) -> Tensor:
    """The inverse of ``to_hf``; ``name`` is torchtitan's."""
    return _regrouped(tensor, name, (2, model.head_dim // 2))


def _regrouped(tensor: Tensor, name: str, groups: tuple[int, int]) -> Tensor:
    if not name.endswith(("attention.wq.weight", "attention.wk.weight")):
        return tensor
    return (
        tensor.reshape(-1, *groups, tensor.shape[1])
        .transpose(1, 2)
        .reshape(tensor.shape)
    )


def config_of(model: Model, seq_len: int | None = None) -> dict[str, Any]:
    """config.json of a model; ``seq_len`` is the length that it was trained on."""
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
    }
    for ours, (theirs, _) in _NUMBERS.items():
        config[theirs] = getattr(model, ours)
    config["head_dim"] = model.head_dim
    config["rope_scaling"] = (
        None  # transformers 4 and 5 read this; 5 alone reads rope_parameters
    )
    for key in _WRITTEN:
        config[key] = _SETTINGS[key].accepted[0]
    if seq_len:
        config["max_position_embeddings"] = seq_len
    return config


def model_from_config(config: Mapping[str, Any]) -> Model:
    """The Model that a config.json describes.

    Raises:
        CheckpointError: all that a Llama-2-style model here cannot represent, and what to do about it.
    """
    model, problems = read_config(config)
    if model is None:
        raise CheckpointError("config.json: " + "; ".join(problems))
    return model


def read_config(config: Mapping[str, Any]) -> tuple[Model | None, list[str]]:
    """The Model, or None and all problems."""
    flat = dict(config)
    for key in (
        "rope_parameters",
        "rope_scaling",
    ):  # transformers 5 keeps there what 4 had in config.json itself
        rope = config.get(key) or {}
        flat.update(rope if isinstance(rope, Mapping) else {"rope_type": rope})
    problems = [*_family_problems(flat), *_setting_problems(flat)]

    values: dict[str, Any] = {}
    kinds = {f.name: f.metadata["kind"] for f in dataclasses.fields(Model)}
    for ours, (key, default) in _NUMBERS.items():
        value = default if flat.get(key) is None else flat[key]
        try:
            values[ours] = kinds[ours].parse(value)
        except ValueError as error:
            problems.append(f"{key} is {flat.get(key)!r:.60}; it must be {error}")
    if values.keys() == _NUMBERS.keys():
        problems += _head_problems(
            flat, values["dim"], values["n_heads"], values["n_kv_heads"]
        )
    if problems:
        return None, problems
    return Model(family="llama2", **values), []


def _family_problems(flat: dict[str, Any]) -> Iterator[str]:
    """Whether it is Llama or a family that differs in name alone, whose defaults are filled in."""
    family = flat.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        known = ", ".join(f'"{name}"' for name in _FAMILIES)
        yield f"model_type is {family!r:.60}; only {known} can be read"
        return
    architecture, defaults = _FAMILIES[family]
    for key, default in defaults.items():
        flat.setdefault(key, default)
    classes = flat.get("architectures")
    if classes not in (None, [architecture], ["LlamaForCausalLM"]):
        yield f"architectures is {classes!r:.60}, not [{architecture!r}]: save it from that class, head included"
    window = flat.get("sliding_window") if "sliding_window" in defaults else None
    if window is not None:
        yield f"sliding_window is {window!r:.40}: attention has no window here; where texts are shorter, set it to null"


def _setting_problems(config: Mapping[str, Any]) -> Iterator[str]:
    for key, setting in _SETTINGS.items():
        value = config.get(key)
        if value is not None and value not in setting.accepted:
            yield f"{key} is {value!r:.60}, not {setting.accepted[0]!r}: {setting.remedy}"


def _head_problems(
    config: Mapping[str, Any], dim: int, n_heads: int, n_kv_heads: int
) -> Iterator[str]:
    width = dim / n_heads
    if width % 2:
        yield f"hidden_size {dim} does not give each of {n_heads} heads an even number of channels"
    if config.get("head_dim") not in (None, width):
        yield f"head_dim is {config['head_dim']!r:.60}; it must be hidden_size / num_attention_heads = {width:g}"
    if n_kv_heads and n_heads % n_kv_heads:
        yield f"num_key_value_heads {n_kv_heads} does not divide num_attention_heads {n_heads}"
