"""Import and export against transformers' own Llama and against DCP's own loader."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from growth_for_tests import assert_same, deviation, llama, weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from stackgrow import seal
from stackgrow.checkpoint.convert import grow_checkpoint
from stackgrow.checkpoint.dcp import CheckpointError, read_metadata, tensor_shapes
from stackgrow.checkpoint.direct import BLOCK
from stackgrow.checkpoint.hf import export_hf, import_hf
from stackgrow.checkpoint.hf_format import (
    config_of,
    from_hf,
    hf_name,
    model_from_config,
    to_hf,
)
from stackgrow.growth.depth import depth_rules, stack_map
from stackgrow.growth.learned import initial_network
from stackgrow.growth.operators import OPERATORS, growth_rules
from stackgrow.recipe.keys import Model

transformers = pytest.importorskip("transformers")

MODEL = Model(
    family="llama2",
    dim=48,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    ffn_dim=88,
    vocab_size=300,
    norm_eps=2e-5,
)


def saved(folder: Path, model: Model = MODEL, **more: Any) -> dict[str, Tensor]:
    """Weights, and a checkpoint of them at ``folder``."""
    state = weights(model)
    dcp.save({**state, **more}, checkpoint_id=folder, no_dist=True)
    return state


def loaded(folder: Path, model: Model) -> dict[str, Tensor]:
    """What DCP itself reads, which converts without a word."""
    assert {dtype for _, dtype in tensor_shapes(read_metadata(folder)).values()} == {
        torch.float32
    }
    state = {
        name: torch.full(shape, torch.nan) for name, shape in model.tensors().items()
    }
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


def tokens(model: Model) -> Tensor:
    return torch.randint(
        0, model.vocab_size, (2, 32), generator=torch.Generator().manual_seed(1)
    )


@torch.no_grad()
def assert_same_logits(folder: Path, model: Model, state: dict[str, Tensor]) -> None:
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # float32 rounding through the layers: 1e-5 of the largest logit.
    assert (
        deviation(theirs(tokens(model)).logits, llama(model, state)(tokens(model)))
        < 1e-5
    )


def pretrained(folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A random model that transformers made and saved, every norm's weights different."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=48, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=300, rope_theta=500000.0, **more,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return model


def edited(file: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A Llama folder that can be imported."""
    pretrained(tmp_path / "source")
    return tmp_path / "source"


def refused(source: Path) -> str:
    """Why ``source`` is not imported; nothing is left behind."""
    target = source.parent / "target"
    with pytest.raises(CheckpointError) as caught:
        import_hf(source, target)
    assert not target.exists()
    assert not target.with_name("target.tmp").exists()
    return str(caught.value)


def test_names_are_those_of_transformers() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config_of(MODEL)))
    theirs = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {hf_name(name): shape for name, shape in MODEL.tensors().items()} == theirs
    assert len(theirs) == len(MODEL.tensors()), "no two have one name"
    for name in ("freqs_cis", "layers.0.attention.wo.bias", "layers.0"):
        with pytest.raises(KeyError):
            hf_name(name)


