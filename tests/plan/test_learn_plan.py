"""A growth by G_learn in a plan: its three stages, what they cost, and recipes that contradict it."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from recipes_for_tests import RECIPE, edited, plan_of, problems_of

from stackgrow.growth.learned_shapes import mapping_flops, parameters
from stackgrow.plan.stages import GrowStage, LearnStage

FIRST = '[[growth]]\noperator = "stack"\nfactor = 2\ntiming = "20K"\n'
LEARN = edited(
    (
        FIRST,
        FIRST.replace("stack", "learn")
        + 'learn_steps = "10 steps"\n[growth.learn]\nwarmup = "2 steps"\n',
    )
)


def test_maps_are_learned_in_a_stage_of_their_own(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, LEARN)
    names = [
        "stage-0-train-2L",
        "stage-1-learn-4L",
        "stage-2-grow",
        "stage-3-train-4L",
        "stage-4-grow",
        "stage-5-train-8L",
    ]
    assert [s.name for s in plan.stages] == names
    base, learn, grow, middle = plan.stages[:4]
    assert isinstance(learn, LearnStage)
    assert isinstance(grow, GrowStage)
    assert (
        (learn.source, learn.model)
        == (grow.source, grow.target)
        == (base.model, middle.model)
    )
    assert grow.layer_map is None
    assert [s.steps for s in plan.train_stages] == [20, 10, 10, 57], (
        "growths keep their timing: 20K, and step 40"
    )
    assert (learn.warmup_steps, middle.warmup_steps) == (2, 4)
    assert learn.start_tokens == base.tokens
    assert middle.start_sequences == base.steps * 16 + learn.steps * 16
    assert middle.start_flops == pytest.approx(base.flops + learn.flops)
    assert learn.seed not in {
        stage.seed for stage in plan.stages if isinstance(stage, GrowStage)
    }


def test_learning_costs_the_mixing_of_layers_too(tmp_path: Path) -> None:
    """Depth alone: 6 N D, and 2 L l P for mixing each step, twice: forward, and the gradient of D."""
    _, learn, _, middle = plan_of(tmp_path, LEARN).stages[:4]
    layer = 4 * 64 * 64 + 3 * 64 * 96 + 2 * 64
    assert (learn.flops_per_token - middle.flops_per_token) * 1024 == pytest.approx(
        2 * 2 * 4 * 2 * layer
    )
    assert learn.checkpoint_bytes == 12 * 9 * 4 * 2
    wide = replace(learn.source, dim=128, n_heads=8, n_kv_heads=8, ffn_dim=192)
    assert parameters(learn.source, wide) == 4 * 128 * 64 + 192 * 96
    square, up, down = ((64, 64, 128, 128), (96, 64, 192, 128), (64, 96, 128, 192))
    maps = [
        2 * 2 * r * c * C + 3 * 2 * R * r * C
        for r, c, R, C in (*[square] * 4, up, up, down)
    ]
    ends = 2 * (2 * 2 * 256 * 64 * 128) + (2 * 2 + 1) * (
        2 * 2 * 128 * 64
    )  # embedding and head; the five norms
    assert mapping_flops(learn.source, wide) == 2 * sum(maps) + ends


def test_hash_depends_on_the_learning(tmp_path: Path) -> None:
    first = plan_of(tmp_path, LEARN).stage_hashes("data")
    for changed in (
        ("10 steps", "9 steps"),
        ('warmup = "2 steps"', 'warmup = "3 steps"'),
    ):
        other = plan_of(tmp_path, edited(changed, text=LEARN)).stage_hashes("data")
        assert [name for name in first if first[name] == other[name]] == [
            "stage-0-train-2L"
        ]
    free = plan_of(
        tmp_path,
        edited(
            ('warmup = "2 steps"', 'warmup = "2 steps"\nmicro_batch = 1'), text=LEARN
        ),
    )
    assert free.stage_hashes("data") == first


@pytest.mark.parametrize(
    ("changes", "where", "part"),
    [
        ([('learn_steps = "10 steps"\n', "")], "growth[0].learn_steps", 'is missing; "learn" needs it'),
        ([('timing = "20K"', 'timing = "20K"\norder = "interleave"')], "growth[0].order", "learns how layers mix"),
        ([('operator = "learn"\nfactor = 2', 'operator = "learn"\nlayer_map = [0, 1, 0, 1]')], "growth[0].layer_map", "remove it"),
        ([('operator = "learn"', 'operator = "zero"')], "growth[0].learn", 'has no meaning for "zero"'),
        ([('operator = "learn"', 'operator = "zero"')], "growth[0].learn_steps", 'has no meaning for "zero"'),
        ([('learn_steps = "10 steps"', 'learn_steps = "20 steps"')], "growth[1].timing", "after the previous growth"),
        ([('learn_steps = "10 steps"', 'learn_steps = "1M"')], "growth[1].timing", "after the previous growth"),
        ([('learn_steps = "10 steps"', 'learn_steps = "1 steps"')], "growth[0].learn.warmup", "shorten it"),
        ([('warmup = "4 steps"', 'warmup = "4 steps"\ncompile = true')], "train.compile", "set growth[0].learn.compile = false"),
        ([('warmup = "2 steps"', 'warmup = "2 steps"\nactivation_checkpoint = "full"')], "growth[0].learn.activation_checkpoint", '= "none"'),
        ([('warmup = "4 steps"', 'warmup = "4 steps"\ncpu_offload = true')], "train.cpu_offload", "is not supported"),
        ([('warmup = "4 steps"', 'warmup = "4 steps"\n[parallel]\ntensor = 2')], "parallel.tensor", "use parallel.shard"),
        ([('timing = "20K"', 'timing = "20K"\nmodel = { dim = 32, n_heads = 2 }')], "growth[0]", "dim 64 -> 32 must not shrink"),
        ([('timing = "20K"', 'timing = "20K"\nmodel = { dim = 72 }')], "growth[0]", "head width 16 -> 18 is no whole factor"),
    ],
)  # fmt: skip
def test_keys_that_learning_cannot_have_are_refused(
    tmp_path: Path, changes: list[tuple[str, str]], where: str, part: str
) -> None:
    problems = problems_of(tmp_path, edited(*changes, text=LEARN))
    assert part in problems[where], problems


def test_learning_counts_its_own_batches(tmp_path: Path) -> None:
    """As all durations do: 5 steps of 64 tokens, then of 1024."""
    text = edited(
        ('"10 steps"', '"10Ki"'),
        (
            'warmup = "2 steps"\n',
            'batch_warmup = ["64 for 5 steps"]\nwarmup = "2 steps"\n',
        ),
        text=LEARN,
    )
    learn = plan_of(tmp_path, text).stages[1]
    assert isinstance(learn, LearnStage)
    assert (learn.steps, learn.tokens) == (15, 5 * 64 + 10 * 1024)


def test_compile_can_be_left_to_the_other_stages(tmp_path: Path) -> None:
    text = edited(
        ('warmup = "4 steps"', 'warmup = "4 steps"\ncompile = true'),
        ('warmup = "2 steps"', "compile = false"),
        text=LEARN,
    )
    assert [s.train.compile for s in plan_of(tmp_path, text).train_stages] == [
        True,
        False,
        True,
        True,
    ]


def test_learning_where_nothing_grows_is_refused(tmp_path: Path) -> None:
    last = RECIPE[RECIPE.rindex("[[growth]]") : RECIPE.index("[train]")]
    changes = [
        ("factor = 2\n", ""),
        ("n_layers = 2\n", "n_layers = 8\n"),
        ('"stack"', '"learn"\nlearn_steps = "5 steps"'),
    ]
    assert (
        "nothing grows"
        in problems_of(tmp_path, edited(*changes, text=RECIPE.replace(last, "")))[
            "growth[0]"
        ]
    )


def test_planning_loads_no_torch(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(LEARN)
    code = (
        "import sys; from stackgrow.recipe.load import load_recipe; from stackgrow.plan.resolve import make_plan;"
        "make_plan(load_recipe('mine.toml')).flops; sys.exit('torch' in sys.modules)"
    )
    root = str(Path(__file__).parents[2])
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": root}, check=True
    )


def test_maps_are_trained_with_their_authors_settings_unless_the_recipe_says_otherwise(
    tmp_path: Path,
) -> None:
    """Rate 7e-5 to 7e-6, half of the steps warm-up, weight decay 0.1 (tongxuluo/prts, issue 2); not the stage's own."""
    plain = edited(("[growth.learn]\n", ""), ('warmup = "2 steps"\n', ""), text=LEARN)
    stage = plan_of(tmp_path, plain).stages[1]
    assert isinstance(stage, LearnStage)
    train = stage.train
    assert (train.learning_rate, train.min_learning_rate, train.weight_decay) == (
        7e-5,
        7e-6,
        0.1,
    )
    assert (stage.steps, stage.warmup_steps, stage.horizon_steps) == (10, 5, 10)
    assert stage.learning_rate(5) == 7e-5
    told = edited(
        ('warmup = "2 steps"', 'warmup = "2 steps"\nlearning_rate = 0.01'), text=LEARN
    )
    other = plan_of(tmp_path, told).stages[1]
    assert isinstance(other, LearnStage)
    assert (
        other.train.learning_rate,
        other.warmup_steps,
        other.train.min_learning_rate,
    ) == (0.01, 2, 7e-6)


def test_official_maps_cost_and_count_more_and_change_the_hash(tmp_path: Path) -> None:
    paper = plan_of(tmp_path, LEARN)
    chosen = ('learn_steps = "10 steps"', 'learn_steps = "10 steps"\nmaps = "official"')
    official = plan_of(tmp_path, edited(chosen, text=LEARN))
    assert official.stages[1].flops > paper.stages[1].flops
    assert official.stages[1].checkpoint_bytes > paper.stages[1].checkpoint_bytes
    hashes = [plan.stage_hashes("data") for plan in (paper, official)]
    same = [name for name in hashes[0] if hashes[0][name] == hashes[1][name]]
    assert same == ["stage-0-train-2L"]
    assert "maps" not in paper.stages[2].identity(), "as before there was a choice"
