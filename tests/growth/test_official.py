"""Our operators beside the paper's official code, run on the same weights: where it agrees with the equations, and
where it does not (growth/mask.py, growth/learned_shapes.py and ``split_rules`` name the differences).

    git clone https://github.com/tongxuluo/prts && git -C prts checkout bf6f774
    PRTS=prts python -m pytest tests/growth/test_official.py

Of the code nothing is kept here: its files are loaded from there, with empty modules for what they import in vain.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from growth_for_tests import apply, assert_same, weights
from torch import Tensor, nn

from stackgrow.growth.depth import depth_rules, interleave_map, stack_map
from stackgrow.growth.learned import HyperNetwork, initial_network, learned_rules
from stackgrow.growth.width import split_rules
from stackgrow.growth.zero import (
    random_width_rules,
    zero_depth_rules,
    zero_width_rules,
)
from stackgrow.plan.resolve import make_plan
from stackgrow.recipe.keys import Model
from stackgrow.recipe.load import load_recipe

PRTS = Path(os.environ.get("PRTS", "prts"))
pytestmark = pytest.mark.skipif(
    not (PRTS / "G_zero_depthwise.py").is_file(),
    reason="PRTS names no clone of tongxuluo/prts",
)

SOURCE = Model(dim=32, n_layers=2, n_heads=4, ffn_dim=48, vocab_size=53)
# Our tensor of a layer: the official code's, of Hugging Face's Llama and of lit-gpt's.
HF = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
LIT = {
    "attention.wo": "attn.proj",
    "feed_forward.w1": "mlp.swiglu.w1",
    "feed_forward.w3": "mlp.swiglu.w2",
    "feed_forward.w2": "mlp.swiglu.w3",
    "attention_norm": "norm_1",
    "ffn_norm": "norm_2",
}
# LiGO's matrices: our weight type: the official code's D.
DEPTHS = {
    "attention.wq": "WQ",
    "attention.wk": "WK",
    "attention.wv": "WV",
    "attention.wo": "WO",
    "feed_forward.w1": "W_fc1",
    "feed_forward.w3": "W_fc2",
    "feed_forward.w2": "W_proj",
    "attention_norm": "W_ln1",
    "ffn_norm": "W_ln2",
}
WIDTHS = {"emb": "B_embd", "q": "BQ", "k": "BK", "v": "BV", "mlp": "B_ffn"}


@pytest.fixture(autouse=True)
def modules_come_and_go() -> Iterator[None]:
    before = dict(sys.modules)
    yield
    for name in sys.modules.keys() - before.keys():
        if name.split(".")[0] in ("official", "higher", "jsonargparse", "lit_gpt"):
            del sys.modules[name]


def empty_module(name: str, **contents: object) -> None:
    module = ModuleType(name)
    module.__dict__.update(contents)
    module.__path__ = []
    sys.modules[name] = module


def load(file: str, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, PRTS / file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_zero_depthwise_is_the_official_codes_bit_for_bit() -> None:
    transformers = pytest.importorskip("transformers")
    empty_module("jsonargparse")
    empty_module("jsonargparse.cli", CLI=None)
    official = load("G_zero_depthwise.py", "official")
    sizes = {
        "hidden_size": SOURCE.dim,
        "intermediate_size": SOURCE.ffn_dim,
        "num_attention_heads": SOURCE.n_heads,
        "vocab_size": SOURCE.vocab_size,
    }
    source = transformers.LlamaConfig(**sizes, num_hidden_layers=2)
    target = transformers.LlamaConfig(**sizes, num_hidden_layers=8)
    torch.manual_seed(0)
    small = transformers.AutoModelForCausalLM.from_config(source)
    ours = {
        name: small.state_dict()[hf_name(name)].clone() for name in SOURCE.tensors()
    }

    config = official.bert2BERTConfig(source, target, False, lemon=True)
    theirs = official.bert2BERT.from_pretrained(small, config).state_dict()

    deep = replace(SOURCE, n_layers=8)
    grown = apply(zero_depth_rules(interleave_map(2, 8), SOURCE, deep), ours)
    assert_same(grown, {name: theirs[hf_name(name)] for name in deep.tensors()})


def hf_name(name: str) -> str:
    outside = {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
    }
    if not name.startswith("layers."):
        return outside.get(name, f"model.{name}")
    _, layer, tensor = name.split(".", 2)
    return f"model.layers.{layer}.{HF[tensor.removesuffix('.weight')]}.weight"


@pytest.mark.parametrize(
    "target",
    [
        replace(SOURCE, n_layers=6),
        replace(SOURCE, dim=64, n_heads=8, n_kv_heads=8, ffn_dim=88),
        replace(SOURCE, dim=64, n_heads=8, n_kv_heads=8, ffn_dim=88, n_layers=4),
    ],
    ids=["depth", "width", "both"],
)
def test_folded_ligo_is_the_official_codes(target: Model) -> None:
    """With all its maps, and any values in them: what is trained is the same function of the maps."""
    small = weights(SOURCE)
    ligo = official_ligo(small, target)
    start = initial_network(SOURCE, target, 0, "official")
    for name, matrix in DEPTHS.items():
        assert torch.equal(getattr(ligo, matrix), start.depths[name]), (
            "D begins as stacked identities"
        )
    for name, matrix in WIDTHS.items():
        old = start.widths[name].shape[1]
        assert torch.equal(getattr(ligo, matrix)[:old], start.widths[name][:old]), (
            "B begins as the identity"
        )

    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for matrix in (*DEPTHS.values(), *WIDTHS.values()):
            parameter = getattr(ligo, matrix)
            parameter += 0.1 * torch.randn(parameter.shape, generator=rng)
    theirs = ligo.get_trg_params()
    network = HyperNetwork(
        {name: getattr(ligo, matrix).detach() for name, matrix in WIDTHS.items()},
        {name: getattr(ligo, matrix).detach() for name, matrix in DEPTHS.items()},
    )
    grown = apply(learned_rules(SOURCE, target, network, "official"), small)
    for name, weight in grown.items():
        torch.testing.assert_close(
            weight, of_lit(theirs, name), rtol=1e-4, atol=1e-5, msg=name
        )


@pytest.mark.parametrize("order", [stack_map(2, 8), interleave_map(2, 8)])
def test_stack_is_the_official_codes_bit_for_bit(
    order: list[int], tmp_path: Path
) -> None:
    class Captured:
        """In the place of the model that the official code fills."""

        def __init__(self, config: object):
            self.state: dict[str, Tensor] = {}

        def load_state_dict(self, state: dict[str, Tensor]) -> None:
            self.state = state

    small = weights(SOURCE)
    torch.save({"model": lit_state(small)}, tmp_path / "small.pth")
    official_modules(GPT=Captured, Config=SimpleNamespace(from_name=str))
    stack = load("prts_lit/scaling/stackingpt.py", "official.scaling.stackingpt")
    config = SimpleNamespace(
        src_init_path=tmp_path / "small.pth",
        stacking_list=order,
        trg_config_name="",
        embd_name="wte",
        ln_name="ln_f",
        head_name="lm_head",
        layer_name="h",
    )
    theirs = stack.Stackingpt.from_pretrained(config).state
    deep = replace(SOURCE, n_layers=8)
    grown = apply(depth_rules(order, SOURCE, deep), small)
    assert_same(grown, {name: of_lit(theirs, name) for name in deep.tensors()})


def test_split_copies_the_same_channels_but_shares_them_unevenly() -> None:
    """The official code gives every copy of a column the same share, where the paper's text says uneven ones; both add
    up to the source."""
    wide = replace(SOURCE, dim=64, n_heads=8, n_kv_heads=8, ffn_dim=96)
    small = weights(SOURCE)
    grown = apply(split_rules(SOURCE, wide, seed=0, norm="copied"), small)
    expand = load("prts_lit/utils/other.py", "official.other").expand_tensor

    def theirs(weight: Tensor, *shapes: tuple[int, ...]) -> Tensor:
        """Columns first, then rows, as bert2bert.py goes about it."""
        for shape in shapes:
            is_fan_in = weight.dim() == 2 and shape[1] != weight.shape[1]
            is_linear = is_fan_in and weight.shape[0] != SOURCE.vocab_size
            (dim,) = (i for i, size in enumerate(shape) if size != weight.shape[i])
            extra = torch.arange(shape[dim] - weight.shape[dim]) % weight.shape[dim]
            weight = expand(weight, torch.Size(shape), extra, is_linear, "cpu")
        return weight

    for name, shapes in {
        "tok_embeddings.weight": [(53, 64)],
        "norm.weight": [(64,)],
        "layers.0.ffn_norm.weight": [(64,)],
    }.items():
        assert torch.equal(grown[name], theirs(small[name].clone(), *shapes))
    for name, shapes in {
        "layers.0.feed_forward.w1.weight": [(48, 64), (96, 64)],
        "layers.1.feed_forward.w2.weight": [(32, 96), (64, 96)],
    }.items():
        even = theirs(small[name].clone(), *shapes)
        old = small[name].shape[1]
        torch.testing.assert_close(
            grown[name][:, :old] + grown[name][:, old:], even[:, :old] + even[:, old:]
        )
        assert torch.equal(even[:, :old], even[:, old:])
        assert not torch.equal(grown[name], even)


@pytest.mark.parametrize("operator", ["zero", "random"])
def test_padding_a_width_is_the_official_codes_but_for_the_norms(operator: str) -> None:
    """What it writes of the source into a new model, and of zeros, is in ours already. Norms it leaves unscaled, in
    "zero" with new entries of 0, behind which new channels never learn; in "random" its mask scales what they return."""
    names = ("GPT", "Block", "RMSNorm", "FusedRMSNorm")
    official_modules(**dict.fromkeys(names, nn.Identity))
    wide = replace(SOURCE, dim=64, n_heads=8, n_kv_heads=8, ffn_dim=96)
    small = weights(SOURCE)
    if operator == "zero":
        module = load("prts_lit/scaling/zero.py", "official.scaling.zero")
        expand = module.ZeroModel.expand_tensor
        grown = apply(zero_width_rules(SOURCE, wide, seed=0), small)
        theirs = expand(None, small["norm.weight"], torch.ones(64))
        assert not theirs[32:].any()
    else:
        module = load("prts_lit/scaling/msg.py", "official.scaling.msg")
        expand = module.MsgModel.expand_tensor
        grown = apply(random_width_rules(SOURCE, wide, seed=0), small)
        theirs = expand(None, small["norm.weight"], torch.ones(64))
        assert torch.equal(theirs[32:], torch.ones(32))
    assert torch.equal(theirs[:32], small["norm.weight"])

    before, after = of_heads(small, SOURCE), of_heads(grown, wide)
    for name, weight in after.items():
        if name == "tok_embeddings.weight" and operator == "zero":
            padded = expand(None, before[name].T, weight.clone().T).T
        else:
            padded = expand(None, before[name], weight.clone())
        assert torch.equal(padded, weight), name


def of_heads(tensors: dict[str, Tensor], model: Model) -> dict[str, Tensor]:
    """The matrices, with queries, keys and values joined as lit-gpt's model takes them apart: by heads."""
    matrices = {name: tensor for name, tensor in tensors.items() if tensor.dim() == 2}
    for layer in range(model.n_layers):
        parts = []
        for part in ("wq", "wk", "wv"):
            weight = matrices.pop(f"layers.{layer}.attention.{part}.weight")
            parts.append(weight.view(model.n_heads, model.head_dim, model.dim))
        matrices[f"layers.{layer}.attn"] = torch.cat(parts, dim=1).flatten(0, 1)
    return matrices


