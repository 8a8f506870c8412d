"""What a plan costs on a cluster: figures worked out by hand, and everything that does not fit said at once."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from recipes_for_tests import RECIPE, edited, plan_of

from stackgrow.cli.plan import main as plan_tool
from stackgrow.plan.cost import GPUS, Cluster, estimate, stage_disk
from stackgrow.plan.reliability import Machine, hang_gpu_hours, reliability
from stackgrow.plan.resolve import make_plan
from stackgrow.plan.saving import expected_saving
from stackgrow.plan.search import recomputed, search
from stackgrow.plan.stages import Plan
from stackgrow.recipe.load import load_recipe
from stackgrow.report.cost_table import (
    Assumed,
    cost_dict,
    duration,
    render_cost,
    render_cost_json,
)
from stackgrow.text import WIDTH

REPOSITORY = Path(__file__).parents[2]


def shipped(name: str, *sets: str) -> Plan:
    file = REPOSITORY / "recipes" / f"{name}.toml"
    return make_plan(load_recipe(file, sets), file)


def test_time_is_flops_over_peak_at_the_stated_mfu() -> None:
    plan = shipped("paper/7b_300b_scratch")
    cost = estimate(plan, Cluster(256, "h100", mfu=0.5))
    (stage,) = plan.train_stages
    # 6 N with N = 5.933B less the input embedding's 131M; attention 12 L D S = 12 x 32 x 4096 x 2048.
    assert stage.flops == pytest.approx(6 * 5.802e9 * stage.tokens, rel=1e-3)
    assert stage.paper_flops == pytest.approx(6 * 5.933e9 * stage.tokens, rel=1e-3), (
        "the insets of Figures 1 and 5"
    )
    assert stage.attention_flops == 12 * 32 * 4096 * 2048 * stage.tokens
    seconds = (stage.flops + stage.attention_flops) / (256 * 989e12 * 0.5)
    assert cost.hours == pytest.approx(seconds / 3600)
    assert estimate(plan, Cluster(512, "h100", mfu=0.25)).hours == pytest.approx(
        cost.hours
    )


def test_disk_while_a_checkpoint_replaces_another(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path, RECIPE, ["checkpoint.interval=5 steps", "checkpoint.keep=2"]
    )
    base, grow = plan.stages[:2]
    size = 12 * base.model.parameters()
    assert base.steps == 20  # 4 checkpoints, 2 of them kept
    assert stage_disk(plan, base) == (2 * size, 3 * size)
    assert stage_disk(plan, grow) == (0, 0)  # hard links
    noisy = plan_of(
        tmp_path, edited(('timing = "20K"', 'timing = "20K"\nnoise = 0.2'))
    ).stages[1]
    assert stage_disk(plan, noisy)[0] == 4 * noisy.target.parameters()
    carried = plan_of(
        tmp_path,
        edited(('timing = "20K"', 'timing = "20K"\nnoise = 0.2\noptimizer = "copy"')),
    ).stages[1]
    assert stage_disk(plan, carried)[0] == 12 * carried.target.parameters()
    first = plan_of(tmp_path, RECIPE, ["checkpoint.interval=50 steps"]).stages[0]
    assert stage_disk(
        plan_of(tmp_path, RECIPE, ["checkpoint.interval=50 steps"]), first
    ) == (size, size)
    assert estimate(plan, Cluster(1, "h100")).peak_disk == sum(
        stage_disk(plan, s)[0] for s in plan.stages
    ) + (12 * plan.train_stages[-1].model.parameters())


@pytest.mark.parametrize(
    ("recipe", "target", "tokens", "speed_up"),
    [
        ("paper/7b_300b_gstack", "7B", 300e9, 0.546),
        ("paper/3b_300b_gstack", "3B", 240e9, 0.545),
        ("paper/1.1b_100b_gstack", "1.1B", 100e9, 0.491),
        ("paper/410m_750b_gstack", "410M", 700e9, 0.310),
    ],
)
def test_saving_is_the_nearest_measured_one(
    recipe: str, target: str, tokens: float, speed_up: float
) -> None:
    plan = shipped(recipe)
    saving = expected_saving(plan)
    assert saving is not None
    assert (saving.target, saving.tokens, saving.speed_up) == (target, tokens, speed_up)
    assert saving.flops == speed_up * plan.flops
    assert expected_saving(shipped(recipe.replace("gstack", "scratch"))) is None


def test_what_was_not_measured_is_said() -> None:
    saving = expected_saving(shipped("7b_gstack"))
    assert saving is not None
    assert saving.caveats[0] == "2 growths, measured with one"
    assert saving.caveats[1].startswith("the scratch run would have 1.1")
    width = expected_saving(shipped("operators/1.1b_direct_width"))
    assert width is not None
    assert width.caveats[0] == "another operator than G_stack"


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    alone = estimate(shipped("7b_gstack"), Cluster(1, "a100"))
    assert [p.split(":")[0] for p in alone.problems] == ["stage-4-train-32L"]
    assert "GB on one a100 of 80 GB" in alone.problems[0]
    uneven = estimate(shipped("7b_gstack"), Cluster(96, "h100"))
    assert all(
        "cannot be shared equally by 96 data ranks" in p for p in uneven.problems
    )
    assert uneven.stages == ()
    assert "what does not fit:" in render_cost(uneven)
    assert "everything fits" in render_cost(
        estimate(shipped("7b_gstack"), Cluster(256, "h100"))
    )


def test_search_prefers_what_recomputes_and_sends_least() -> None:
    large = shipped("7b_gstack").train_stages[-1]
    roomy, tight = (search(large, Cluster(n, "h100"))[0] for n in (256, 8))
    assert roomy.activation_checkpoint == "none"
    assert roomy.layout.tensor == 1
    assert tight.memory.total <= GPUS["h100"].memory
    assert tight.slowdown >= roomy.slowdown
    assert search(large, Cluster(1, "a100")) == []
    fast = search(large, Cluster(256, "h100"), network=1e15)[0]
    slow = search(large, Cluster(256, "h100"), network=1e9)[0]
    chunked = shipped("7b_gstack", "train.loss_chunk=1024").train_stages[-1]
    assert {
        c.layout.tensor for c in search(chunked, Cluster(256, "h100"), best=99)
    } == {1}
    assert {c.layout.tensor for c in search(large, Cluster(256, "h100"), best=99)} == {
        1,
        2,
        4,
        8,
    }
    assert slow.slowdown > fast.slowdown


def test_recomputed_products_are_counted_as_by_hand() -> None:
    stage = shipped("7b_gstack").train_stages[-1]
    assert stage.train.activation_checkpoint == "selective"
    D, F, L, V = 4096, 11008, 32, 32000
    products = 3 * (L * (4 * D * D + 3 * D * F) + V * D)  # forward once, backward twice
    assert recomputed(stage) == pytest.approx(
        L * (2 * D * D + D * F) / products, rel=1e-3
    )  # wk, wo, w3


def test_data_epochs_and_text_and_json() -> None:
    plan = shipped("7b_gstack")
    cost = estimate(plan, Cluster(256, "h100"), data_tokens=627_000_000_000)
    choices = {s.name: search(s, cost.cluster) for s in plan.train_stages}
    text = render_cost(cost, choices)
    assert "data: 1.20 epochs of data/slimpajama" in text
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "assumed MFU 40% of 989 TFLOP/s" in text
    plain = json.loads(render_cost_json(cost, choices))
    assert plain == json.loads(json.dumps(cost_dict(cost, choices)))
    assert [s["parameters"] for s in plain["stages"]] == [
        s.model.parameters() for s in plan.train_stages
    ]
    last = plain["stages"][-1]["memory"]
    rows = (
        2 * 125 * 4096 + 16 + 32 * (4 * 16 * 4096 + 2 * 43 * 4096 + 16 * 11008 + 2 * 16)
    )  # of 256 ranks' first
    assert (last["parameters"], last["gradients"]) == (4 * rows, 4 * rows)
    assert last["optimizer"] == 8 * rows + 4 * (3 + 32 * 9)
    assert plain["search"]["stage-4-train-32L"][0]["slowdown"] >= 1
    assert "--data-tokens" in render_cost(estimate(plan, cost.cluster))


def test_tool_is_quick_and_loads_no_torch() -> None:
    code = "import sys; sys.argv = ['plan_recipe.py', *sys.argv[1:]]; import runpy; "
    code += "runpy.run_path('tools/plan_recipe.py', run_name='tool')['main'](); assert 'torch' not in sys.modules"
    arguments = ["recipes/7b_gstack.toml", "--gpus", "256", "--gpu", "h100", "--search"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "everything fits" in done.stdout


def test_picture_shows_every_stage(tmp_path: Path) -> None:
    from stackgrow.report.plan_picture import draw_plan

    draw_plan(plan_of(tmp_path, RECIPE), tmp_path / "plan.svg")
    picture = (tmp_path / "plan.svg").read_text()
    for text in (
        "stage-0-train-2L: 103K parameters, 20.5K tokens",
        "stage-4-train-8L",
        "learning rate",
    ):
        assert text in picture


def test_checkpoints_failures_and_hangs_by_hand() -> None:
    """32 layers of Llama-2-7B: 80.9 GB at 10 GB/s; a failure in 50,000 GPU-hours on 256 GPUs is one in 703,125 s."""
    cost = estimate(shipped("7b_gstack"), Cluster(256, "h100"))
    machine = Machine(bandwidth=10e9, startup=300, gpu_hours_per_failure=50_000)
    last = reliability(cost.stages[-1], cost.plan.recipe, cost.cluster, machine)
    assert last.write == pytest.approx(8.09, rel=1e-3)
    assert last.restart == pytest.approx(308.09, rel=1e-4)
    assert last.step == pytest.approx(22_137 * 3600 / 256 / 350_705, rel=1e-3)
    assert last.interval == pytest.approx(1000 * last.step)
    assert last.best_interval == pytest.approx((2 * 8.0858 * 703_125) ** 0.5, rel=1e-3)
    assert last.best_steps == round(last.best_interval / last.step)
    assert last.failures == pytest.approx(22_137 / 50_000, rel=1e-3)
    lost = last.write / last.interval + (last.interval / 2 + last.restart) / 703_125
    assert last.added == pytest.approx(lost)
    assert hang_gpu_hours(cost.plan.recipe, cost.cluster) == 1800 * 256 / 3600

    def added(interval: float) -> float:
        return last.write / interval + interval / 2 / 703_125

    best = last.best_interval
    assert added(best) < min(added(0.9 * best), added(1.1 * best)), "it is the minimum"


def test_a_price_per_gpu_hour_is_added_up() -> None:
    cost = estimate(shipped("7b_gstack"), Cluster(256, "h100"))
    text = render_cost(cost, assumed=Assumed(price=2.0, currency="EUR"))
    assert "128.0 GPU-hours = 256 EUR each" in text
    hours = cost.hours * 256
    assert f"{hours:,.0f} GPU-hours at 2 EUR = {2 * hours:,.0f} EUR" in text
    assert "money" not in render_cost(cost)


def test_disk_adds_up(tmp_path: Path) -> None:
    text = edited(
        (
            'operator = "stack"\nfactor = 2\ntiming = "20K"',
            'operator = "zero"\nfactor = 2\ntiming = "20K"',
        )
    )
    cost = estimate(
        plan_of(tmp_path, text, ["checkpoint.interval=5 steps"]), Cluster(1, "h100")
    )
    kept = [stage_disk(cost.plan, stage)[0] for stage in cost.plan.stages]
    assert kept[1] > 0, "a grow stage that is no hard links"
    assert cost.disk == sum(kept) < cost.peak_disk


def test_short_times_are_not_zero_days() -> None:
    assert [duration(hours) for hours in (72, 47.5, 0.5, 0.001)] == [
        "3.00 days",
        "47.5 hours",
        "30.0 minutes",
        "3.6 seconds",
    ]
    quick = render_cost(estimate(shipped("quickstart"), Cluster(1, "h100")))
    assert "seconds" in quick.splitlines()[1]


def test_search_ranks_the_recipe_s_own_layout() -> None:
    large = shipped("7b_gstack").train_stages[-1]
    ranked = search(large, Cluster(256, "h100"))
    assert [choice.place for choice in ranked[:3]] == [1, 2, 3]
    (own,) = (choice for choice in ranked if choice.own)
    assert own.place > 3
    assert (own.layout.shard, own.micro_batch, own.activation_checkpoint) == (
        256,
        4,
        "selective",
    )
    best = ranked[0].layout
    sets = [f"parallel.replicate={best.replicate}", f"parallel.shard={best.shard}"]
    sets += [
        "train.activation_checkpoint=none",
        f"train.micro_batch={ranked[0].micro_batch}",
    ]
    chosen = search(shipped("7b_gstack", *sets).train_stages[-1], Cluster(256, "h100"))
    assert [choice.own for choice in chosen] == [True, False, False], (
        "it is counted once"
    )


def test_the_best_of_a_search_is_told_as_the_command_line_of_the_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = str(REPOSITORY / "recipes" / "7b_gstack.toml")
    arguments = ["--gpus", "256", "--gpu", "h100", "--search"]
    assert plan_tool([recipe, *arguments]) == 0
    told = []
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("  --set "):
            told += shlex.split(line.removesuffix(" \\"))
    assert told.count("--set") == 15  # five for each of three stages
    assert plan_tool([recipe, *arguments, "--json", *told]) == 0
    for choices in json.loads(capsys.readouterr().out)["search"].values():
        assert [choice["own"] for choice in choices] == [True, False, False]


def test_exit_code_tells_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(REPOSITORY / "recipes" / "7b_gstack.toml")
    assert plan_tool([recipe, "--gpus", "256", "--gpu", "h100"]) == 0
    assert plan_tool([recipe, "--gpus", "1", "--gpu", "a100"]) == 2
    assert "GB on one a100" in capsys.readouterr().out
    assert plan_tool([recipe, "--gpus", "1", "--gpu", "a100", "--search"]) == 2
