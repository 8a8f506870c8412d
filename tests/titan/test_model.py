import dataclasses

import pytest
import torch
from torchtitan.models.llama3 import Transformer

from stackgrow.growth.draw import draw, generator, paper_std
from stackgrow.recipe.keys import Model
from stackgrow.titan.model import Llama, model_args
from stackgrow.titan.names import stored_name

# Paper's FFN widths by hidden width, odd widths, and one narrower than 8 D / 3 would ever give.
FFN = [
    (1024, 2816),
    (2048, 5632),
    (2560, 7040),
    (4096, 11008),
    (128, 352),
    (64, 177),
    (64, 32),
    (6, 1),
]


def build(model: Model, seed: int = 0) -> Llama:
    args = model_args(model, seed)
    args.max_seq_len = 64
    llama = Llama(args)
    with torch.no_grad():
        llama.init_weights()
    return llama


@pytest.mark.parametrize(("dim", "ffn_dim"), FFN)
def test_ffn_width_is_exact(dim: int, ffn_dim: int) -> None:
    model = Model(
        family="llama2", dim=dim, n_layers=1, n_heads=1, ffn_dim=ffn_dim, vocab_size=2
    )
    with torch.device("meta"):
        llama = Llama(model_args(model, 0))
    assert llama.layers["0"].feed_forward.w1.weight.shape == (ffn_dim, dim)


def test_many_widths_are_compiled_in_one_session() -> None:
    """As a run does that grows in width several times, and is evaluated in between."""
    for dim in range(16, 16 * 11, 16):
        llama = build(
            Model(
                family="llama2",
                dim=dim,
                n_layers=1,
                n_heads=2,
                ffn_dim=32,
                vocab_size=8,
            )
        )
        block = torch.compile(llama.layers["0"], backend="eager", fullgraph=True)
        hidden = torch.ones(1, 8, dim)
        block(hidden, llama.freqs_cis, None).sum().backward()
        with torch.no_grad():
            block(hidden, llama.freqs_cis, None)
    torch._dynamo.reset()


def test_tensors_are_torchtitans_own(small: Model) -> None:
    shapes = {name: tuple(p.shape) for name, p in build(small).named_parameters()}
    assert shapes == small.tensors()
    assert small.parameters() == sum(p.numel() for p in build(small).parameters())