def test_reordering_keeps_heads_and_is_undone() -> None:
    for name, tensor in weights(MODEL).items():
        moved = to_hf(tensor, name, MODEL)
        assert torch.equal(from_hf(moved, name, MODEL), tensor)
        assert torch.equal(moved, tensor) == (
            not name.endswith(("wq.weight", "wk.weight"))
        )
    head = to_hf(
        torch.arange(24.0)[:, None].expand(24, 48),
        "layers.0.attention.wk.weight",
        MODEL,
    )[:, 0]
    assert head.tolist() == [
        *range(0, 12, 2),
        *range(1, 12, 2),
        *range(12, 24, 2),
        *range(13, 24, 2),
    ]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_exported_model_has_the_same_logits(
    tmp_path: Path, kv_heads: int, theta: float
) -> None:
    model = dataclasses.replace(MODEL, n_kv_heads=kv_heads, rope_theta=theta)
    state = saved(tmp_path / "step-1", model)
    export_hf(
        tmp_path / "step-1", tmp_path / "hf", model, shard_bytes=60_000, card="# Mine"
    )
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    assert (
        max(f.stat().st_size for f in (tmp_path / "hf").glob("*.safetensors")) < 62_000
    )
    assert_same_logits(tmp_path / "hf", model, state)
    assert (tmp_path / "hf" / "README.md").read_text() == "# Mine"
    config = transformers.LlamaConfig.from_pretrained(tmp_path / "hf")
    assert (config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (2e-5, theta)
    assert (config.dtype, config.bos_token_id, config.eos_token_id) == (
        torch.float32,
        None,
        None,
    )


def test_training_checkpoint_exports_without_its_optimizer(tmp_path: Path) -> None:
    moments = {
        f"state.{name}.exp_avg": torch.ones(shape)
        for name, shape in MODEL.tensors().items()
    }
    train_state = {"step": torch.tensor(3)}
    state = saved(
        tmp_path / "step-3",
        optimizer=moments,
        lr_scheduler={"last_epoch": 3},
        train_state=train_state,
    )
    export_hf(tmp_path / "step-3", tmp_path / "hf", MODEL)
    [file] = (tmp_path / "hf").glob("*.safetensors")
    assert_same(
        load_file(file),
        {hf_name(name): to_hf(t, name, MODEL) for name, t in state.items()},
    )


def test_grown_checkpoint_exports_each_layer(tmp_path: Path) -> None:
    """Its metadata points several layers at the same bytes."""
    state = saved(tmp_path / "step-1")
    grown = dataclasses.replace(MODEL, n_layers=6)
    grow_checkpoint(
        tmp_path / "step-1",
        tmp_path / "grown",
        depth_rules(stack_map(2, 6), MODEL, grown),
    )
    export_hf(tmp_path / "grown", tmp_path / "hf", grown)
    layers = {
        f"layers.{i}.{n}": state[f"layers.{i % 2}.{n}"]
        for i in range(6)
        for n in MODEL.layer_tensors()
    }
    assert_same_logits(
        tmp_path / "hf",
        grown,
        {**{n: t for n, t in state.items() if n in grown.tensors()}, **layers},
    )


DIRECTIONS = [
    (name, direction == "depth")
    for name, operator in OPERATORS.items()
    for direction in ("depth", "width")
    if direction in operator.directions
]


@pytest.mark.parametrize(("operator", "deeper"), DIRECTIONS)
def test_every_operators_result_exports_and_comes_back_the_same(
    tmp_path: Path, operator: str, deeper: bool
) -> None:
    """Depthwise and widthwise, wherever an operator is defined."""
    widths = (
        {} if deeper else {"dim": 96, "n_heads": 8, "n_kv_heads": 4, "ffn_dim": 176}
    )
    grown = dataclasses.replace(MODEL, n_layers=4 if deeper else 2, **widths)
    layer_map = stack_map(2, 4) if deeper and operator != "learn" else None
    network = initial_network(MODEL, grown, seed=1) if operator == "learn" else None
    saved(tmp_path / "step-1")
    rules = growth_rules(operator, MODEL, grown, layer_map, 3, network)
    grow_checkpoint(tmp_path / "step-1", tmp_path / "grown", rules)
    state = loaded(tmp_path / "grown", grown)
    export_hf(tmp_path / "grown", tmp_path / "hf", grown)
    assert_same_logits(tmp_path / "hf", grown, state)
    assert import_hf(tmp_path / "hf", tmp_path / "back") == grown
    assert_same(loaded(tmp_path / "back", grown), state)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_then_import_gives_the_same_tensors(tmp_path: Path, dtype: Any) -> None:
    state = saved(tmp_path / "step-1")
    export_hf(
        tmp_path / "step-1", tmp_path / "hf", MODEL, dtype=dtype, shard_bytes=60_000
    )
    assert import_hf(tmp_path / "hf", tmp_path / "back") == MODEL
    assert_same(
        loaded(tmp_path / "back", MODEL),
        {n: t.to(getattr(torch, dtype)).float() for n, t in state.items()},
    )
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "hf", dtype="auto"
    )
    assert theirs.dtype == getattr(torch, dtype)


