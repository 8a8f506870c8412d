"""LiGO in training: its forward pass is the folded model's, every map learns, and its cost is what torch counts."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from growth_for_tests import apply, deviation, llama, weights
from torch.utils.flop_counter import FlopCounterMode

from stackgrow import seal
from stackgrow.checkpoint.dcp import CheckpointError
from stackgrow.checkpoint.grow import read_network
from stackgrow.growth.depth import depth_rules, stack_map
from stackgrow.growth.learned import HyperNetwork, learned_rules
from stackgrow.growth.learned_shapes import mapping_flops, parameters, shapes
from stackgrow.recipe.keys import Model
from stackgrow.seal.tensors import fingerprint
from stackgrow.titan.ligo import LigoArgs, LigoLlama
from stackgrow.titan.model import model_args

SOURCE = Model(
    family="llama2",
    dim=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    ffn_dim=48,
    vocab_size=97,
)
TARGETS = {
    "depth": replace(SOURCE, n_layers=5),
    "width": replace(SOURCE, dim=64, n_heads=8, n_kv_heads=4, ffn_dim=112),
    "both": replace(SOURCE, dim=64, n_heads=8, n_kv_heads=4, ffn_dim=112, n_layers=4),
    "both, kv heads kept": replace(SOURCE, dim=64, n_heads=8, ffn_dim=112, n_layers=4),
}
TOKENS = torch.randint(0, 97, (2, 32), generator=torch.Generator().manual_seed(3))


def sealed(state: dict[str, torch.Tensor], folder: Path) -> Path:
    dcp.save(dict(state), checkpoint_id=str(folder))
    facts = {"tensors": {name: fingerprint(tensor) for name, tensor in state.items()}}
    seal.seal(folder, seal.file_records(folder, seal.contents(folder)), facts)
    return folder


def build(
    target: Model, folder: Path, precision: str = "float32", maps: str = "paper"
) -> LigoLlama:
    """On the weights of ``weights(SOURCE)``, as the Trainer builds it."""
    checkpoint = folder / "source"
    if not checkpoint.exists():
        sealed(weights(SOURCE), checkpoint)
    models = {"source": SOURCE, "target": target, "llama": model_args(target, 0)}
    args = LigoArgs(
        **models, maps=maps, checkpoint=str(checkpoint), seed=4, precision=precision
    )
    args.llama.max_seq_len = 32
    with torch.device("meta"):
        model = LigoLlama(args)
    model.to_empty(device="cpu")
    model.init_weights()
    return model


def train(model: LigoLlama, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        torch.nn.functional.cross_entropy(
            model(TOKENS).flatten(0, 1).float(), TOKENS.flatten()
        ).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("maps", ["paper", "official"])
@pytest.mark.parametrize("case", TARGETS)
def test_the_folded_checkpoint_computes_the_same(
    case: str, maps: str, tmp_path: Path
) -> None:
    target = TARGETS[case]
    model = build(target, tmp_path, maps=maps)
    before = model(TOKENS)
    train(model)
    network = read_network(
        sealed(dict(model.state_dict()), tmp_path / "learned"), SOURCE, target, maps
    )
    folded = apply(learned_rules(SOURCE, target, network, maps), weights(SOURCE))
    with torch.no_grad():
        expected, found = model(TOKENS), llama(target, folded)(TOKENS)
    assert deviation(found, expected) < 1e-5
    assert deviation(before.detach(), expected) > 1e-2, "training has changed the maps"


def test_an_untrained_depth_map_is_g_stack(tmp_path: Path) -> None:
    target = TARGETS["depth"]
    stacked = apply(depth_rules(stack_map(2, 5), SOURCE, target), weights(SOURCE))
    with torch.no_grad():
        model = build(target, tmp_path)
        assert torch.equal(model(TOKENS), llama(target, stacked)(TOKENS))
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"depths"}


@pytest.mark.parametrize("case", ["depth", "width"])
def test_the_official_maps_are_of_both_directions_and_begin_where_the_papers_do(
    case: str, tmp_path: Path
) -> None:
    """The official code also trains B, from the identity, where only the depth grows, and D where only widths grow."""
    with torch.no_grad():
        paper, official = (
            build(TARGETS[case], tmp_path, maps=maps) for maps in ("paper", "official")
        )
        assert torch.equal(official(TOKENS), paper(TOKENS))
    names = {name for name, _ in official.named_parameters()}
    assert {name.split(".")[0] for name in names} == {"widths", "depths"}
    assert {name.split(".")[0] for name, _ in paper.named_parameters()} == {f"{case}s"}
    assert len(names) == 5 + 9
    learned = sum(parameter.numel() for parameter in official.parameters())
    assert learned == parameters(SOURCE, TARGETS[case], "official")
    train(official, 1)
    network = dict(official.named_parameters())
    start = dict(build(TARGETS[case], tmp_path, maps="official").named_parameters())
    assert all((network[name] != start[name]).any() for name in names), (
        "every one of them is trained"
    )


@pytest.mark.parametrize("case", TARGETS)
def test_every_map_gets_a_gradient_in_all_its_rows_and_moves(
    case: str, tmp_path: Path
) -> None:
    model = build(TARGETS[case], tmp_path)
    start = {
        name: parameter.detach().clone() for name, parameter in model.named_parameters()
    }
    needed = shapes(SOURCE, TARGETS[case])
    assert len(start) == len(needed["widths"]) + len(needed["depths"])
    assert sum(tensor.numel() for tensor in start.values()) == parameters(
        SOURCE, TARGETS[case]
    )
    model(TOKENS).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.abs().sum(1) > 0).all(), name
    model.zero_grad()
    train(model, 1)
    for name, parameter in model.named_parameters():
        assert (parameter != start[name]).any(dim=1).all(), name


def test_gradients_are_those_of_the_folded_weights(tmp_path: Path) -> None:
    """dL/dD[i, j] = <dL/dW'_i, W_j>, with dL/dW' from an ordinary model that has the folded weights."""
    target, model = TARGETS["depth"], build(TARGETS["depth"], tmp_path)
    model(TOKENS).logsumexp(-1).sum().backward()
    plain = llama(
        target,
        {name: weight.detach() for name, weight in model.target_weights().items()},
    )
    plain(TOKENS).logsumexp(-1).sum().backward()
    source, gradients = (
        weights(SOURCE),
        {name: p.grad for name, p in plain.named_parameters()},
    )
    for kind in ("attention.wq", "feed_forward.w2", "ffn_norm"):
        have = model.depths[kind.replace(".", "_")].grad
        want = torch.tensor(
            [
                [
                    (
                        gradients[f"layers.{i}.{kind}.weight"]
                        * source[f"layers.{j}.{kind}.weight"]
                    ).sum()
                    for j in range(2)
                ]
                for i in range(5)
            ]
        )
        assert deviation(have, want) < 1e-5, kind


@pytest.mark.parametrize("case", TARGETS)
def test_the_stated_flops_are_those_torch_counts(case: str, tmp_path: Path) -> None:
    model = build(TARGETS[case], tmp_path)
    with FlopCounterMode(display=False) as counter:
        sum(weight.sum() for weight in model.target_weights().values()).backward()
    # torch counts no matrix-vector product (RMSNorm weights), and counts the spreading of B_V to heads as one.
    assert (
        abs(mapping_flops(SOURCE, TARGETS[case]) / counter.get_total_flops() - 1) < 0.02
    )


def test_maps_stay_float32_and_the_target_computes_in_bf16(tmp_path: Path) -> None:
    model = build(TARGETS["both"], tmp_path, precision="bfloat16")
    with torch.autocast(
        "cpu", dtype=torch.bfloat16
    ):  # as torchtitan does on one rank, and not under FSDP2
        on_one_rank = model(TOKENS)
    assert on_one_rank.dtype == torch.bfloat16
    assert torch.equal(on_one_rank, model(TOKENS))
    assert {weight.dtype for weight in model.target_weights().values()} == {
        torch.float32
    }
    exact = build(TARGETS["both"], tmp_path)(TOKENS)
    assert 1e-5 < deviation(model(TOKENS).float(), exact) < 5e-2


def test_a_damaged_source_is_refused(tmp_path: Path) -> None:
    state = weights(SOURCE)
    folder = sealed(state, tmp_path / "source")
    manifest = seal.read_seal(folder)
    assert manifest is not None
    name = "layers.1.attention.wq.weight"
    manifest["tensors"][name] = fingerprint(state[name] + 1)
    seal.write_json(folder / seal.MANIFEST, manifest)
    with pytest.raises(CheckpointError, match=f"{name} is not what was saved"):
        build(TARGETS["depth"], tmp_path)
    (folder / seal.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="is not sealed"):
        build(TARGETS["depth"], tmp_path)


def test_a_network_of_another_growth_is_refused(tmp_path: Path) -> None:
    folder = sealed(
        dict(build(TARGETS["depth"], tmp_path).state_dict()), tmp_path / "learned"
    )
    assert isinstance(read_network(folder, SOURCE, TARGETS["depth"]), HyperNetwork)
    with pytest.raises(CheckpointError, match=r"has no tensor widths\.emb"):
        read_network(folder, SOURCE, TARGETS["both"])
