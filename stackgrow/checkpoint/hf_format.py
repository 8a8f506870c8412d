"""What a Llama, Mistral, Qwen 2 or Qwen 3 of Hugging Face is: the names of its tensors, its order of rotary channels,
its config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from stackgrow.checkpoint.dcp import CheckpointError
from stackgrow.recipe.keys import Model, RopeScaling

_HF_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention.wq.bias": "self_attn.q_proj.bias",
    "attention.wk.bias": "self_attn.k_proj.bias",
    "attention.wv.bias": "self_attn.v_proj.bias",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
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


_ROTATED = (
    "attention.wq.weight",
    "attention.wk.weight",
    "attention.wq.bias",
    "attention.wk.bias",
    "attention.q_norm.weight",
    "attention.k_norm.weight",
)
_BEFORE = "take the weights as they were before"
_SCALED = f'RoPE is scaled here by "llama3" alone; {_BEFORE} the scaling'
_SETTINGS = {
    "hidden_act": Setting(("silu", "swish"), "no other activation is supported"),
    "attention_bias": Setting(
        (False,), "it has a bias of wo, too, which is not supported"
    ),
    "mlp_bias": Setting((False,), "biases of the SwiGLU layer are not supported"),
    "tie_word_embeddings": Setting((False, True), "it must be true or false"),
    "use_sliding_window": Setting(
        (False,),
        "attention has no window here; where texts are shorter, set it to false",
    ),
    "quantization_config": Setting((None,), f"{_BEFORE} quantization"),
    "rope_type": Setting(("default", "llama3"), _SCALED),
    "type": Setting(("default", "llama3"), _SCALED),
    "partial_rotary_factor": Setting((1.0,), "RoPE turns whole heads here"),
}
_WRITTEN = ("hidden_act", "attention_bias", "mlp_bias", "tie_word_embeddings")
# RopeScaling's numbers, in rope_parameters or rope_scaling.
_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_length": "original_max_position_embeddings",
}


@dataclass(frozen=True)
class _Type:
    """A model_type of config.json: its class, our family of that name, what of its defaults is not Llama's, and what is
    written for it beside Llama's keys."""

    architecture: str
    title: str
    family: str = "llama2"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    written: Mapping[str, Any] = field(default_factory=dict)


# What tells a model of another kind, and why it cannot be read.
_MIXTURE = "; no operator here grows the router of a mixture of experts"
_OTHER_KINDS = {
    "num_experts": _MIXTURE,
    "num_local_experts": _MIXTURE,
    "n_routed_experts": _MIXTURE,
    "no_rope_layers": "; every layer here has RoPE, and some of SmolLM 3's have none",
}
_GROUPED = {"num_key_value_heads": 32}
_TYPES = {
    "llama": _Type("LlamaForCausalLM", "Llama"),
    "mistral": _Type(
        "MistralForCausalLM",
        "Mistral",
        "mistral",
        {"num_key_value_heads": 8, "sliding_window": 4096},
        {"sliding_window": None},
    ),
    "Yi": _Type("YiForCausalLM", "Llama"),
    "qwen2": _Type("Qwen2ForCausalLM", "Qwen 2", "qwen2", _GROUPED),
    "qwen3": _Type(
        "Qwen3ForCausalLM", "Qwen 3", "qwen3", {**_GROUPED, "head_dim": 128}
    ),
}


def hf_name(name: str) -> str:
    """transformers' name of a tensor by its name here; KeyError for what is none."""
    if not name.startswith("layers."):
        return _HF_NAMES[name]
    index, _, rest = name.removeprefix("layers.").partition(".")
    return f"model.layers.{index}.{_HF_NAMES[rest]}"


