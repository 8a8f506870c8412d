"""The hashes of stages, written out: a run that was begun by an older commit goes on only while they stay as they are.

One recipe for every operator and kind of stage. A hash here changes where a stage computes something else, and never
because its code was moved, renamed or given a new key with a default that means "as before". Each is the last stage's,
into which those of all stages before it enter.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from recipes_for_tests import RECIPE, edited, plan_of

from stackgrow.plan.resolve import make_plan

GROWTHS = RECIPE[RECIPE.index("[base]") : RECIPE.index("[train]")]


def grown(base: str, growth: str, train: str = "") -> str:
    """The recipe with one growth in place of its two."""
    tables = f"[base]\n{base}\n\n[[growth]]\n{growth}\n\n"
    return edited((GROWTHS, tables)) + train


NARROW = "n_layers = 8\nmodel = { dim = 32, n_heads = 2, ffn_dim = 48 }"
SHALLOW_AND_NARROW = NARROW.replace("8", "4")
RECIPES = {
    "scratch": edited((GROWTHS, "")),
    "stack": RECIPE,
    "stack by a layer map": grown(
        "n_layers = 4",
        'operator = "stack"\nlayer_map = [0, 0, 1, 1, 2, 2, 3, 3]\ntiming = "20K"',
    ),
    "stack with noise": grown(
        "n_layers = 4", 'operator = "stack"\nfactor = 2\ntiming = "20K"\nnoise = 0.2'
    ),
    "stack with the optimizer": grown(
        "n_layers = 4",
        'operator = "stack"\nfactor = 2\ntiming = "20K"\noptimizer = "copy"',
    ),
    "stack with frozen layers": grown(
        "n_layers = 4",
        'operator = "stack"\nfactor = 2\ntiming = "20K"\nfreeze = "5 steps"',
    ),
    "stack with the schedule going on": grown(
        "n_layers = 4",
        'operator = "stack"\nfactor = 2\ntiming = "20K"\nlr = { ratio = 0.1, rewarm_steps = 5 }',
        'horizon = "200 steps"\n',
    ),
    "split": grown(NARROW, 'operator = "split"\ntiming = "20K"'),
    "split in both directions": grown(
        SHALLOW_AND_NARROW, 'operator = "split"\nfactor = 2\ntiming = "20K"'
    ),
    "zero": grown(
        "n_layers = 4",
        'operator = "zero"\nfactor = 2\norder = "interleave"\ntiming = "20K"',
    ),
    "zero in width": grown(NARROW, 'operator = "zero"\ntiming = "20K"'),
    "random": grown(
        "n_layers = 4",
        'operator = "random"\nfactor = 2\ntiming = "20K"\nramp = "8 steps"',
    ),
    "random in both directions": grown(
        SHALLOW_AND_NARROW,
        'operator = "random"\nfactor = 2\ntiming = "20K"\nramp = "8 steps"',
    ),
    "learn": grown(
        "n_layers = 4",
        'operator = "learn"\nfactor = 2\ntiming = "20K"\nlearn_steps = "10 steps"\nlearn = { warmup = "2 steps", learning_rate = 1e-3, min_learning_rate = 0.0, weight_decay = 0.1 }',
    ),
    "imported base": grown(
        'n_layers = 4\nfrom = "models/base"\nposition = 5',
        'operator = "stack"\nfactor = 2\ntiming = "20K"',
    ),
    "imported base, grown at once": grown(
        'n_layers = 4\nfrom = "models/base"',
        'operator = "stack"\nfactor = 2\ntiming = "start"',
    ),
    "until the loss falls slowly": grown(
        "n_layers = 4",
        'operator = "stack"\nfactor = 2\ntiming = { loss_slope = 0.5, min = "10K", max = "40K" }',
    ),
    "documents kept apart": edited(
        ("seq_len = 64", "seq_len = 64\ndocument_mask = true")
    )
    + 'attention = "flex"\n',
    "batch warm-up": RECIPE + 'batch_warmup = ["512 for 5 steps"]\n',
}
HASHES = {
    "scratch": "908e3e66f41eef74b6d77451289ca96cb2403dcabe9f4c3f678b824fc8fd03d0",
    "stack": "ee7fe17f22c1d98cdc5c9fae150d4a567c95123a009e3c197f30c33522aad562",
    "stack by a layer map": "ea97853528225eacb35138d5c75c5ec8b62628a1d4a8d567d6153619c7dde02e",
    "stack with noise": "2649d87ae97d808c986d2b720c4971463f063e5674b4d70cc286d374b8b4e8d5",
    "stack with the optimizer": "c8692b5f2e5dc2af286f9025a369fbd924051df4dace01986106b594a4411588",
    "stack with frozen layers": "1af965929bd60bd2cb648a82f5a96831448e4b4728cc85a0f26cc8d7fd0429ec",
    "stack with the schedule going on": "7feb0bad220676ad2681285080c08bc4999b91d1193fce25bf215a5ecb24202a",
    "split": "6736918a7390d3baac187be4cddecf7096d8d04afeedc3b46fc5acf3597facf0",
    "split in both directions": "808fce0c373a8589dbeccff29900c4e72aee3965cec4001eeca55ab197261729",
    "zero": "86211617de38fd7f6f54bcb709097e1d55715322c25f88ae9f4d18c79f0c2c40",
    "zero in width": "b0f1399d2cd3e8beec233768bd88b1ad21232f80ef2fbebd08a94679a389c06d",
    "random": "010aca32dd0d3a7aed49acea5bc7b83db254d380b7beab94f4c3dbfc5862c250",
    "random in both directions": "7c9e98502608fc04969233a43da6f68a732cc59e5f5182e4dc3512cd538d621d",
    "learn": "1a880e8b6121e6aca12bf50ae62ae18c0dd594fb21328cc78afa5e967492b87a",
    "imported base": "bd1b26e33441310c698a33dc63191984d6efabebb94a05c28550091fd55d2be9",
    "imported base, grown at once": "495ee6315f2bc94c0c8319efd360ddad60009a524472578d60f9bc2db8ca9fa4",
    "until the loss falls slowly": "722c64f297bb4ebecd268f7151534b56f23a5691b220c1b92c9a78b730a05c92",
    "documents kept apart": "6868f22e147993db64aba986502099eb8f3d3ede55c687a71a27871e614a4acd",
    "batch warm-up": "bd4bb9398356380ef487c24855cd0b44a54235b523e2d36441c820b95edd6d54",
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_stage_keeps_the_hash_that_older_runs_have_of_it(
    tmp_path: Path, name: str
) -> None:
    hashes = plan_of(tmp_path, RECIPES[name]).stage_hashes("d" * 64)
    assert list(hashes.values())[-1] == HASHES[name]


@pytest.mark.parametrize(
    ("name", "found", "last_hash"),
    [
        (
            "imported base",
            {"stage-0-import-4L": "weights"},
            "2b97f4b968c9d9ab9cd19bcb7c24a5e710d0da2f6ff7e0fb519ce25d18a4e311",
        ),
        (
            "until the loss falls slowly",
            {"stage-0-train-4L": 20},
            "d1b1a7aadf1f7088c71eb47d4dd8fff33f38a4e8bd5ac83e585f50fe2baf98dd",
        ),
    ],
)
def test_what_a_stage_found_out_is_in_the_hashes_of_later_stages(
    tmp_path: Path, name: str, found: dict[str, int | str], last_hash: str
) -> None:
    """The weights of an imported base; the step at which the loss called for growth."""
    plan = make_plan(plan_of(tmp_path, RECIPES[name]).recipe, found=found)
    hashes = plan.stage_hashes("d" * 64)
    assert list(hashes.values())[-1] == last_hash