def test_the_mask_of_a_deeper_model_rises_as_the_official_codes() -> None:
    names = ("GPT", "Block", "RMSNorm", "FusedRMSNorm")
    official_modules(**dict.fromkeys(names, nn.Identity))
    module = load("prts_lit/scaling/msg.py", "official.scaling.msg")
    mask = module.MsgMask(32, 64, 48, 96, grow_step=5000)
    recipe = Path(__file__).parents[2] / "recipes/operators/1.1b_random_depth.toml"
    stage = make_plan(load_recipe(recipe), recipe).train_stages[-1]
    for step in (1, 1250, 4999, 5000, 6000):
        mask.curr_step = step
        value = mask.getfullmask(torch.float64, "cpu").unique()
        assert value.item() == pytest.approx(stage.mask_value(step))


def official_modules(**contents: object) -> None:
    """What its files import from beside them, lit_gpt's ``contents`` among it."""
    for name in ("official", "official.scaling"):
        empty_module(name)
    for name in ("lit_gpt", "lit_gpt.model", "lit_gpt.rmsnorm"):
        empty_module(name, **contents)
    utils = load("prts_lit/utils/other.py", "official.other")
    configs = ("StackingptConfig", "MsgConfig", "ZeroConfig")
    helpers = ("get_partition", "get_submodules", "find_moduleList")
    empty_module(
        "official.utils",
        **dict.fromkeys(configs, SimpleNamespace),
        **{name: getattr(utils, name) for name in helpers},
    )


