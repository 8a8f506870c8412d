"""Every shipped recipe is found, opens with what a reader needs, and plans what the paper and shared facts state."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from recipes_for_tests import RECIPE_FILES as FILES

from stackgrow.growth.depth import kept_connections
from stackgrow.plan import guidelines
from stackgrow.plan.cost import Cluster, estimate
from stackgrow.plan.resolve import make_plan
from stackgrow.plan.stages import GrowStage, LearnStage, Plan, TrainStage
from stackgrow.recipe.load import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
BATCH = 2**21  # tokens: 1024 sequences of 2048


def plan(name: str) -> Plan:
    return make_plan(load_recipe(RECIPES / name), name)


def maps(made: Plan) -> list[tuple[int, ...] | None]:
    return [stage.layer_map for stage in made.stages if isinstance(stage, GrowStage)]


def test_all_recipes_are_found() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "*.toml"],
        cwd=RECIPES,
        capture_output=True,
        text=True,
        check=True,
    )
    shipped = {name for name in listed.stdout.split() if "/results/" not in name}
    assert {str(f.relative_to(RECIPES)) for f in FILES} >= shipped
    assert len(FILES) >= 33
    assert len({f.stem for f in FILES}) == len(FILES), (
        "two recipes would share a run folder"
    )


@pytest.mark.parametrize(
    "file", FILES, ids=[str(f.relative_to(RECIPES)) for f in FILES]
)
def test_a_shipped_recipe_plans_and_says_what_a_reader_needs(file: Path) -> None:
    recipe = load_recipe(file)
    made = make_plan(recipe, str(file))
    assert made.train_stages[-1].model == recipe.model
    assert 0 <= recipe.budget.tokens - made.tokens < recipe.train.global_batch_tokens
    assert recipe.name == file.stem
    head, _, keys = file.read_text(encoding="utf-8").partition("\nname = ")
    for word in (
        "torchrun",
        f"recipes/{file.relative_to(RECIPES)}",
        "needs ",
        "edit ",
        "status ",
        "OURS",
    ):
        assert word in head, f"the opening comment lacks {word!r}"
    schema = head.splitlines()[0].removeprefix("#:schema ")
    assert (
        file.parent / schema
    ).resolve() == RECIPES.parent / "stackgrow" / "recipe.schema.json"
    assert max(map(len, [*head.splitlines(), *keys.splitlines()])) <= 120
    assert f"({file.relative_to(RECIPES)})" in (RECIPES / "README.md").read_text(
        encoding="utf-8"
    ), "recipes/README.md lists it"


# Table 1 of arXiv 2405.15319 and the official code (shared/paper_facts.md): parameters in millions, all and without
# embeddings; layers, width, heads, key/value heads, FFN width; learning rates; steps of 2Mi tokens.
PAPER = {
    "410m_750b": (
        (374, 308),
        (24, 1024, 16, 16, 2816),
        (6e-4, 6e-5),
        (4768, 357628),
        357627,
    ),
    "1.1b_100b": (
        (1364, 1233),
        (24, 2048, 32, 32, 5632),
        (3e-4, 3e-5),
        (4768, 46491),
        47683,
    ),
    "3b_300b": (
        (2397, 2234),
        (32, 2560, 20, 4, 7040),
        (1.6e-4, 1.6e-5),
        (4768, 143051),
        143051,
    ),
    "7b_300b": (
        (5933, 5671),
        (32, 4096, 32, 8, 11008),
        (1e-4, 1e-5),
        (4768, 143051),
        143051,
    ),
}
BASES = {
    "410m_750b": (6, 143),
    "1.1b_100b": (6, 439),
    "3b_300b": (8, 722),
    "7b_300b": (8, 1680),
}


def millions(stage: TrainStage) -> tuple[int, int]:
    return round(stage.model.parameters() / 1e6), round(
        stage.model.non_embedding_parameters() / 1e6
    )


def assert_trained_as_in_the_paper(stage: TrainStage) -> None:
    t = stage.train
    assert (t.global_batch_tokens, stage.seq_len, stage.batch_sequences) == (
        BATCH,
        2048,
        1024,
    )
    assert (t.schedule, stage.warmup_steps, t.beta1, t.beta2) == (
        "cosine",
        3000,
        0.9,
        0.95,
    )
    assert (
        t.weight_decay,
        t.max_grad_norm,
        stage.model.norm_eps,
        stage.model.rope_theta,
    ) == (0.1, 1, 1e-5, 1e4)
    assert (stage.model.vocab_size, stage.model.init) == (32000, "paper")
    assert t.min_learning_rate == pytest.approx(t.learning_rate / 10)


@pytest.mark.parametrize("size", PAPER)
def test_runs_of_the_paper(size: str) -> None:
    sizes, shape, rates, grown_steps, scratch_steps = PAPER[size]
    horizon = 400_000 if size == "410m_750b" else 300_000
    grown, scratch = (
        plan(f"paper/{size}_gstack.toml"),
        plan(f"paper/{size}_scratch.toml"),
    )
    for made, steps in ((grown, grown_steps), (scratch, (scratch_steps,))):
        last, m = made.train_stages[-1], made.recipe.model
        assert millions(last) == sizes
        assert (m.n_layers, m.dim, m.n_heads, m.n_kv_heads, m.ffn_dim) == shape
        assert (last.train.learning_rate, last.train.min_learning_rate) == rates
        assert tuple(stage.steps for stage in made.train_stages) == steps
        for stage in made.train_stages:
            assert_trained_as_in_the_paper(stage)
            assert stage.horizon_steps == horizon > stage.steps
        assert last.learning_rate(last.steps) > 1.1 * rates[1], (
            "the cosine is not completed"
        )
        assert made.recipe.seed == 3407
    assert (grown.recipe.train, grown.recipe.model) == (
        scratch.recipe.train,
        scratch.recipe.model,
    )
    base, (layers, total) = grown.train_stages[0], BASES[size]
    assert (base.model.n_layers, millions(base)[0]) == (layers, total)
    assert maps(grown) == [tuple(range(layers)) * 4]


def test_gpu_hours_and_disk_in_a_recipe_are_those_of_the_planner() -> None:
    """One number, by one count, wherever it is said."""
    counted = 0
    for file in FILES:
        head = file.read_text(encoding="utf-8").partition("\nname = ")[0]
        text = " ".join(line.strip("# ") for line in head.splitlines())
        stated = re.search(
            r"([0-9.e]+) FLOPs \(6 N D, N without .* (\S+) H100 hours, .* on (\d+): .* (\d+) GB of",
            text,
        )
        if stated:
            cluster = Cluster(int(stated[3]), "h100")
            cost = estimate(make_plan(load_recipe(file), file), cluster)
            assert float(stated[1]) == pytest.approx(cost.plan.flops, rel=5e-3), file
            assert stated[2] == f"{cost.hours * cluster.gpus:,.0f}", file
            assert int(stated[4]) == math.ceil(cost.peak_disk / 1e9), file
            counted += 1
        else:
            assert "H100 hours" not in text, file
    assert counted >= 37


def test_the_papers_runs_are_evaluated_along_the_way() -> None:
    """Figures 3b to 6b and 12 to 42: the paper's tasks every 10B tokens; the 7B's ten. What is evaluated is no part of
    what is trained."""
    evaluated = [f for f in FILES if load_recipe(f).eval]
    of_the_paper = [f for f in FILES if f.parent.name in ("paper", "sweeps")]
    of_the_paper += [f for f in FILES if f.name.startswith("1.1b_")]
    assert set(evaluated) == set(of_the_paper)
    for file in evaluated:
        wanted = load_recipe(file).eval
        assert wanted is not None
        is_7b = file.name.startswith("7b")
        assert wanted.tasks == (("paper_7b",) if is_7b else ("paper",)), file
        assert str(wanted.interval) == "10000000000 tokens"
        without = load_recipe(file, ["eval.tasks=[]"])
        assert without.eval is None
        hashes = make_plan(load_recipe(file), file).stage_hashes("")
        assert make_plan(without, file).stage_hashes("") == hashes


def numbers(words: str) -> set[int]:
    """``Figure 8, 23 to 25``, ``Figure 11a, 11c`` or ``Table 7``: the numbers, without the letters of parts."""
    found: set[int] = set()
    for first, last in re.findall(r"(\d+)[a-d]?(?: to (\d+))?", words):
        found.update(range(int(first), int(last or first) + 1))
    return found


def recipes_of(cell: str) -> list[Path]:
    """``paper/7b_{gstack,scratch}, 7b_*``: the files that are meant; a folder holds for what follows it in a cell."""
    found: list[Path] = []
    folder = ""
    for name in cell.replace("\\*", "*").split(", "):
        folder, _, stem = name.rpartition("/") if "/" in name else (folder, "", name)
        pattern = re.escape(stem).replace(r"\*", ".*").replace(r"\{", "(")
        pattern = pattern.replace(r"\}", ")").replace(",", "|")
        of_name = [
            f
            for f in FILES
            if f.parent.name == folder and re.fullmatch(pattern, f.stem)
        ]
        assert of_name, f"no recipe is {name}"
        found += of_name
    return found


def test_every_figure_and_table_of_the_paper_has_a_row_whose_recipes_exist() -> None:
    """44 figures and 7 tables; where a row says "eval", its recipes have [eval]."""
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Every figure and table of the paper")[2]
    rows = []
    for line in section.splitlines():
        if line.startswith(("| Figure", "| Table")):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    figures: set[int] = set()
    tables: set[int] = set()
    for words, _, cell, command in rows:
        of_figures, _, of_tables = words.partition("Table")
        figures |= numbers(of_figures.partition("eqs")[0])
        tables |= numbers(of_tables)
        files = recipes_of(cell) if cell else []
        evaluated = [file for file in files if load_recipe(file).eval]
        if re.search(r"\beval\b", command.replace("eval.tasks", "")):
            assert evaluated == files, words
    assert figures == set(range(1, 45))
    assert tables == set(range(1, 8))


def test_base_of_the_paper_has_the_official_rate() -> None:
    base = plan("paper/1.1b_100b_gstack.toml").train_stages[0]
    assert (base.train.learning_rate, base.train.min_learning_rate) == (1e-3, 1e-4)


def test_the_promised_run_has_the_sizes_and_maps_that_are_promised() -> None:
    made = plan("7b_gstack.toml")
    base, middle, last = made.train_stages
    assert [s.model.n_layers for s in made.train_stages] == [2, 8, 32]
    assert [millions(s) for s in made.train_stages] == [
        (667, 405),
        (1881, 1619),
        (6738, 6476),
    ]
    assert maps(made) == [(0, 1) * 4, tuple(range(8)) * 4]
    assert made.tokens == 357_627 * BATCH
    assert made.recipe.budget.tokens - made.tokens < BATCH
    for stage, before in ((middle, base.tokens), (last, base.tokens + middle.tokens)):
        n = stage.model.non_embedding_parameters()
        d = guidelines.growth_timing(n, guidelines.training_flops(n, 750e9))
        assert stage.start_tokens == before
        assert abs(before - d) <= BATCH / 2
    assert [stage.start_tokens / 1e9 for stage in (middle, last)] == pytest.approx(
        [6.795, 14.516], abs=0.002
    )
    assert_trained_as_in_the_paper(last)
    paper_share = 3000 / 4768  # of the warm-up in the paper's base, of 10B tokens
    assert [
        stage.warmup_steps / stage.steps for stage in (base, middle)
    ] == pytest.approx([paper_share] * 2, rel=2e-3)
    assert last.learning_rate(3001) == pytest.approx(1e-4)
    assert last.learning_rate(last.steps) == pytest.approx(1e-5, rel=1e-3), (
        "the cosine ends with the run"
    )


def test_a_long_warm_up_is_told() -> None:
    """The paper's base of 10B tokens has one; the run from scratch has not."""
    notes = plan("paper/1.1b_100b_gstack.toml").notes
    told = "stage-0-train-6L: its warm-up takes 3,000 of its 4,768 steps, 63%, more than a fifth"
    assert [note for note in notes if note.startswith(told)]
    scratch = plan("paper/1.1b_100b_scratch.toml").notes
    assert not [note for note in scratch if "warm-up takes" in note]


