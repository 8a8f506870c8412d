"""Recipe -> Plan: steps, tokens and positions, hashes, learning rates, and recipes that contradict themselves."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from recipes_for_tests import RECIPE, edited, plan_of, problems_of, recipe_of

from stackgrow.plan import guidelines
from stackgrow.plan.checks import world_problems
from stackgrow.plan.resolve import make_plan
from stackgrow.plan.stages import GrowStage, Plan, TrainStage
from stackgrow.recipe.keys import Model, Recipe, Train
from stackgrow.recipe.load import RecipeError
from stackgrow.recipe.write import toml_name

BATCH = "global_batch_tokens = 1024"
TWO_BATCHES = edited(
    (
        "[base]\nn_layers = 2",
        "[base]\nn_layers = 2\n[base.train]\nglobal_batch_tokens = 256",
    ),
    ('timing = "40 steps"', 'timing = "100 steps"'),
)
SCRATCH = RECIPE[: RECIPE.index("[base]")] + RECIPE[RECIPE.index("[train]") :]


def test_stages_share_the_budget_to_the_step(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert [s.name for s in plan.stages] == [
        "stage-0-train-2L", "stage-1-grow", "stage-2-train-4L", "stage-3-grow", "stage-4-train-8L",
    ]  # fmt: skip
    assert [s.steps for s in plan.train_stages] == [
        20,
        20,
        57,
    ]  # 20K/1024 = 19.5; growth at step 40; 58,6K left
    grow = plan.stages[3]
    assert isinstance(grow, GrowStage)
    assert grow.layer_map == (0, 1, 2, 3, 0, 1, 2, 3)
    assert (grow.source, grow.target) == (
        plan.train_stages[1].model,
        plan.train_stages[2].model,
    )
    assert plan.train_stages[2].model == plan.recipe.model


@pytest.mark.parametrize(
    "text", [RECIPE, TWO_BATCHES, SCRATCH], ids=["one batch", "two batches", "scratch"]
)
def test_every_stage_starts_where_the_one_before_stopped(
    tmp_path: Path, text: str
) -> None:
    plan = plan_of(tmp_path, text)
    tokens = sequences = 0
    flops = 0.0
    for stage in plan.train_stages:
        assert (stage.start_tokens, stage.start_sequences, stage.start_flops) == (
            tokens,
            sequences,
            flops,
        )
        assert stage.tokens == stage.steps * stage.train.global_batch_tokens
        assert stage.tokens == stage.steps * stage.batch_sequences * stage.seq_len
        tokens, sequences = (
            tokens + stage.tokens,
            sequences + stage.steps * stage.batch_sequences,
        )
        flops += stage.flops
    assert (plan.tokens, plan.sequences, plan.flops) == (tokens, sequences, flops)
    assert sequences * plan.recipe.data.seq_len == tokens
    assert (
        0
        <= plan.recipe.budget.tokens - tokens
        < plan.train_stages[-1].train.global_batch_tokens
    )


def test_a_batch_of_its_own_in_the_base_stage(tmp_path: Path) -> None:
    first, second, _ = plan_of(tmp_path, TWO_BATCHES).train_stages
    assert (first.steps, first.batch_sequences) == (78, 4)  # 20K / 256 = 78.1
    assert (second.start_tokens, second.start_sequences) == (78 * 256, 78 * 4)
    assert second.train.global_batch_tokens == 1024


def test_overrides_hold_for_one_stage(tmp_path: Path) -> None:
    text = edited(
        ('timing = "20K"', 'timing = "20K"\n[growth.train]\nlearning_rate = 5e-4')
    )
    assert [s.train.learning_rate for s in plan_of(tmp_path, text).train_stages] == [
        1e-3,
        5e-4,
        1e-3,
    ]


def test_scratch_has_one_stage(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, SCRATCH)
    assert [s.name for s in plan.stages] == ["stage-0-train-8L"]
    assert (plan.stages[0].steps, plan.base_share) == (97, 0)  # type: ignore[union-attr]


def test_flops_and_bytes_are_those_counted_by_hand(tmp_path: Path) -> None:
    base, _, target = plan_of(tmp_path).train_stages
    layer = 4 * 64 * 64 + 3 * 64 * 96 + 2 * 64
    assert base.flops == 6 * (2 * layer + 64 + 64 * 256) * 20 * 1024
    assert base.attention_flops == 12 * 2 * 64 * 64 * 20 * 1024
    assert target.checkpoint_bytes == 12 * (8 * layer + 64 + 2 * 64 * 256)
    plan = plan_of(tmp_path)
    assert plan.base_share == pytest.approx((plan.flops - target.flops) / plan.flops)


def test_factor_may_be_left_out_of_a_single_growth(tmp_path: Path) -> None:
    start, end = RECIPE.index("[[growth]]"), RECIPE.index("[train]")
    one = (
        RECIPE[:start]
        + '[[growth]]\noperator = "stack"\ntiming = "20K"\norder = "interleave"\n'
        + RECIPE[end:]
    )
    assert plan_of(tmp_path, one).stages[1].layer_map == (0, 0, 0, 0, 1, 1, 1, 1)  # type: ignore[union-attr]
    assert (
        "none leads from 3 layers"
        in problems_of(tmp_path, one, ["base.n_layers=3"])["growth[0].factor"]
    )


def test_a_layer_map_of_ones_own_is_planned_and_noted(tmp_path: Path) -> None:
    text = edited(
        (
            'factor = 2\ntiming = "40 steps"',
            'layer_map = [0, 1, 0, 1, 0, 1, 2, 2]\ntiming = "40 steps"',
        )
    )
    plan = plan_of(tmp_path, text)
    assert plan.stages[3].layer_map == (0, 1, 0, 1, 0, 1, 2, 2)  # type: ignore[union-attr]
    assert plan.notes == (
        "growth[1]: keeps 4 of 7 connections between layers, R_c = 57.1% (paper, eq. 51)",
        "growth[1].layer_map: source layers 3 are dropped",
    )


def test_auto_timing_is_the_guideline(tmp_path: Path) -> None:
    text = edited(
        ('timing = "40 steps"', 'timing = "auto"'), ('tokens = "100K"', 'tokens = "1T"')
    )
    plan = plan_of(tmp_path, text, ["train.global_batch_tokens=64"])
    n = plan.recipe.model.non_embedding_parameters()
    expected = guidelines.growth_timing(n, 6 * n * 10**12)
    assert abs(plan.train_stages[2].start_tokens - expected) <= 64
    assert plan.notes[0].startswith("growth[1].timing: guideline d = ")
    assert (
        "extrapolated: fitted on 410M to 3B" in plan.notes[0]
    )  # a model this small is below the fit


def test_auto_timing_tells_when_it_extrapolates(tmp_path: Path) -> None:
    sets = [
        "model.dim=8192",
        "model.ffn_dim=32768",
        "model.n_heads=64",
        "growth[1].timing=auto",
        "budget.tokens=9T",
    ]
    assert (
        "extrapolated: fitted on 410M to 3B, up to 1.2e21"
        in plan_of(tmp_path, RECIPE, sets).notes[0]
    )


OWN_GUIDELINE = "guideline={a=0.0,b=0.0,c=9.0,source='my sweep'}"
CONTRADICTIONS: list[tuple[tuple[str, ...], str, tuple[str, ...]]] = [
    (("budget.tokens=30K",), "budget.tokens", ("30K leaves no step of 1.02K tokens after 41K", "raise the budget")),
    (("budget.tokens=20K",), "budget.tokens", ("20K leaves no step",)),
    (("growth[1].timing=auto",), "growth[1].timing", ('"auto" (here ', "a budget of 100K", "guideline, fitted on models of")),
    (("growth[1].timing=auto", OWN_GUIDELINE), "growth[1].timing", ("it is [guideline]; give an amount",)),
    (("growth[1].timing=20K",), "growth[1].timing", ('"20000 tokens"', "at 20.5K", "must rise")),
    (("growth[1].timing=10K",), "growth[1].timing", ('"10000 tokens"', "must rise")),
    (("growth[0].timing=1 token",), "growth[0].timing", ('"1 tokens" is not at least one step',)),
    (("base.n_layers=3",), "growth", ("3 -> 6 -> 12 layers", "model.n_layers = 8")),
    (("model.n_layers=4",), "growth", ("2 -> 4 -> 8 layers", "model.n_layers = 4")),
    (("base.n_layers=8", "model.n_layers=2"), "growth", ("8 -> 16 -> 32 layers", "model.n_layers = 2")),
    (("base.n_layers=4000",), "growth[0].factor", ("2 makes 8000 layers of 4000", "4096")),
    (("growth[1].layer_map=[0,1]",), "growth[1].layer_map", ("stands beside a factor",)),
    (("growth=[{operator='stack',timing='9K',layer_map=[0]}]",), "growth[0].layer_map", ("1 layers", "source's 2")),
    (
        ("growth=[{operator='stack',timing='9K',layer_map=[0,1,0,1,0,1,0]}]",),
        "growth[0].layer_map",
        ("has 7 entries, one for each layer", "model.n_layers = 8"),
    ),
    (("growth=[{operator='stack',timing='9K',layer_map=[0,2]}]",), "growth[0].layer_map", ("layer 2", "0 to 1")),
    (("growth=[{operator='stack',timing='9K',layer_map=[0,1],order='interleave'}]",), "growth[0].order", ("beside",)),
    (("growth=[]",), "growth", ("is missing", "[base] needs")),
    (("model.n_heads=5",), "model.n_heads", ("5 does not divide model.dim = 64",)),
    (("model.n_heads=64",), "model.n_heads", ("odd width 1",)),
    (("model.n_kv_heads=3",), "model.n_kv_heads", ("3 does not divide model.n_heads = 4",)),
    (("parallel.tensor=8",), "parallel.tensor", ("8 does not divide model.n_heads = 4",)),
    (("parallel.tensor=4", "model.n_kv_heads=2"), "parallel.tensor", ("4 does not divide model.n_kv_heads = 2",)),
    (("parallel.tensor=2", "data.seq_len=2"), "parallel.tensor", ("multiple of 2 x tensor = 4",)),
    (("parallel.tensor=2", "parallel.async_tensor=true"), "parallel.async_tensor", ("train.compile = true",)),
    (("train.attention=flash_attn", "train.precision=fp32"), "train.attention", ("bf16 alone", '"fp32"')),
    (("train.attention=flash_attn", "model.dim=2048"), "train.attention", ("at most 256, not 512",)),
    (("train.loss_chunk=64", "parallel.tensor=2"), "train.loss_chunk", ("64 is not supported", "set it to 0")),
    (("data.mix=[{path='a',weight=1}]",), "data.path", ('"data/tiny" stands beside [[data.mix]]',)),
    (("data={seq_len=64,mix=[{path='a',weight=1},{path='a',weight=2}]}",), "data.mix[1].path", ("twice",)),
    (("data.document_mask=true",), "train.attention", ('"sdpa" cannot keep documents apart', 'use "flex"')),
    (("data={seq_len=64}",), "data.path", ("is missing; name a token store",)),
    (("parallel.pipeline=2",), "parallel.pipeline", ("2 is not supported",)),
    (("parallel.context=2",), "parallel.context", ("2 is not supported",)),
    (("train.global_batch_tokens=1000",), "train.global_batch_tokens", ("1000", "960 and 1024")),
    (("train.global_batch_tokens=10",), "train.global_batch_tokens", ("10", "the least is 64")),
    (("base.train.global_batch_tokens=2.001M",), "base.train.global_batch_tokens", ("2001000", "2Mi means")),
    (("train.min_learning_rate=1",), "train.min_learning_rate", ("1 is above learning_rate = 0.001",)),
    (("base.train.min_learning_rate=1",), "base.train.min_learning_rate", ("1 is above",)),
    (("train.warmup=50 steps",), "train.warmup", ("50 steps", "stage-2-train-4L")),
    (("train.horizon=500 steps", "train.warmup=58 steps"), "train.warmup", ("58 steps", "57 steps of stage-4")),
    (("growth[1].train.warmup=58 steps",), "growth[1].train.warmup", ("58 steps", "57 steps of stage-4-train-8L")),
    (("train.horizon=20 steps",), "train.horizon", ("20 steps are fewer than the 57 steps",)),
    (("base.parallel.tensor=3",), "base.parallel.tensor", ("3 does not divide model.n_heads = 4",)),
    (("growth[0].parallel.tensor=8",), "growth[0].parallel.tensor", ("8 does not divide model.n_heads = 4",)),
    (("growth[1].parallel.pipeline=2",), "growth[1].parallel.pipeline", ("2 is not supported",)),
    (("train.batch_warmup=['100 for 2 steps']",), "train.batch_warmup[0]", ("100", "64 and 128")),
    (("train.batch_warmup=['512 for 1 step','256 for 1 step']",), "train.batch_warmup", ("[512, 256] do not rise",)),
    (("train.batch_warmup=['1Ki for 1 step']",), "train.batch_warmup", ("[1024] do not rise to",)),
    (("base.train.batch_warmup=['512 for 40 steps']",), "base.train.batch_warmup", ("40 steps are more than the 39",)),
    (("base.position=5",), "base.position", ("no meaning without base.from",)),
    (("growth[0].timing=start",), "growth[0].timing", ('"start" is for the first growth of a base.from',)),
    (("growth[1].timing=start", "base.from=x"), "growth[1].timing", ('"start" is for the first growth',)),
    (("growth=[{operator='random',ramp='2 steps',timing='9K'}]", "train.precision=float8"), "train.precision", ('"random" masks',)),
    (("data.seq_len=72", "train.global_batch_tokens=1152", "train.precision=float8"), "train.precision", ("multiple of 16, not 72",)),
    (("train.precision=float8", "parallel.tensor=4"), "parallel.tensor", ("shards of ffn_dim = 96 that are no multiples of 16",)),
    (("growth=[{operator='learn',learn_steps='2 steps',timing='9K'}]", "train.precision=float8"), "train.precision", ('"learn" makes',)),
    (("base.n_layers=8", "growth=[{operator='zero',timing='9K'}]"), "growth[0]", ("nothing grows",)),
    (("base.n_layers=3", "growth=[{operator='stack',factor=2,timing='9K'},{operator='stack',model={dim=64},timing='20K'}]"), "growth[1]", ("nothing grows",)),
    (("base.n_layers=3", "base.model={dim=32,n_heads=2,ffn_dim=48}", "growth=[{operator='stack',factor=2,timing='9K'},{operator='split',model={dim=64,n_heads=4,ffn_dim=96},timing='20K'}]"), "growth", ("3 -> 6 -> 6 layers", "model.n_layers = 8")),
    (("data={seq_len=64, mix=[{path='a',weight=1},{path='./a/',weight=2}]}",), "data.mix[1].path", ('"./a/" is in the mixture twice',)),
    (("growth=[{operator='random',ramp='2 steps',timing='9K'}]", "train.cpu_offload=true"), "train.cpu_offload", ("mask",)),
    (("base.from=x", "growth[0].timing=start", "base.train.warmup=500 steps"), "base.train", ("untrained",)),
    (("base.from=x", "growth[0].timing=start", "base.parallel.tensor=2"), "base.parallel", ("untrained",)),
    (("growth[0].timing={loss_slope=1,min='10 steps',max='10 steps'}",), "growth[0].timing", ("10 to 10 steps", "max must be later")),
    (("growth[0].timing={loss_slope=1,min='3 steps',max='9 steps'}",), "growth[0].timing", ("3 to 9 steps", "at least 4 steps")),
    (("growth[0].timing={loss_slope=1,min='10K',max='45 steps'}",), "growth[1].timing", ('"40 steps"', "must rise")),
    (("growth[0].timing={loss_slope=1,min='10K',max='30 steps'}", "train.warmup=11 steps"), "train.warmup", ("more than the 10 steps of stage-0",)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("sets", "where", "parts"),
    CONTRADICTIONS,
    ids=[" ".join(c[0])[:60] for c in CONTRADICTIONS],
)
def test_contradictory_keys_are_told_with_their_place(
    tmp_path: Path, sets: tuple[str, ...], where: str, parts: tuple[str, ...]
) -> None:
    with pytest.raises(RecipeError) as caught:
        plan_of(tmp_path, RECIPE, sets)
    assert str(tmp_path / "some_recipe.toml") in str(caught.value)
    messages = [message for path, message in caught.value.problems if path == where]
    assert any(all(part in message for part in parts) for message in messages), (
        caught.value
    )


def test_growth_needs_a_base(tmp_path: Path) -> None:
    problems = problems_of(tmp_path, edited(("[base]\nn_layers = 2\n", "")))
    assert "[[growth]] needs a table [base]" in problems["base"]


def test_contradictions_are_reported_together(tmp_path: Path) -> None:
    sets = [
        "model.n_heads=5",
        "growth[0].factor=9",
        "train.global_batch_tokens=1000",
        "train.min_learning_rate=1",
    ]
    problems = problems_of(tmp_path, RECIPE, [*sets, "parallel.pipeline=2"])
    assert set(problems) == {
        "model.n_heads", "parallel.pipeline", "growth", "train.global_batch_tokens", "train.min_learning_rate",
    }  # fmt: skip


def test_a_base_that_is_never_trained_is_not_laid_out(tmp_path: Path) -> None:
    sets = [
        "base.from=x",
        "growth[0].timing=start",
        "parallel.tensor=4",
        "train.micro_batch=1",
    ]
    narrow = [
        "base.model={dim=32, n_heads=2}",
        "growth[0].operator=zero",
        "growth[0].model={dim=64, n_heads=4}",
    ]
    assert [
        s.model.n_heads
        for s in plan_of(tmp_path, RECIPE, [*sets, *narrow]).train_stages
    ] == [4, 4]


def test_one_step_per_stage_is_enough(tmp_path: Path) -> None:
    """One step per stage is enough, and warm-up may fill a stage."""
    plan = plan_of(
        tmp_path,
        RECIPE,
        [
            "growth[0].timing=1 step",
            "growth[1].timing=2 steps",
            "budget.tokens=3Ki",
            "train.warmup=1 step",
        ],
    )
    assert [s.steps for s in plan.train_stages] == [1, 1, 1]


@pytest.mark.parametrize(
    ("sets", "world", "where", "part"),
    [
        (
            [],
            3,
            "train.global_batch_tokens",
            "16 sequences per step cannot be shared equally by 3 data ranks",
        ),
        (["parallel.tensor=2"], 3, "parallel", "start a multiple of 2 ranks"),
        (
            ["train.cpu_offload=true"],
            1,
            "train.cpu_offload",
            "needs parallel.shard of at least 2",
        ),
        (
            ["parallel.shard=2"],
            4,
            "parallel",
            "start 2 ranks, or set parallel.shard = -1",
        ),
        (["parallel.shard=2", "parallel.replicate=2"], 2, "parallel", "start 4 ranks"),
        (["parallel.tensor=2", "train.precision=bf16"], 2, "train.precision", '"fp32"'),
        (
            ["parallel.tensor=2", "parallel.replicate=2"],
            4,
            "parallel.replicate",
            "use parallel.shard",
        ),
        (
            ["growth[1].parallel.shard=4"],
            2,
            "parallel",
            "stage-4-train-8L: replicate 1 x shard 4",
        ),
        (
            ["train.batch_warmup=['192 for 1 step']"],
            2,
            "train.global_batch_tokens",
            "3 sequences per step",
        ),
    ],
)
def test_ranks_that_do_not_fit(
    tmp_path: Path, sets: list[str], world: int, where: str, part: str
) -> None:
    problems = dict(world_problems(plan_of(tmp_path, RECIPE, sets), world))
    assert part in problems[where], problems


@pytest.mark.parametrize(
    ("sets", "world"),
    [
        ([], 1),
        ([], 16),
        (["parallel.shard=2", "parallel.replicate=2"], 4),
        (["parallel.tensor=2"], 4),
    ],
)
def test_ranks_that_fit_have_no_problem(
    tmp_path: Path, sets: list[str], world: int
) -> None:
    assert list(world_problems(plan_of(tmp_path, RECIPE, sets), world)) == []


FREE = {
    "train.on_nonfinite": "skip",
    "checkpoint.verify": "sampled",
    "run.accept_versions": "true",
    "name": "other",
    "data.path": "elsewhere",
    "data.workers": "2",
    "data.tokenizer": "ab" * 32,
    "train.micro_batch": "4",
    "train.optimizer": "foreach",
    "train.compile": "true",
    "train.attention": "flash_attn",
    "train.loss_chunk": "128",
    "train.activation_checkpoint": "full",
    "train.cpu_offload": "true",
    "train.deterministic": "true",
    "parallel.replicate": "2",
    "parallel.shard": "2",
    "parallel.tensor": "2",
    "parallel.loss_parallel": "false",
    "parallel.async_tensor": "true",
    "parallel.reshard_after_forward": "never",
    "validation.interval": "5 steps",
    "checkpoint.interval": "5 steps",
    "checkpoint.keep": "5",
    "checkpoint.async_mode": "async",
    "log.interval": "5 steps",
    "log.tensorboard": "false",
    "log.wandb": "true",
    "eval.tasks": "['paper']",
    "eval.after": "each",  # these with eval.tasks
    "eval.interval": "5 steps",
    "eval.batch": "2",
    "eval.limit": "10",
    "eval.include": "tasks",
    "run.folder": "elsewhere",
    "run.init_timeout": "5",
    "run.train_timeout": "5",
    "run.on_event": "./notify.sh",
    "run.stall_seconds": "5",
}
DEFINING = {
    "train.on_spike": "skip",
    "seed": "8",
    "model.dim": "32",
    "model.n_heads": "2",
    "model.n_kv_heads": "2",
    "model.ffn_dim": "64",
    "model.vocab_size": "512",
    "model.norm_eps": "1e-6",
    "model.rope_theta": "5000",
    "model.init": "torchtitan",
    "model.family": "llama3",
    "model.head_dim": "4",
    "model.tie_embeddings": "true",
    "model.qk_norm": "true",
    "model.attention_bias": "true",
    "model.rope_scaling.factor": "8.0",
    "model.rope_scaling.low_freq_factor": "2.0",
    "model.rope_scaling.high_freq_factor": "3.0",
    "model.rope_scaling.original_length": "1024",
    "data.seq_len": "32",
    "data.document_mask": "true",  # with train.attention = "flex"
    "base.n_layers": "1",  # with model.n_layers = 4
    "base.from": "elsewhere",
    "base.position": "5",  # with base.from
    "train.batch_warmup": "['512 for 4 steps']",
    "train.global_batch_tokens": "2048",
    "train.learning_rate": "2e-3",
    "train.min_learning_rate": "1e-5",
    "train.schedule": "wsd",
    "train.warmup": "5 steps",
    "train.horizon": "500 steps",
    "train.decay_fraction": "0.2",
    "train.beta1": "0.8",
    "train.beta2": "0.9",
    "train.eps": "1e-6",
    "train.weight_decay": "0",
    "train.max_grad_norm": "2",
    "train.precision": "fp32",
}


def free_keys(cls: type = Recipe, where: str = "") -> dict[str, bool]:
    """TOML path -> whether it is free, for all keys outside of arrays."""
    keys: dict[str, bool] = {}
    for spec in dataclasses.fields(cls):
        if "kind" in spec.metadata:
            keys[where + toml_name(spec)] = spec.metadata["free"]
        elif "table" in spec.metadata and not spec.metadata["many"]:
            keys |= free_keys(spec.metadata["table"], f"{where}{spec.name}.")
    return keys


def test_every_key_is_classified() -> None:
    """Beside them: pipeline and context take no value but 1, the sizes are tested below."""
    keys = free_keys()
    assert {k for k, free in keys.items() if free} == {
        *FREE,
        "parallel.pipeline",
        "parallel.context",
    }
    rest = {"model.n_layers", "budget.tokens"}
    rest |= {
        "validation.sequences",
        "validation.take",
    }  # no part of what is trained, and refused all the same: run/changed.py
    rest |= {"train.spike_sigmas"}
    rest |= {
        f"guideline.{key}"
        for key in ("a", "b", "c", "source", "max_parameters", "max_flops")
    }  # in test_timing.py
    assert {k for k, free in keys.items() if not free} == {*DEFINING, *rest}


def hashes(tmp_path: Path, *sets: str, data: str = "data hash") -> dict[str, str]:
    return plan_of(tmp_path, RECIPE, sets).stage_hashes(data)


@pytest.mark.parametrize("key", FREE)
def test_free_keys_leave_the_stage_hashes(tmp_path: Path, key: str) -> None:
    extra = (
        ("train.compile=true", "parallel.tensor=2")
        if key == "parallel.async_tensor"
        else ()
    )
    extra += ("eval.tasks=['paper']",) if key.startswith("eval.") else ()
    assert hashes(tmp_path, f"{key}={FREE[key]}", *extra) == hashes(tmp_path)


@pytest.mark.parametrize("key", DEFINING)
def test_defining_keys_change_every_stage_hash(tmp_path: Path, key: str) -> None:
    extra = {
        "base.n_layers": ("model.n_layers=4",),
        "base.position": ("base.from=elsewhere",),
    }.get(key, ())
    if key.startswith("model.rope_scaling.") and not key.endswith(".factor"):
        extra = ("model.rope_scaling.factor=4.0",)
    extra = ("train.attention=flex",) if key == "data.document_mask" else extra
    assert set(hashes(tmp_path, f"{key}={DEFINING[key]}", *extra).values()).isdisjoint(
        hashes(tmp_path).values()
    )


def test_what_is_a_spike_changes_the_hashes_where_its_update_is_left_out(
    tmp_path: Path,
) -> None:
    skip, sigmas = "train.on_spike=skip", "train.spike_sigmas=4"
    assert set(hashes(tmp_path, skip, sigmas).values()).isdisjoint(
        hashes(tmp_path, skip).values()
    )
    assert hashes(tmp_path, "train.on_spike=stop", sigmas) == hashes(tmp_path)


def test_the_data_change_every_stage_hash(tmp_path: Path) -> None:
    assert set(hashes(tmp_path, data="other").values()).isdisjoint(
        hashes(tmp_path).values()
    )


@pytest.mark.parametrize(
    ("assignment", "first_changed"),
    [
        ("budget.tokens=200K", 4),
        ("growth[1].train.beta1=0.8", 4),
        ("growth[1].order=interleave", 3),
        ("growth[1].timing=45 steps", 2),
        ("growth[0].train.beta1=0.8", 2),
        ("growth[0].order=interleave", 1),
        ("growth[0].timing=10K", 0),
        ("base.train.beta1=0.8", 0),
    ],
)
def test_an_edit_changes_its_stage_and_the_later_ones(
    tmp_path: Path, assignment: str, first_changed: int
) -> None:
    old, new = (
        list(hashes(tmp_path).items()),
        list(hashes(tmp_path, assignment).items()),
    )
    assert [a == b for a, b in zip(old, new, strict=True)] == [
        i < first_changed for i in range(5)
    ]


def test_the_same_model_at_another_position_is_another_stage(tmp_path: Path) -> None:
    assert len(set(hashes(tmp_path).values())) == 5


MODEL = {
    "family": "llama2",
    "dim": 8,
    "n_layers": 1,
    "n_heads": 1,
    "ffn_dim": 8,
    "vocab_size": 8,
}


def stage_of(tmp_path: Path, steps: int, train: dict[str, Any]) -> TrainStage:
    sets = [
        f"budget.tokens={steps * 1024}",
        *(f"train.{key}={value}" for key, value in train.items()),
    ]
    return plan_of(tmp_path, SCRATCH, sets).train_stages[0]


def torchtitan_rates(stage: TrainStage) -> list[float]:
    """The rate of every step from torchtitan's scheduler, driven as its trainer does."""
    torch = pytest.importorskip("torch")
    lr_scheduler = pytest.importorskip("torchtitan.components.lr_scheduler")
    optimizer = torch.optim.AdamW(
        [torch.nn.Parameter(torch.zeros(1))], lr=stage.train.learning_rate
    )
    config = lr_scheduler.LRSchedulerConfig(
        warmup_steps=stage.warmup_steps,
        total_steps=stage.horizon_steps,
        decay_ratio=stage.train.decay_fraction
        if stage.train.schedule == "wsd"
        else None,
        decay_type="cosine" if stage.train.schedule == "cosine" else "linear",
        min_lr_factor=stage.train.min_learning_rate / stage.train.learning_rate,
    )
    schedulers = lr_scheduler.build_lr_schedulers([optimizer], config, stage.steps)
    rates = []
    for _ in range(stage.steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedulers.step()
    return rates


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 7, 60])
@pytest.mark.parametrize("horizon", ["stage", "61 steps", "300 steps"])
def test_learning_rates_are_torchtitans(
    tmp_path: Path, schedule: str, warmup: int, horizon: str
) -> None:
    train = {
        "schedule": schedule,
        "warmup": f"{warmup} steps",
        "horizon": horizon,
        "min_learning_rate": 1e-4,
    }
    stage = stage_of(tmp_path, 60, train)
    rates = [stage.learning_rate(step) for step in range(1, stage.steps + 1)]
    assert rates == pytest.approx(torchtitan_rates(stage), rel=1e-12, abs=0)
    assert all(1e-4 * (1 - 1e-12) <= rate <= 1e-3 for rate in rates[warmup:])
    assert max(rates) == 1e-3