def test_import_is_sealed_and_exports_again(tmp_path: Path, source: Path) -> None:
    model = import_hf(source, tmp_path / "a")
    import_hf(source, tmp_path / "b")
    first, second = seal.read_seal(tmp_path / "a"), seal.read_seal(tmp_path / "b")
    assert first is not None
    assert second is not None
    assert not seal.damage(tmp_path / "a", first)
    assert first["tensors"].keys() == model.tensors().keys()
    assert (
        tmp_path / "a" / "__0_0.distcp"
    ).stat().st_size < 4 * model.parameters() + 2000 * len(model.tensors())
    assert first["stage_hash"] == second["stage_hash"]
    assert model_from_config(first["config"]) == model
    assert first["source"]["files"] == seal.file_records(
        source, ["config.json", "model.safetensors"]
    )
    export_hf(
        tmp_path / "a", tmp_path / "hf", model
    )  # finds every fingerprint of the seal again
    changed = load_file(source / "model.safetensors")
    changed["lm_head.weight"][3, 5] += 1
    save_file(changed, source / "model.safetensors", metadata={"format": "pt"})
    import_hf(source, tmp_path / "c")
    third = seal.read_seal(tmp_path / "c")
    assert third is not None
    assert third["stage_hash"] != first["stage_hash"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_model_of_transformers_has_the_same_logits_here(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    pretrained(tmp_path / "source", dtype)
    model = import_hf(tmp_path / "source", tmp_path / "imported")
    assert (model.norm_eps, model.rope_theta, model.kv_heads) == (1e-6, 500000.0, 2)
    assert_same_logits(tmp_path / "source", model, loaded(tmp_path / "imported", model))


def test_shards_without_an_index_and_stored_frequencies(tmp_path: Path) -> None:
    theirs = pretrained(tmp_path / "source")
    whole = tmp_path / "source" / "model.safetensors"
    state = load_file(whole)
    whole.unlink()
    half = len(state) // 2
    save_file(dict(list(state.items())[:half]), tmp_path / "source" / "a.safetensors")
    rest = {
        **dict(list(state.items())[half:]),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6),
    }
    save_file(rest, tmp_path / "source" / "b.safetensors")
    model = import_hf(tmp_path / "source", tmp_path / "imported")
    with torch.no_grad():
        expected = theirs(tokens(model)).logits
        assert (
            deviation(
                llama(model, loaded(tmp_path / "imported", model))(tokens(model)),
                expected,
            )
            < 1e-5
        )


def test_config_of_transformers_4(source: Path) -> None:
    """Which has rope_theta at the top, and leaves out what the first Llama had not."""

    def older(config: dict[str, Any]) -> None:
        del (
            config["rope_parameters"],
            config["head_dim"],
            config["attention_bias"],
            config["mlp_bias"],
        )
        config |= {
            "rope_theta": 20000.0,
            "rope_scaling": None,
            "num_key_value_heads": None,
        }

    edited(source / "config.json", older)
    model = model_from_config(json.loads((source / "config.json").read_text()))
    assert (model.rope_theta, model.kv_heads, model.head_dim) == (20000.0, 4, 12)


CONFIGS = {
    "linear scaling": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "RoPE is scaled here by",
    ),
    "llama 3": (
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}},
        "factor is None; it must be a number",
    ),
    "part of a head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "biases": ({"attention_bias": True}, "attention_bias is True"),
    "mlp biases": ({"mlp_bias": True}, "mlp_bias is True"),
    "tied": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "head width": (
        {"head_dim": 15},
        "head_dim is 15; rotary embeddings need an even number of channels",
    ),
    "quantized": (
        {"quantization_config": {"bits": 4}},
        "take the weights as they were before quantization",
    ),
    "family": (
        {"model_type": "mixtral"},
        'model_type is \'mixtral\'; only "llama", "mistral", "Yi", "qwen2", "qwen3" can be read',
    ),
    "window": (
        {"model_type": "mistral", "sliding_window": 4096},
        "sliding_window is 4096: attention has no window",
    ),
    "default window": (
        {"model_type": "mistral"},
        "sliding_window is 4096: attention has no window",
    ),
    "no head": ({"architectures": ["LlamaModel"]}, "save it from that class"),
    "size": ({"hidden_size": "big"}, "hidden_size is 'big'; it must be a whole number"),
    "no size": ({"vocab_size": None}, "vocab_size is None; it must be a whole number"),
    "uneven": (
        {"num_attention_heads": 5, "head_dim": None},
        "does not give each of 5 heads",
    ),
    "kv heads": ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide"),
    "theta": (
        {"rope_parameters": {"rope_theta": "x"}},
        "rope_theta is 'x'; it must be a number",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_that_means_another_model_is_refused(source: Path, case: str) -> None:
    change, message = CONFIGS[case]
    edited(source / "config.json", lambda config: config.update(change))
    assert message in refused(source)


def test_all_problems_are_told_at_once(source: Path) -> None:
    changes = [
        change
        for change, _ in (
            CONFIGS["tied"],
            CONFIGS["activation"],
            CONFIGS["linear scaling"],
        )
    ]
    edited(
        source / "config.json",
        lambda config: [config.update(change) for change in changes],
    )
    message = refused(source)
    assert all(
        part in message
        for part in ("tie_word_embeddings", "hidden_act", "RoPE is scaled here by")
    )


def rewritten(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], Any]:
    def change_weights(source: Path) -> None:
        state = load_file(source / "model.safetensors")
        change(state)
        save_file(state, source / "model.safetensors")

    return change_weights