def test_the_promised_run_is_planned_in_two_seconds() -> None:
    command = [
        sys.executable,
        RECIPES.parent / "tools" / "run_recipe.py",
        RECIPES / "7b_gstack.toml",
        "--plan",
    ]
    before = os.times()
    subprocess.run(command, cwd=RECIPES.parent, check=True, capture_output=True)
    after = os.times()  # not the clock: the machine may be busy
    assert (
        after.children_user
        + after.children_system
        - before.children_user
        - before.children_system
        < 2
    )


OPERATORS = {
    "direct_depth": "stack", "zero_depth": "zero", "random_depth": "random", "learn_depth": "learn",
    "direct_width": "split", "zero_width": "zero", "random_width": "random", "learn_width": "learn",
}  # fmt: skip
WIDER_BASES = [
    f"1.1b_50b_{name}" for name in OPERATORS
]  # of 50B tokens: Figures 11b, 11d, 13, 15, 16b, 16d
EIGHT_LAYERS = [
    "1.1b_8l_stack",
    "1.1b_8l_interleave",
    "1.1b_8l_noise",
]  # Figures 35, 36, 41, 42
PARTIAL = {  # Table 5: the share of retained connections, in percent
    "123456x4": 87.0, "12-3456x5-56": 78.3, "12-345x7-6": 74.0, "123-456x7": 74.0,
    "1234-56x10": 60.7, "12-34x10-56": 60.7, "1-234x7-56": 74.0, "123x7-456": 74.0,
}  # fmt: skip
PARTIAL_RECIPES = {f"small_partial_{method}": method for method in PARTIAL}
PARTIAL_RECIPES |= {
    f"1.1b_partial_{method}": method for method in PARTIAL if method != "123456x4"
}
PARTIAL_RECIPES["1.1b_direct_depth"] = "123456x4"
ABLATIONS = ("gradual", "interleave", "noise", "last_layers", "mslt")
GROUPS = {
    "quickstart_scratch.toml": ["quickstart.toml"],
    "operators/1.1b_scratch.toml": [
        f"operators/{name}.toml"
        for name in (
            *(f"1.1b_{name}" for name in (*OPERATORS, "gradual", "direct_width_noise")),
            *WIDER_BASES,
            *EIGHT_LAYERS,
            *(name for name in PARTIAL_RECIPES if "1.1b_partial" in name),
        )
    ],
    "operators/small_scratch.toml": [
        f"operators/small_{name}.toml" for name in (*OPERATORS, *ABLATIONS)
    ],
    "operators/small_24l_scratch.toml": [
        f"operators/small_partial_{name}.toml" for name in PARTIAL
    ],
}