@pytest.mark.parametrize("fraction", [1e-9, 0.01, 0.5, 0.95, 1.0])
def test_learning_rates_of_any_decay_fraction(tmp_path: Path, fraction: float) -> None:
    stage = stage_of(
        tmp_path,
        40,
        {"schedule": "wsd", "warmup": "5 steps", "decay_fraction": fraction},
    )
    rates = [stage.learning_rate(step) for step in range(1, 41)]
    assert rates == pytest.approx(torchtitan_rates(stage), rel=1e-12, abs=0)
    assert min(rates) > 0


def test_learning_rate_of_the_papers_schedule(tmp_path: Path) -> None:
    """1e-3 -> 1e-4 over 300k steps, of which 5000 are used: the rate has hardly left its peak."""
    train = {
        "warmup": "3000 steps",
        "horizon": "300000 steps",
        "min_learning_rate": 1e-4,
    }
    stage = stage_of(tmp_path, 5000, train)
    assert stage.learning_rate(3000) == 1e-3
    assert stage.learning_rate(5000) == pytest.approx(1e-3, rel=2e-4)
    assert stage.learning_rate(5000) < 1e-3


@pytest.mark.parametrize("step", [-1, 0, 98])
def test_there_is_no_rate_outside_of_the_stage(tmp_path: Path, step: int) -> None:
    stage = plan_of(tmp_path, SCRATCH).train_stages[0]
    with pytest.raises(ValueError, match="steps 1 to 97"):
        stage.learning_rate(step)