def indexed(name: Any) -> Callable[[Path], Any]:
    weight_map = {"lm_head.weight": name}

    def change(source: Path) -> None:
        (source / "model.safetensors").rename(source / "weights.safetensors")
        (source / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": weight_map})
        )

    return change


def doubled(source: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        (source / name).write_bytes((source / "model.safetensors").read_bytes())
    (source / "model.safetensors").unlink()


def truncated(source: Path) -> None:
    with (source / "model.safetensors").open("r+b") as stream:
        stream.truncate((source / "model.safetensors").stat().st_size - 1)


WEIGHTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (
        rewritten(lambda s: s.pop("model.norm.weight")),
        "model.norm.weight is missing",
    ),
    "bias": (
        rewritten(lambda s: s.update({"a.bias": torch.ones(3)})),
        r"a.bias \(3,\) is not in the model",
    ),
    "shape": (
        rewritten(lambda s: s.update({"lm_head.weight": torch.ones(2, 48)})),
        r"\(2, 48\), in the model \(300, 48\)",
    ),
    "integers": (
        rewritten(
            lambda s: s.update(
                {"lm_head.weight": torch.ones(300, 48, dtype=torch.int8)}
            )
        ),
        "is of I8",
    ),
    "twice": (doubled, "is both in a.safetensors and in b.safetensors"),
    "truncated": (truncated, "model.safetensors cannot be read"),
    "no header": (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64),
        "model.safetensors cannot be read",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "it has no .*safetensors",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "it has no config.json"),
    "file missing": (indexed("model-2.safetensors"), "model-2.safetensors is missing"),
    "up": (indexed("../other.safetensors"), "not plain"),
    "absolute": (indexed("/etc/other.safetensors"), "not plain"),
    "below": (indexed("sub/other.safetensors"), "not plain"),
    "pickle": (indexed("pytorch_model.bin"), "not plain"),
    "number": (indexed(3), "not plain"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_do_not_fit_are_refused(source: Path, case: str) -> None:
    change, message = WEIGHTS[case]
    for place in (
        source.parent / "other.safetensors",
        source / "sub" / "other.safetensors",
    ):
        place.parent.mkdir(exist_ok=True)
        place.write_bytes((source / "model.safetensors").read_bytes())
    change(source)
    told = refused(source)
    assert re.search(message, told), told


class Payload:
    """Unpickling it creates the file ``marker``."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_pickled_weights_are_not_opened(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    assert "save_pretrained it as safetensors" in refused(source)
    assert not (tmp_path / "ran").exists()


def test_nothing_is_overwritten_and_leftovers_are_replaced(
    source: Path, tmp_path: Path
) -> None:
    (tmp_path / "imported.tmp").mkdir()
    (tmp_path / "imported.tmp" / "torn.distcp").touch()
    model = import_hf(source, tmp_path / "imported")
    files = [".metadata", seal.MANIFEST, "__0_0.distcp", "hf-generation_config.json"]
    assert sorted(f.name for f in (tmp_path / "imported").iterdir()) == files
    with pytest.raises(CheckpointError, match="exists already"):
        import_hf(source, tmp_path / "imported")
    with pytest.raises(CheckpointError, match="exists already"):
        export_hf(tmp_path / "imported", source, model)


def test_checkpoint_of_another_geometry_is_not_exported(tmp_path: Path) -> None:
    saved(tmp_path / "step-1")
    wider = dataclasses.replace(MODEL, n_layers=1, ffn_dim=96)
    with pytest.raises(CheckpointError) as caught:
        export_hf(tmp_path / "step-1", tmp_path / "hf", wider)
    assert "layers.0.feed_forward.w1.weight is (88, 48), in the model (96, 48)" in str(
        caught.value
    )
    assert "layers.1.attention.wq.weight (48, 48) is not in the model" in str(
        caught.value
    )
    assert not (tmp_path / "hf").exists()


def test_damage_in_a_sealed_checkpoint_is_found(tmp_path: Path, source: Path) -> None:
    model = import_hf(source, tmp_path / "imported")
    data = tmp_path / "imported" / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match="is not what was saved"):
        export_hf(tmp_path / "imported", tmp_path / "hf", model)
    assert not (tmp_path / "hf").exists()
    assert not (tmp_path / "hf.tmp").exists()


BESIDE = [
    "consolidated.safetensors",
    "adapter_model.safetensors",
    "optimizer.safetensors",
    "._model.safetensors",
]


@pytest.mark.parametrize(
    "names", [["model.safetensors"], ["model-00001-of-00002.safetensors"]], ids=str
)
def test_what_stands_beside_the_model_is_no_part_of_it(
    source: Path, names: list[str]
) -> None:
    """A LoRA, the original's own file, an optimizer, a Mac's attributes, a copy in fp16."""
    state = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    parts = [state]
    if len(names) == 1 and "-of-" in names[0]:
        names = [names[0], "model-00002-of-00002.safetensors"]
        parts = [dict(list(state.items())[:5]), dict(list(state.items())[5:])]
    for name, part in zip(names, parts, strict=True):
        save_file(part, source / name)
    for name in [*BESIDE, "model.fp16.safetensors"]:
        save_file({name: torch.ones(3) for name in state}, source / name)
    model = import_hf(source, source.parent / "imported")
    wanted = {
        name: from_hf(state[hf_name(name)], name, model) for name in model.tensors()
    }
    assert_same(loaded(source.parent / "imported", model), wanted)


def test_a_single_file_goes_before_a_stale_index(source: Path) -> None:
    """As in transformers."""
    state = load_file(source / "model.safetensors")
    stale = {name: tensor + 1 for name, tensor in state.items()}
    save_file(stale, source / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(state, "model-00001-of-00001.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    model = import_hf(source, source.parent / "imported")
    assert_same_logits(source, model, loaded(source.parent / "imported", model))


def test_swish_is_silu_and_float64_is_read(source: Path) -> None:
    edited(source / "config.json", lambda config: config.update(hidden_act="swish"))
    state = load_file(source / "model.safetensors")
    save_file(
        {name: tensor.double() for name, tensor in state.items()},
        source / "model.safetensors",
    )
    model = import_hf(source, source.parent / "imported")
    assert_same(
        loaded(source.parent / "imported", model),
        {n: from_hf(state[hf_name(n)], n, model) for n in model.tensors()},
    )


@torch.no_grad()
def test_mistral_without_a_window_is_read_and_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        hidden_size=48, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=300, sliding_window=None,
    )  # fmt: skip
    theirs = transformers.MistralForCausalLM(config)
    theirs.save_pretrained(tmp_path / "mistral")
    model = import_hf(tmp_path / "mistral", tmp_path / "imported")
    ours = llama(model, loaded(tmp_path / "imported", model))
    assert deviation(ours(tokens(model)), theirs(tokens(model)).logits) < 1e-5
    export_hf(tmp_path / "imported", tmp_path / "llama", model)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert deviation(again(tokens(model)).logits, theirs(tokens(model)).logits) < 1e-5


def test_yi_by_its_old_name_is_a_llama(source: Path) -> None:
    before = model_from_config(json.loads((source / "config.json").read_text()))
    edited(
        source / "config.json",
        lambda config: config.update(model_type="Yi", architectures=["YiForCausalLM"]),
    )
    assert import_hf(source, source.parent / "imported") == before


def test_defaults_are_the_familys(source: Path) -> None:
    """Mistral's config has 8 key/value heads where it does not say."""
    config = {
        "model_type": "mistral",
        "sliding_window": None,
        "num_attention_heads": 16,
        "hidden_size": 64,
    }
    config |= {"num_hidden_layers": 1, "intermediate_size": 48, "vocab_size": 300}
    assert model_from_config(config).kv_heads == 8


PEAK = """
import sys
from pathlib import Path
import torch
from stackgrow.checkpoint.hf import export_hf, import_hf
from stackgrow.recipe.keys import Model

def peak():  # of this process alone; what getrusage says is inherited
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])

def there_and_back(name, model):
    export_hf(folder / name, folder / f"{name}-hf", model, shard_bytes=10**9)
    before = peak()
    import_hf(folder / f"{name}-hf", folder / f"{name}-back")
    return before

folder = Path(sys.argv[1])
there_and_back("small", Model(**SMALL))  # loads what is loaded once
start = peak()
exported = there_and_back("large", Model(**LARGE))
print(exported - start, peak() - start)
"""


def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    large = Model(
        family="llama2", dim=512, n_layers=3, n_heads=8, ffn_dim=2048, vocab_size=8192
    )
    for name, model in (("small", MODEL), ("large", large)):
        saved(tmp_path / name, model)
    script = PEAK.replace("SMALL", str(dataclasses.asdict(MODEL))).replace(
        "LARGE", str(dataclasses.asdict(large))
    )
    # Every freed tensor goes back to the system at once, so that the peak is what was in use.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    largest = 4 * large.vocab_size * large.dim
    with safe_open(next((tmp_path / "large-hf").glob("*.safetensors")), "pt") as file:
        assert 4 * large.parameters() > 5 * largest, (
            "the bound below would hold with all in memory"
        )
        assert len(file.keys()) == len(large.tensors()), (
            "all of the weights are in one shard"
        )
    exported, both = map(int, done.stdout.split())
    # A tensor, what it is made from, and small things; and what a checkpoint is written from.
    assert exported < 2 * largest + 8e6, done.stdout
    assert both < 2 * largest + 2 * BLOCK + 8e6 < 4 * large.parameters(), done.stdout