@pytest.mark.parametrize("baseline", GROUPS)
def test_equal_flops_and_all_else_equal(baseline: str) -> None:
    scratch = plan(baseline)
    step = scratch.flops / scratch.train_stages[0].steps
    for name in GROUPS[baseline]:
        grown = plan(name)
        assert abs(grown.flops - scratch.flops) < step, name
        for key in ("seed", "model", "data", "train", "validation"):
            assert getattr(grown.recipe, key) == getattr(scratch.recipe, key), (
                f"{name}: {key}"
            )


def test_every_operator_recipe_is_in_a_group() -> None:
    grouped = {
        RECIPES / name
        for baseline, members in GROUPS.items()
        for name in (baseline, *members)
    }
    assert {f for f in FILES if f.parent.name == "operators"} <= grouped


@pytest.mark.parametrize("setting", ["1.1b", "small"])
def test_operator_recipes_grow_as_they_are_named(setting: str) -> None:
    layers, base_steps = (6, 4768) if setting == "1.1b" else (2, 195)
    for name, operator in OPERATORS.items():
        made = plan(f"operators/{setting}_{name}.toml")
        (grow,) = (stage for stage in made.stages if isinstance(stage, GrowStage))
        assert (grow.operator, grow.noise) == (operator, 0)
        assert made.train_stages[0].steps == base_steps
        deep = name.endswith("depth")
        in_place = tuple(i // 4 for i in range(4 * layers))
        stacked = in_place if operator == "zero" else tuple(range(layers)) * 4
        assert grow.layer_map == (stacked if deep and operator != "learn" else None), (
            "zero: as the official code"
        )
        assert grow.target.n_layers == grow.source.n_layers * (4 if deep else 1)
        assert (grow.source.dim * (1 if deep else 2), grow.source.head_dim) == (
            grow.target.dim,
            grow.target.head_dim,
        )


def test_new_layers_of_zero_are_in_place_in_every_recipe() -> None:
    """As the official code and LEMON have them; but for what was measured before that was known."""
    stacked = set()
    for file in FILES:
        for growth in load_recipe(file).growth:
            if growth.operator == "zero" and growth.factor and growth.order == "stack":
                stacked.add(file.stem)
    assert stacked == {"ratio_8x64_zero"}


def test_operators_have_the_settings_of_the_official_code() -> None:
    """tongxuluo/prts: the mask of G_random rises in 5000 steps, a split copies norms; LiGO's author's rates (issue 2)."""
    for name in (
        "1.1b_random_depth",
        "1.1b_random_width",
        "1.1b_50b_random_depth",
        "1.1b_50b_random_width",
    ):
        masked = plan(f"operators/{name}.toml").train_stages[-1]
        assert [masked.mask_value(step) for step in (2500, 5000)] == [0.5, 1.0]
    for name in (
        "1.1b_direct_width",
        "1.1b_direct_width_noise",
        "1.1b_50b_direct_width",
        "small_direct_width",
    ):
        (grow,) = plan(f"operators/{name}.toml").growths
        assert (grow.operator, grow.norm) == ("split", "copied")
    for name in (
        "1.1b_learn_depth",
        "1.1b_learn_width",
        "1.1b_50b_learn_depth",
        "1.1b_50b_learn_width",
        "small_learn_depth",
        "small_learn_width",
    ):
        made = plan(f"operators/{name}.toml")
        (learn,) = (
            stage for stage in made.train_stages if isinstance(stage, LearnStage)
        )
        train = learn.train
        assert (train.learning_rate, train.min_learning_rate, train.weight_decay) == (
            7e-5,
            7e-6,
            0.1,
        )
        assert (learn.steps, learn.warmup_steps, learn.horizon_steps) == (100, 50, 100)
        if name.startswith("1.1b"):
            assert (learn.batch_sequences, learn.maps) == (1024, "official")


@pytest.mark.parametrize("name", WIDER_BASES)
def test_operators_on_a_base_of_50b_tokens(name: str) -> None:
    made, standard = (
        plan(f"operators/{name}.toml"),
        plan(f"operators/{name.replace('50b_', '')}.toml"),
    )
    assert made.train_stages[0].steps == TIMINGS[50]
    assert [stage.operator for stage in made.growths] == [
        stage.operator for stage in standard.growths
    ]
    assert made.train_stages[0].model == standard.train_stages[0].model


def test_eight_layers_to_24() -> None:
    for name, layer_map, noise, rate in (
        ("1.1b_8l_stack", tuple(range(8)) * 3, 0.0, 91.3),
        ("1.1b_8l_interleave", tuple(i // 3 for i in range(24)), 0.0, 30.4),
        ("1.1b_8l_noise", tuple(range(8)) * 3, 0.2, 91.3),
    ):
        made = plan(f"operators/{name}.toml")
        (grow,) = made.growths
        assert (grow.layer_map, grow.noise) == (layer_map, noise)
        assert 100 * kept_connections(layer_map) / 23 == pytest.approx(
            rate, abs=0.05
        ), "as appendix H.2 has it"
    (note,) = (
        note
        for note in plan("operators/1.1b_8l_interleave.toml").notes
        if "R_c" in note
    )
    assert (
        note
        == "growth[0]: keeps 7 of 23 connections between layers, R_c = 30.4% (paper, eq. 51)"
    )


def test_recipes_of_later_work_spend_what_their_baseline_does() -> None:
    scratch = plan("operators/small_scratch.toml")
    step = scratch.flops / scratch.train_stages[0].steps
    for name in (
        "small_midas",
        "small_lidas",
        "small_in_place_late",
        "small_wsd_scratch",
        "small_shrink_perturb",
        "small_sparkling",
    ):
        assert abs(plan(f"later/{name}.toml").flops - scratch.flops) < step, name
    midas, lidas = plan("later/small_midas.toml"), plan("later/small_lidas.toml")
    assert maps(midas) == [(0, 1) * 2, (0, 1, 0, 1, 2, 3), (0, 1, 2, 3, 2, 3, 4, 5)]
    assert maps(lidas) == [(0, 0, 1, 1), (0, 1, 1, 2, 2, 3), (0, 1, 2, 2, 3, 3, 4, 5)]
    for made in (midas, lidas):
        tokens = [stage.tokens / made.tokens for stage in made.train_stages]
        assert tokens == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.002)
    one, twin = (
        plan("later/small_one_layer_wsd.toml"),
        plan("later/small_wsd_scratch.toml"),
    )
    assert one.tokens == twin.tokens
    rates = [
        [stage.learning_rate(step) for step in range(1, stage.steps + 1)]
        for stage in one.train_stages
    ]
    (whole,) = twin.train_stages
    assert rates[0] + rates[1] == pytest.approx(
        [whole.learning_rate(step) for step in range(1, whole.steps + 1)]
    )


def test_shrinking_is_what_its_authors_do() -> None:
    """arXiv 2605.13405: about twice the parameters, weights of 0.4, far below 20 tokens for each parameter."""
    made = plan("later/small_shrink_perturb.toml")
    (grow,) = made.growths
    assert (grow.operator, grow.shrink_factor, grow.perturbation) == ("shrink", 0.4, 1)
    before, after = grow.source, grow.target
    factor = after.non_embedding_parameters() / before.non_embedding_parameters()
    assert factor == pytest.approx(1.78, abs=0.01)
    assert made.tokens < 2 * after.non_embedding_parameters()


def test_sparkling_is_what_its_paper_says() -> None:
    """arXiv 2602.02472: twice the width in the middle, heads as they are; eqs. 17, 24 and 28."""
    made = plan("later/small_sparkling.toml")
    (grow,) = made.growths
    assert (grow.operator, grow.shares, grow.norm) == ("split", "rms", "copied")
    assert grow.optimizer == "asymmetric"
    before, after = grow.source, grow.target
    assert (after.dim, after.ffn_dim) == (2 * before.dim, 2 * before.ffn_dim)
    assert (after.n_heads, after.head_dim) == (before.n_heads, before.head_dim)
    base, last = made.train_stages
    assert base.steps == last.steps
    assert last.horizon_steps == base.steps + last.steps
    assert last.new_rate is not None
    assert last.new_rate.rewarm.ratio == 1.3
    paper_share = 250 / (200e9 / (768 * 4096))  # of its run's steps
    share = last.new_rate.rewarm.rewarm_steps / last.horizon_steps
    assert share == pytest.approx(paper_share, rel=0.1)
    at_growth = last.learning_rate(1)
    assert base.learning_rate(base.steps) == pytest.approx(at_growth, rel=0.01)
    assert last.new_learning_rate(1) == at_growth
    assert last.new_learning_rate(5) == pytest.approx(1.3 * at_growth)
    assert last.new_learning_rate(last.steps) == pytest.approx(
        last.learning_rate(last.steps), rel=0.01
    ), "both end at the floor"


def test_standard_setting_of_the_operators() -> None:
    sizes = {
        name: millions(plan(f"operators/1.1b_{name}.toml").train_stages[0])
        for name in OPERATORS
    }
    assert all(
        size == ((439, 308) if name.endswith("depth") else (374, 308))
        for name, size in sizes.items()
    )
    scratch = plan("operators/1.1b_scratch.toml")
    assert scratch.flops == pytest.approx(8e20, rel=0.03)
    assert scratch.recipe.train == plan("paper/1.1b_100b_scratch.toml").recipe.train


def test_ablations_stack_and_freeze_as_the_paper_says() -> None:
    gradual, interleave, noise, last_layers, mslt = (
        plan(f"operators/small_{name}.toml") for name in ABLATIONS
    )
    assert maps(gradual) == [(0, 1, 0, 1), (0, 1, 2, 3, 0, 1, 2, 3)]
    assert maps(interleave) == [(0, 0, 0, 0, 1, 1, 1, 1)]
    assert maps(plan("operators/1.1b_gradual.toml")) == [
        tuple(range(6)) * 2,
        tuple(range(12)) * 2,
    ]
    assert maps(noise) == [(0, 1) * 4]
    assert [stage.noise for stage in noise.stages if isinstance(stage, GrowStage)] == [
        0.2
    ]
    assert (
        maps(last_layers)
        == maps(mslt)
        == [(0, 1, 0, 1), (0, 1, 2, 3, 2, 3), (0, 1, 2, 3, 4, 5, 4, 5)]
    )
    assert [(stage.steps, stage.frozen_steps, stage.frozen_layers) for stage in mslt.train_stages[:3]] == [
        (195, 0, 0), (98, 98, 2), (98, 98, 4),
    ]  # fmt: skip
    assert mslt.train_stages[3].frozen_steps == 98 < mslt.train_stages[3].steps


def spelled(method: str) -> tuple[int, ...]:
    """``12-3456x5-56``: the layers by their digits, from 1; x5 repeats the digits before it."""
    parts = [part.partition("x") for part in method.split("-")]
    return tuple(
        int(digit) - 1
        for digits, _, times in parts
        for digit in digits * int(times or 1)
    )


@pytest.mark.parametrize(("name", "method"), PARTIAL_RECIPES.items())
def test_partial_stacking_repeats_the_layers_that_it_is_named_after(
    name: str, method: str
) -> None:
    made = plan(f"operators/{name}.toml")
    (layer_map,) = maps(made)
    assert layer_map == spelled(method)
    assert len(layer_map) == 24
    assert made.train_stages[0].model.n_layers == 6
    # Eq. 51 tells whether the paper's notation is read as meant: connections of the base that are left.
    assert 100 * kept_connections(layer_map) / 23 == pytest.approx(
        PARTIAL[method], abs=0.2
    )


TIMINGS = {1: 477, 5: 2384, 20: 9537, 50: 23842}  # billions of tokens: steps
# File: target, factor, steps of the base, FLOPs. The axes of Figures 24, 26, 28, 30 and 32, of benchmarks, have room for
# as many; Figures 8 and 10 are read below.
SWEEPS = {
    f"{size}_timing_{d}b": (run, 4, steps, flops)
    for size, run, flops in (
        ("410m", "410m_750b", 2.2e20),
        ("1.1b", "1.1b_100b", 8e20),
        ("3b", "3b_300b", 1.4e21),
    )
    for d, steps in TIMINGS.items()
}
SWEEPS |= {
    f"{size}_timing_0b": (run, 4, 0, flops)
    for size, (run, _, _, flops) in (
        (size, SWEEPS[f"{size}_timing_50b"]) for size in ("410m", "1.1b", "3b")
    )
}
SWEEPS["3b_timing_100b"] = ("3b_300b", 4, 47_684, 1.4e21)
SWEEPS |= {f"1.1b_factor_{g}": ("1.1b_100b", g, 4768, 8e20) for g in (2, 8, 24)}
SWEEPS |= {f"3b_factor_{g}": ("3b_300b", g, 4768, 1.4e21) for g in (8, 16, 32)}


@pytest.mark.parametrize("name", SWEEPS)
def test_sweeps_vary_one_thing_of_the_main_run(name: str) -> None:
    run, factor, steps, flops = SWEEPS[name]
    made, main = plan(f"sweeps/{name}.toml"), plan(f"paper/{run}_gstack.toml")
    base, last = made.train_stages
    assert (base.model.n_layers * factor, base.steps) == (
        made.recipe.model.n_layers,
        steps,
    )
    assert abs(made.paper_flops - flops) < last.paper_flops / last.steps, (
        "6 N D with N all parameters"
    )
    assert (made.recipe.model, made.recipe.train) == (
        main.recipe.model,
        main.recipe.train,
    )
    assert main.paper_flops > flops, "the main run passes through the sweep's FLOPs"
    if "_0b" not in name:  # where the base has no step
        rates = {
            key: made.recipe.base.train[key]
            for key in ("learning_rate", "min_learning_rate")
        }
        assert rates == {key: main.recipe.base.train[key] for key in rates}


def test_all_sweeps_are_tested() -> None:
    assert {f.stem for f in FILES if f.parent.name == "sweeps"} == SWEEPS.keys()


def test_quickstart_and_its_twin() -> None:
    grown, scratch = plan("quickstart.toml"), plan("quickstart_scratch.toml")
    assert grown.recipe.model == scratch.recipe.model
    assert len(grown.stages) == 3