def official_ligo(small: dict[str, Tensor], target: Model) -> Any:
    empty_module("higher")
    empty_module("higher.patch", make_functional=None)
    for name in ("official", "official.scaling"):
        empty_module(name)
    empty_module("official.utils", LiGOConfig=SimpleNamespace)
    module = load("prts_lit/scaling/ligo.py", "official.scaling.ligo")
    config = SimpleNamespace(
        src_width=SOURCE.dim,
        trg_width=target.dim,
        src_depth=SOURCE.n_layers,
        trg_depth=target.n_layers,
        src_intermediate_size=SOURCE.ffn_dim,
        trg_intermediate_size=target.ffn_dim,
    )
    return module.LiGOModel(
        SimpleNamespace(state_dict=lambda: lit_state(small)), nn.Identity(), config
    )


def lit_state(small: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under lit-gpt's names, which has the queries, keys and values of a layer in one matrix."""
    state = {
        "transformer.wte.weight": small["tok_embeddings.weight"],
        "transformer.ln_f.weight": small["norm.weight"],
        "lm_head.weight": small["output.weight"],
    }
    for layer in range(SOURCE.n_layers):
        parts = [
            small[f"layers.{layer}.attention.{name}.weight"]
            for name in ("wq", "wk", "wv")
        ]
        state[f"transformer.h.{layer}.attn.attn.weight"] = torch.cat(parts)
        for ours, theirs in LIT.items():
            state[f"transformer.h.{layer}.{theirs}.weight"] = small[
                f"layers.{layer}.{ours}.weight"
            ]
    return state


def of_lit(state: dict[str, Tensor], name: str) -> Tensor:
    outside = {
        "tok_embeddings": "transformer.wte",
        "norm": "transformer.ln_f",
        "output": "lm_head",
    }
    short = name.removesuffix(".weight")
    if short in outside:
        return state[f"{outside[short]}.weight"]
    _, layer, tensor = short.split(".", 2)
    if tensor in LIT:
        return state[f"transformer.h.{layer}.{LIT[tensor]}.weight"]
    joined = state[f"transformer.h.{layer}.attn.attn.weight"]
    return joined.chunk(3)[("wq", "wk", "wv").index(tensor.removeprefix("attention."))]