def test_micro_batch_divides_the_ranks_share(tmp_path: Path) -> None:
    stage = plan_of(tmp_path, RECIPE, ["train.micro_batch=6"]).train_stages[0]
    assert [stage.micro_batch(ranks) for ranks in (1, 2, 4, 16)] == [4, 4, 4, 1]


def test_plans_are_made_without_torch() -> None:
    """A plan must come at once, on a login node without torch."""
    code = (
        "import sys, time; start = time.process_time(); import stackgrow.plan.resolve, stackgrow.report.plan_table; "
        "took = time.process_time() - start; "
        "print([m for m in ('torch', 'numpy', 'torchtitan') if m in sys.modules], took < 1.0, took)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("[] True"), done.stdout


def test_plan_of_a_recipe_made_in_python(tmp_path: Path) -> None:
    """make_plan needs no file: the error then speaks of the recipe."""
    recipe = dataclasses.replace(
        recipe_of(tmp_path), train=Train(global_batch_tokens=1000, learning_rate=1e-3)
    )
    with pytest.raises(RecipeError, match=r"^recipe: 1 problem"):
        make_plan(recipe)
    assert isinstance(make_plan(recipe_of(tmp_path)), Plan)
    assert Model(**MODEL).n_kv_heads == 1


def test_every_kind_of_stage_answers_what_callers_ask(tmp_path: Path) -> None:
    """An imported base, which no operator makes; a base that trains; maps that are learned, and folded in."""
    growth = 'operator = "learn"\nfactor = 2\ntiming = "20K"\nlearn_steps = "10 steps"'
    text = edited(('operator = "stack"\nfactor = 2\ntiming = "20K"', growth))
    plan = plan_of(tmp_path, text, ["base.from=models/llama"])
    imported, base, maps, folded, middle = plan.stages[:5]
    asked = [
        (s.trains, s.learns_maps, s.folds_maps, s.imports, s.finds)
        for s in plan.stages[:5]
    ]
    assert asked == [
        (False, False, False, True, str),
        (True, False, False, False, int),
        (True, True, False, False, int),
        (False, False, True, False, None),
        (True, False, False, False, int),
    ]
    assert [s.output_model.n_layers for s in plan.stages[:5]] == [2, 2, 4, 4, 4]
    assert [s.output_step for s in plan.stages[:5]] == [
        None,
        base.steps,
        10,
        None,
        middle.steps,
    ]  # type: ignore[union-attr]
    inputs = [plan.inputs(stage) for stage in plan.stages[:5]]
    assert inputs == [
        (None, None),
        (imported, None),
        (base, None),
        (base, maps),
        (folded, None),
    ]
    assert set(maps.checkpoint_tensors()).isdisjoint(folded.checkpoint_tensors())
    assert plan.own_stages == list(plan.stages[1:])
    assert plan.growths == [folded, plan.stages[5]]