@pytest.mark.parametrize("kv_heads", [0, 2, 1])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_logits_equal_transformers_llama(
    small: Model, kv_heads: int, theta: float
) -> None:
    """RoPE without scaling, RMSNorm, SwiGLU and grouped-query attention against an independent implementation.

    torchtitan rotates adjacent pairs of a head's channels, transformers its two halves: the rows of wq and wk are
    permuted from one to the other, as in every Llama conversion.
    """
    transformers = pytest.importorskip("transformers")
    model = dataclasses.replace(small, n_kv_heads=kv_heads, rope_theta=theta)
    ours = build(model)
    config = transformers.LlamaConfig(
        hidden_size=model.dim, intermediate_size=model.ffn_dim, num_hidden_layers=model.n_layers,
        num_attention_heads=model.n_heads, num_key_value_heads=model.kv_heads, vocab_size=model.vocab_size,
        rms_norm_eps=model.norm_eps, rope_theta=theta, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.load_state_dict(
        {k: v for n, p in ours.state_dict().items() for k, v in [_hf(n, p, model)]}
    )
    tokens = torch.randint(
        0, model.vocab_size, (2, 64), generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        expected, found = theirs(tokens).logits, ours(tokens)
    # float32 rounding through three layers: 1e-5 of the largest logit.
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def _hf(name: str, weight: torch.Tensor, model: Model) -> tuple[str, torch.Tensor]:
    names = {
        "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    if name.endswith(("wq.weight", "wk.weight")):
        heads = weight.shape[0] // model.head_dim
        weight = (
            weight.view(heads, -1, 2, model.dim).transpose(1, 2).reshape(weight.shape)
        )
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    tops = {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
    }
    return tops.get(name, f"model.{name}"), weight


def test_default_rope_scaling_would_be_wrong(small: Model) -> None:
    """The trap itself: torchtitan's defaults change the frequencies of a theta-10000 model."""
    ours = build(small)
    args = model_args(small, 0)
    args.max_seq_len = 64
    args.rope_scaling_args = type(args.rope_scaling_args)()
    assert not torch.equal(Llama(args)._precompute_freqs_cis(), ours.freqs_cis)


def test_weights_begin_as_the_paper_states() -> None:
    model = Model(
        family="llama2", dim=256, n_layers=2, n_heads=4, ffn_dim=704, vocab_size=512
    )
    for name, p in build(model).named_parameters():
        if p.dim() == 1:
            assert torch.equal(p, torch.ones_like(p))
            continue
        d_in = p.shape[1]
        std = 1 / (d_in**0.5 * 2) if "w2" in name else (2 / (5 * d_in)) ** 0.5
        assert paper_std(name, tuple(p.shape), 2) == pytest.approx(std)
        # the standard error of a sample's standard deviation is std / sqrt(2 n); six of them
        assert abs(p.std().item() / std - 1) < 6 / (2 * p.numel()) ** 0.5
        assert abs(p.mean().item()) < 6 * std / p.numel() ** 0.5


def test_torchtitan_initialization_has_torchtitans_distribution() -> None:
    model = Model(
        family="llama2", dim=256, n_layers=3, n_heads=4, ffn_dim=704, vocab_size=512, init="torchtitan"
    )  # fmt: skip
    ours = build(model)
    args = model_args(model, 0)
    args.max_seq_len = 64
    theirs = Transformer(args)
    with torch.no_grad():
        theirs.init_weights()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if p.dim() == 1:
            assert torch.equal(p, q), name
            continue
        assert abs(p.std().item() / q.std().item() - 1) < 12 / (2 * p.numel()) ** 0.5, (
            name
        )
        assert abs(p.abs().max().item() / q.abs().max().item() - 1) < 0.35, name


def test_initialization_depends_on_seed_and_name_alone(small: Model) -> None:
    first, again, other = build(small, 1), build(small, 1), build(small, 2)
    deeper = build(dataclasses.replace(small, n_layers=4), 1)
    same = dict(deeper.named_parameters())
    for (name, p), q, r in zip(
        first.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(p, q)
        if p.dim() == 2:
            assert not torch.equal(p, r), name
            assert "w2" in name or torch.equal(p, same[name]), name
    assert not torch.equal(
        first.layers["0"].attention.wq.weight, first.layers["1"].attention.wq.weight
    )


def test_names_survive_compile_and_recomputation_wrappers() -> None:
    wrapped = "layers.0._orig_mod._checkpoint_wrapped_module.attention.wq.weight"
    assert stored_name(wrapped) == "layers.0.attention.wq.weight"


def test_draw_is_pinned() -> None:
    """Weights drawn by an older version must be drawn again alike: a recipe names its seed and means these."""
    model = Model(
        family="llama2", dim=4, n_layers=1, n_heads=1, ffn_dim=4, vocab_size=4
    )
    name = "layers.0.attention.wq.weight"
    weight = draw(name, (4, 4), model, generator(3407, name))
    assert weight.flatten()[:3].tolist() == pytest.approx(PINNED, rel=1e-6)


PINNED = [0.1986078917980194, 0.16661080718040466, 0.12599121034145355]


def test_torchs_own_initialization_is_that_of_its_modules() -> None:
    """What the paper's published base and scratch runs have, which never call their initialization."""
    model = Model(
        family="llama2",
        dim=64,
        n_layers=1,
        n_heads=2,
        ffn_dim=96,
        vocab_size=500,
        init="torch",
    )
    ours = dict(build(model).named_parameters())
    torch.manual_seed(0)
    embedding, linear = torch.nn.Embedding(500, 64), torch.nn.Linear(96, 64, bias=False)
    for have, want in (
        (ours["tok_embeddings.weight"], embedding.weight),
        (ours["layers.0.feed_forward.w2.weight"], linear.weight),
    ):
        assert have.mean().item() == pytest.approx(0, abs=0.02)
        assert have.std().item() == pytest.approx(want.std().item(), rel=0.02)
        assert have.abs().max().item() == pytest.approx(
            want.abs().max().item(), rel=0.2
        )
    bound = 64**-0.5
    assert 0.99 * bound < ours["output.weight"].abs().max().item() <= bound
    assert (ours["norm.weight"] == 1).all()
