"""The model of every family: its parameters, its cost, its gradients in chunks, compiled, and on two ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from families_for_tests import COMPILED, TINY
from growth_for_tests import apply, deviation, llama, weights
from side_by_side import plain_model
from test_ligo import sealed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode
from warm import in_ranks

from stackgrow.growth.draw import draw, generator
from stackgrow.growth.learned import initial_network, learned_rules
from stackgrow.plan.guidelines import attention_flops
from stackgrow.recipe.keys import Model
from stackgrow.titan.ligo import LigoArgs, LigoLlama
from stackgrow.titan.loss import TiedHead, chunk_head
from stackgrow.titan.model import Llama, model_args, parallelize
from stackgrow.titan.names import stored_name

LAYOUTS = {
    "FSDP": {"dp_shard": 2, "tp": 1},
    "tensor parallel": {"dp_shard": 1, "tp": 2},
}
ROUNDING = 1e-5  # of the largest entry: float32 sums in another order
TOKENS = torch.randint(0, 97, (2, 33), generator=torch.Generator().manual_seed(4))


def loss_of(network: nn.Module, tokens: Tensor) -> Tensor:
    logits = network(tokens[:, :-1])
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
    )


def gradients(network: nn.Module) -> dict[str, Tensor]:
    """By the names of a checkpoint, whole."""
    found = {}
    for name, weight in network.named_parameters():
        grad: Any = weight.grad
        found[stored_name(name)] = (
            grad.full_tensor() if isinstance(grad, DTensor) else grad
        )
    return found


def whole_gradients(model: Model) -> dict[str, Tensor]:
    network = llama(model, weights(model))
    loss_of(network, TOKENS).backward()
    return gradients(network)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert deviation(found[name], gradient) < ROUNDING, name


@pytest.mark.parametrize("case", TINY)
def test_tensors_are_the_models_parameters(case: str) -> None:
    model = TINY[case]
    with torch.device("meta"):
        network = Llama(model_args(model, 0))
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    assert shapes == model.tensors()
    assert model.parameters() == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("case", TINY)
def test_flops_are_those_of_the_matrix_products(case: str) -> None:
    """6 N a token, with the head's matrix once, tied or not, and attention, which is as wide as the heads. Norms and
    biases are in N and in no product."""
    model = TINY[case]
    network = llama(model, weights(model))
    for layer in network.layers.values():  # torch counts attention's products as such
        layer.attention.inner_attention.sdpa_backends = [SDPBackend.MATH]
    with FlopCounterMode(display=False) as counted:
        loss_of(network, TOKENS).backward()
    tokens, seq_len = 2 * 32, 32
    vectors = sum(shape[0] for shape in model.tensors().values() if len(shape) == 1)
    heads = model.n_heads * model.head_dim
    attention = attention_flops(model.n_layers, heads, seq_len, 1)
    products = 6 * (model.multiplied_parameters() - vectors) + attention
    assert counted.get_total_flops() == tokens * products
    _, per_token = network.model_args.get_nparams_and_flops(network, seq_len)
    assert per_token == 6 * model.multiplied_parameters() + attention


@pytest.mark.parametrize("case", [case for case in TINY if "qwen2" not in case])
def test_a_stage_is_measured_beside_torchtitans_model_of_the_same_tensors(
    case: str,
) -> None:
    model = TINY[case]
    model_class, args, _ = plain_model(model, seed=0)
    with torch.device("meta"):
        plain = model_class(args)
    shapes = sorted(tuple(weight.shape) for weight in plain.parameters())
    assert shapes == sorted(model.tensors().values())


@pytest.mark.parametrize("case", TINY)
def test_initial_weights_are_the_same_for_whoever_draws_them(case: str) -> None:
    model = TINY[case]
    args = model_args(model, 7)
    args.max_seq_len = 32
    network = Llama(args)
    with torch.no_grad():
        network.init_weights()
    for name, weight in network.named_parameters():
        whole = draw(name, model.tensors()[name], model, generator(7, name))
        assert torch.equal(weight, whole), name
    loss = loss_of(network, TOKENS) / TOKENS[:, 1:].numel()
    assert loss.item() == pytest.approx(torch.tensor(97.0).log().item(), rel=0.15)


@pytest.mark.parametrize("init", ["paper", "torchtitan", "torch"])
def test_a_tied_matrix_is_drawn_as_a_head(init: str) -> None:
    model = dataclasses.replace(TINY["smollm2"], init=init, dim=256, n_heads=4)
    drawn = draw("tok_embeddings.weight", (97, 256), model, generator(0))
    assert drawn.std().item() < 0.1, "N(0, 1) would make logits of sqrt(D)"


@pytest.mark.parametrize("case", TINY)
def test_the_loss_in_chunks_has_the_same_gradients(case: str) -> None:
    model = TINY[case]
    args = model_args(model, 0, loss_chunk=10)
    args.max_seq_len = 32
    network = Llama(args)
    network.load_state_dict(weights(model))
    network(TOKENS[:, :-1], labels=TOKENS[:, 1:]).backward()
    assert_close(gradients(network), whole_gradients(model))


@pytest.mark.parametrize("case", COMPILED)
def test_a_compiled_layer_has_the_same_gradients(case: str) -> None:
    """Traced whole, forward and backward, as train.compile does; code is generated in tests/e2e/test_parallel.py, and
    of every family in tests/e2e/test_family_runs.py (make test-generated)."""
    model = dataclasses.replace(TINY[case], n_layers=1)
    network = llama(model, weights(model))
    for name, layer in list(network.layers.named_children()):
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        network.layers.register_module(name, compiled)
    loss_of(network, TOKENS).backward()
    torch._dynamo.reset()
    assert_close(gradients(network), whole_gradients(model))


def test_a_tied_head_is_one_parameter_with_one_name() -> None:
    network = llama(TINY["smollm2"], weights(TINY["smollm2"]))
    assert isinstance(network.output, TiedHead)
    assert not list(network.output.parameters())
    with torch.no_grad():
        network.tok_embeddings.weight.fill_(2.0)
    assert (network.output.weight == 2.0).all()
    head = nn.Linear(4, 3, bias=False)
    chunk_head(head, 2)
    assert list(head.parameters()), "one of its own where it is not tied"


@pytest.mark.parametrize("case", TINY)
def test_learned_maps_compute_what_they_are_folded_into(
    case: str, tmp_path: Path
) -> None:
    source = TINY[case]
    target = dataclasses.replace(
        source, n_layers=3, dim=96, n_heads=8, n_kv_heads=4, ffn_dim=176
    )
    state = weights(source)
    checkpoint = sealed(state, tmp_path / "source")
    args = LigoArgs(
        source=source,
        target=target,
        checkpoint=str(checkpoint),
        seed=4,
        llama=model_args(target, 0),
    )
    args.llama.max_seq_len = 32
    with torch.device("meta"):
        learning = LigoLlama(args)
    learning.to_empty(device="cpu")
    learning.init_weights()
    network = initial_network(source, target, seed=4)
    folded = apply(learned_rules(source, target, network), state)
    with torch.no_grad():
        found = learning(TOKENS[:, :-1])
        expected = llama(target, folded)(TOKENS[:, :-1])
    assert deviation(found, expected) < ROUNDING
    loss_of(learning, TOKENS).backward()
    for name, matrix in learning.named_parameters():
        assert matrix.grad is not None, name
        assert matrix.grad.any(), name


def _on_two_ranks(rank: int, folder: str) -> None:
    """One of two processes: one step of every family on each layout, parallelized as a run is. Rank 0 writes down the
    gradients: FSDP has the sum over two sequences, one on each rank, tensor parallel that of both on both."""
    # Here, for the device comes before torchtitan, in a new process as well.
    from torchtitan.config.job_config import JobConfig
    from torchtitan.distributed import ParallelDims

    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    torch.set_num_threads(1)
    config = JobConfig()
    config.training.seq_len = 32
    config.training.mixed_precision_param = "float32"
    config.activation_checkpoint.mode = "none"
    config.parallelism.disable_loss_parallel = True
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for layout, degrees in LAYOUTS.items():
        dims = ParallelDims(
            dp_replicate=1, cp=1, pp=1, ep=1, etp=1, world_size=2, **degrees
        )
        dims.build_mesh()
        found[layout] = {}
        for case, model in TINY.items():
            network = parallelize(llama(model, weights(model)), dims, config)
            tokens = TOKENS[rank : rank + 1] if layout == "FSDP" else TOKENS
            loss_of(network, tokens).backward()
            found[layout][case] = gradients(network)
    if rank == 0:
        torch.save(found, f"{folder}/gradients")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def on_two_ranks(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, dict[str, Tensor]]]:
    """{layout: {family: gradients}}, of two processes that load torchtitan once for all of them."""
    folder: Path = tmp_path_factory.mktemp("two-ranks")
    in_ranks(_on_two_ranks, 2, str(folder))
    loaded: dict[str, dict[str, dict[str, Tensor]]] = torch.load(folder / "gradients")
    return loaded


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", TINY)
def test_two_ranks_have_the_gradients_of_one(
    on_two_ranks: dict[str, dict[str, dict[str, Tensor]]], case: str, layout: str
) -> None:
    assert_close(on_two_ranks[layout][case], whole_gradients(TINY[case]))
