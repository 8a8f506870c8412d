"""The planner's bytes against those of shards that torchtitan made, on fake ranks, and of a step that a CPU computed."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from recipes_for_tests import RECIPE, edited, plan_of

from stackgrow.plan.memory import Layout, layout, local_elements, stage_memory
from stackgrow.plan.resolve import make_plan
from stackgrow.recipe.load import load_recipe

GIANT = Path(__file__).parents[2] / "recipes" / "7b_gstack.toml"
SMALL = [
    "model.dim=256", "model.n_layers=8", "model.n_heads=4", "model.ffn_dim=704", "model.vocab_size=1024",
    "data.seq_len=256", "train.global_batch_tokens=2Ki", "budget.tokens=200K", "growth[1].timing=60K",
    "train.precision=fp32", "train.optimizer=foreach",
]  # fmt: skip


def _plan(file: Path, sets: list[str]) -> Any:
    return make_plan(load_recipe(file, sets), file)


def _trace(file: Path, sets: list[str], ranks: int, index: int, real: bool) -> Any:
    from stackgrow.titan import dry_run

    plan = _plan(file, sets)
    with dry_run.fake_ranks(ranks):
        return dry_run.trace(plan.recipe, plan.train_stages[index], real=real)


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    """A process of its own: the fake process group must not meet another test's."""
    with ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        yield pool


@pytest.mark.parametrize(
    ("ranks", "sets"),
    [
        (32, []),
        (256, ["parallel.replicate=32", "train.activation_checkpoint=none"]),
        (
            1024,
            ["train.activation_checkpoint=full"],
        ),  # 32000 and 11008 rows do not divide
        (256, ["parallel.tensor=8"]),
        (
            1024,
            [
                "parallel.tensor=4",
                "parallel.replicate=8",
                "train.activation_checkpoint=none",
            ],
        ),
        (256, ["model.n_kv_heads=4", "train.loss_chunk=1024", "parallel.shard=256"]),
        (8, ["parallel.tensor=8", "train.precision=fp32", "base.train.micro_batch=2"]),
        (32, ["model.family=qwen3", "model.head_dim=64", "model.tie_embeddings=true"]),
        (256, ["model.family=qwen2", "model.tie_embeddings=true", "parallel.tensor=8"]),
    ],
)
def test_shards_of_the_7b(
    process: ProcessPoolExecutor, ranks: int, sets: list[str]
) -> None:
    """Two layers of the 7B's width: its other stages are the same with more layers (tools/dry_run.py has them all)."""
    sets = [*sets, "train.compile=false"]  # a trace is not compiled
    stage = _plan(GIANT, sets).train_stages[0]
    planned = stage_memory(stage, layout(stage.parallel, ranks))
    traced = process.submit(_trace, GIANT, sets, ranks, 0, False).result()
    assert traced.state_equals(planned), (traced, planned)
    assert planned.working == pytest.approx(traced.working, rel=0.12)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_working_memory_of_a_step_that_is_computed(
    process: ProcessPoolExecutor, tmp_path: Path, mode: str
) -> None:
    sets = [*SMALL, f"train.activation_checkpoint={mode}"]
    stage = plan_of(tmp_path, RECIPE, sets).train_stages[2]
    planned = stage_memory(stage, layout(stage.parallel, 1))
    traced = process.submit(
        _trace, tmp_path / "some_recipe.toml", sets, 1, 2, True
    ).result()
    assert traced.state_equals(planned)
    assert planned.working == pytest.approx(traced.working, rel=0.15)
    logits = planned.loss // 3
    assert planned.activations == pytest.approx(traced.kept - logits, rel=0.15)