def to_hf(tensor: Tensor, name: str, model: Model) -> Tensor:
    """A tensor in transformers' order; ``name`` is its name here.

    RoPE turns channels 2i and 2i + 1 of a head together in torchtitan, i and i + head_dim / 2 in transformers: the
    rows of wq and wk, [heads x head_dim, D], trade places within each head, query and key heads alike, and so do their
    biases and the weights of their norms.
    """
    return _regrouped(tensor, name, (model.head_dim // 2, 2))


def from_hf(tensor: Tensor, name: str, model: Model) -> Tensor:
    """The inverse of ``to_hf``."""
    return _regrouped(tensor, name, (2, model.head_dim // 2))


def _regrouped(tensor: Tensor, name: str, groups: tuple[int, int]) -> Tensor:
    if not name.endswith(_ROTATED):
        return tensor
    return (
        tensor.reshape(-1, *groups, *tensor.shape[1:])
        .transpose(1, 2)
        .reshape(tensor.shape)
    )


def model_type(model: Model) -> str:
    """transformers' name of what computes the same."""
    if model.attention_bias:
        return "qwen2"
    if model.qk_norm:
        return "qwen3"
    return "mistral" if model.family == "mistral" else "llama"


def architecture_title(model: Model) -> str:
    """As a reader knows it: Llama, Qwen 3."""
    return _TYPES[model_type(model)].title


def config_of(model: Model, seq_len: int | None = None) -> dict[str, Any]:
    """config.json of a model; ``seq_len`` is the length that it was trained on."""
    name = model_type(model)
    config: dict[str, Any] = {
        "model_type": name,
        "architectures": [_TYPES[name].architecture],
        **_TYPES[name].written,
    }
    for ours, (theirs, _) in _NUMBERS.items():
        config[theirs] = getattr(model, ours)
    config["head_dim"] = model.head_dim
    # transformers 4 and 5 read this; 5 alone reads rope_parameters.
    config["rope_scaling"] = None
    if model.rope_scaling:
        config["rope_scaling"] = {"rope_type": "llama3"}
        for ours, theirs in _SCALING.items():
            config["rope_scaling"][theirs] = getattr(model.rope_scaling, ours)
    for key in _WRITTEN:
        config[key] = _SETTINGS[key].accepted[0]
    config["tie_word_embeddings"] = model.tie_embeddings
    if seq_len:
        config["max_position_embeddings"] = seq_len
    return config


def model_from_config(config: Mapping[str, Any]) -> Model:
    """The Model that a config.json describes.

    Raises:
        CheckpointError: all that no model here can represent, and what to do about it.
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
    for ours, (key, default) in _NUMBERS.items():
        value = default if flat.get(key) is None else flat[key]
        problems += _parsed(Model, ours, key, value, values)
    if flat.get("head_dim") is not None:
        problems += _parsed(Model, "head_dim_", "head_dim", flat["head_dim"], values)
    scaling: dict[str, Any] = {}
    if "llama3" in (flat.get("rope_type"), flat.get("type")):
        for ours, key in _SCALING.items():
            problems += _parsed(RopeScaling, ours, key, flat.get(key), scaling)
    if values.keys() >= _NUMBERS.keys():
        problems += _head_problems(values)
    if problems:
        return None, problems
    values["tie_embeddings"] = bool(flat.get("tie_word_embeddings"))
    values["rope_scaling"] = RopeScaling(**scaling) if scaling else None
    return _without_implied_width(
        Model(_TYPES[flat["model_type"]].family, **values)
    ), []


def _parsed(
    cls: type, ours: str, key: str, value: Any, into: dict[str, Any]
) -> Iterator[str]:
    """Puts a number of config.json ``into`` the arguments of ``cls``, or tells what is wrong with it."""
    [spec] = [spec for spec in dataclasses.fields(cls) if spec.name == ours]
    try:
        into[ours] = spec.metadata["kind"].parse(value)
    except ValueError as error:
        yield f"{key} is {value!r:.60}; it must be {error}"


def _without_implied_width(model: Model) -> Model:
    """Two models of one geometry are equal, whether or not their heads' width is stated where it would be the same."""
    implied = dataclasses.replace(model, head_dim_=None)
    return implied if implied.head_dim == model.head_dim else model


def _family_problems(flat: dict[str, Any]) -> Iterator[str]:
    """Whether it is of a type that is known, whose defaults are filled in."""
    name = flat.get("model_type")
    if not isinstance(name, str) or name not in _TYPES:
        known = ", ".join(f'"{known_name}"' for known_name in _TYPES)
        reasons = [why for key, why in _OTHER_KINDS.items() if flat.get(key)]
        yield f"model_type is {name!r:.60}; only {known} can be read{''.join(reasons[:1])}"
        return
    architecture, defaults = _TYPES[name].architecture, _TYPES[name].defaults
    for key, default in defaults.items():
        flat.setdefault(key, default)
    classes = flat.get("architectures")
    if classes not in (None, [architecture], ["LlamaForCausalLM"]):
        yield f"architectures is {classes!r:.60}, not [{architecture!r}]: save it from that class, head included"
    window = flat.get("sliding_window") if "sliding_window" in defaults else None
    if window is not None:
        yield f"sliding_window is {window!r:.40}: attention has no window here; where texts are shorter, set it to null"
    types = flat.get("layer_types") or []
    if set(types) - {"full_attention"}:
        yield f"layer_types is {types!r:.60}: attention is the same in every layer here, without a window"


def _setting_problems(config: Mapping[str, Any]) -> Iterator[str]:
    for key, setting in _SETTINGS.items():
        value = config.get(key)
        if value is not None and value not in setting.accepted:
            yield f"{key} is {value!r:.60}, not {setting.accepted[0]!r}: {setting.remedy}"


def _head_problems(values: Mapping[str, Any]) -> Iterator[str]:
    dim, n_heads, n_kv_heads = (values[key] for key in ("dim", "n_heads", "n_kv_heads"))
    stated = values.get("head_dim_")
    if stated is None and (dim / n_heads) % 2:
        yield f"hidden_size {dim} does not give each of {n_heads} heads an even number of channels"
    if stated is not None and stated % 2:
        yield f"head_dim is {stated}; rotary embeddings need an even number of channels"
    if n_kv_heads and n_heads % n_kv_heads:
        yield f"num_key_value_heads {n_kv_heads} does not divide num_attention_heads {n_heads}"