def _kept_compiled(stage: Any, sharded: bool, autocast: bool) -> int:
    """Bytes that the stage's compiled layers save for the backward pass. Inductor's partitioner chooses them, for a CPU
    as for a GPU; the code that it would generate is not needed."""
    import torch
    from torchtitan.config.job_config import ActivationCheckpoint
    from torchtitan.distributed.activation_checkpoint import apply_ac

    from stackgrow.titan.dry_run import CPU_SAVED
    from stackgrow.titan.model import Llama, model_args

    torch._dynamo.reset()
    network = Llama(model_args(stage.model, 0))
    if (mode := stage.train.activation_checkpoint) != "none":
        how = ActivationCheckpoint(mode=mode, selective_ac_option="op")
        apply_ac(network, how, model_compile_enabled=True, op_sac_save_list=CPU_SAVED)
    rotations = network.freqs_cis
    for weight in network.parameters():
        weight.data = weight.to(torch.bfloat16 if sharded else torch.float32)
    own = {
        tensor.untyped_storage().data_ptr()
        for tensor in (*network.parameters(), rotations)
    }
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    hidden = network.tok_embeddings(
        torch.zeros(stage.micro_batch(1), stage.seq_len, dtype=torch.int64)
    )
    with (
        torch.autocast("cpu", torch.bfloat16, autocast),
        torch.autograd.graph.saved_tensors_hooks(note, lambda t: t),
    ):
        for layer in network.layers.values():
            hidden = torch.compile(layer, backend="aot_eager_decomp_partition")(
                hidden, rotations, None
            )
    return sum(saved.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_what_compiled_layers_keep(tmp_path: Path, mode: str, precision: str) -> None:
    sharded, autocast = precision == "bf16", precision == "autocast"
    sets = [
        *SMALL,
        f"train.activation_checkpoint={mode}",
        "train.compile=true",
        "model.n_kv_heads=2",
        # Two layers against one: each is compiled.
        "model.n_layers=4",
        "base.n_layers=1",
    ]
    sets += [f"train.precision={'fp32' if precision == 'fp32' else 'bf16'}"]
    shallow, deep, _ = plan_of(tmp_path, RECIPE, sets).train_stages
    here = Layout(1, 2 if sharded else 1, 1)
    fewer, more = (
        stage_memory(s, here, s.micro_batch(1)).activations for s in (shallow, deep)
    )
    planned = more - fewer
    found = _kept_compiled(deep, sharded, autocast) - _kept_compiled(
        shallow, sharded, autocast
    )
    if autocast and mode == "none":  # the weights in bf16 are there, too
        planned += 2 * (deep.model.parameters() - shallow.model.parameters())
    assert planned == pytest.approx(found, rel=0.01)


def test_rank_0_has_the_largest_chunk() -> None:
    assert (
        local_elements("tok_embeddings.weight", (10, 3), Layout(1, 4, 1)) == 9
    )  # rows 3 3 3 1
    assert (
        local_elements("feed_forward.w2.weight", (10, 6), Layout(2, 4, 2)) == 9
    )  # columns 3, then rows 3
    assert (
        local_elements("feed_forward.w1.weight", (10, 6), Layout(1, 2, 2)) == 18
    )  # rows 5, then 3
    assert local_elements("norm.weight", (10,), Layout(1, 4, 2)) == 3


def test_host_memory_holds_what_is_offloaded(tmp_path: Path) -> None:
    on, off = (
        plan_of(tmp_path, RECIPE, [f"train.cpu_offload={v}"]).train_stages[-1]
        for v in ("false", "true")
    )
    there, away = (stage_memory(s, layout(s.parallel, 4)) for s in (on, off))
    assert away.host == there.parameters + there.gradients + there.optimizer
    assert away.total == away.working == there.working


def test_learned_maps_are_few_and_their_models_whole(tmp_path: Path) -> None:
    text = edited(
        (
            '[[growth]]\noperator = "stack"\nfactor = 2\ntiming = "20K"',
            '[[growth]]\noperator = "learn"\nlearn_steps = "5 steps"\nfactor = 2\ntiming = "20K"',
        )
    )
    stages = plan_of(tmp_path, text).train_stages
    learn, grown = stages[1], stages[2]
    learned, trained = (stage_memory(s, layout(s.parallel, 1)) for s in (learn, grown))
    assert learned.parameters == learn.checkpoint_bytes // 3
    assert learned.working - trained.working == 4 * (
        stages[0].model.parameters() + 2 * grown.model.parameters()
    )


def test_a_rate_of_new_parameters_takes_a_copy_of_the_weights(tmp_path: Path) -> None:
    """While the update is made, beside a byte for each that tells which are new (titan/new_rate.py)."""
    sets = ["train.horizon=120 steps", "growth[1].lr=continue"]
    new = "growth[1].lr_new={rewarm_steps=6, ratio=1.3}"
    wide = ["model.ffn_dim=4096", "train.activation_checkpoint=full"]
    for more, is_largest in ([], False), ([*wide, "train.micro_batch=1"], True):
        plain, own = (
            plan_of(tmp_path, RECIPE, [*sets, *more, *keys]).train_stages[-1]
            for keys in ([], [new])
        )
        parameters = own.model.parameters()
        before = stage_memory(plain, Layout(1, 1, 1)).working
        after = stage_memory(own, Layout(1, 1, 1)).working
        assert after == max(before, 4 * parameters) + parameters
        assert (4 * parameters > before) == is_largest
