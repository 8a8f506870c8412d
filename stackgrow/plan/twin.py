"""The scratch twin of a recipe: the same target model, trained from scratch with the same FLOPs. No torch.

A growth is worth what it saves against a run that spent as much on the target alone (the paper's section 3): the twin
has the recipe's data, seed and settings, those of [train] and [parallel] as the recipe's last stage has them, no
[base] and no [[growth]], and a budget whose FLOPs are nearest to the recipe's, to the step.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from stackgrow.plan.resolve import make_plan
from stackgrow.plan.stages import Plan
from stackgrow.recipe.load import RecipeError
from stackgrow.recipe.write import to_toml
from stackgrow.text import human

SUFFIX = "_scratch"


def scratch_twin(plan: Plan, file: str | Path = "recipe") -> Plan:
    """The plan of the twin. FLOPs are 6 N D with N the parameters without the input embedding; those of a base that
    comes from elsewhere are not known, and not in it.

    Raises:
        RecipeError: nothing grows; or what remains is no recipe, such as a horizon shorter than the twin's steps.
    """
    if not plan.growths:
        raise RecipeError(
            file,
            [
                (
                    "growth",
                    "is missing: a recipe that grows nothing is its own scratch twin",
                )
            ],
        )
    last = plan.train_stages[-1]
    steps = last.batches.nearest(round(plan.flops / last.flops_per_token))
    recipe = plan.recipe
    twin = dataclasses.replace(
        recipe,
        name=recipe.name + SUFFIX,
        budget=dataclasses.replace(recipe.budget, tokens=last.batches.tokens(steps)),
        base=None,
        growth=(),
        guideline=None,
        train=last.train,
        parallel=last.parallel,
        run=dataclasses.replace(
            recipe.run, folder=recipe.run.folder and recipe.run.folder + SUFFIX
        ),
    )
    return make_plan(twin, file)


def twin_text(plan: Plan, twin: Plan, file: Path) -> str:
    """The twin as the recipe that goes into ``file``, after a comment on what it is and how near its FLOPs are."""
    grown, scratch = plan.recipe, twin.recipe
    steps = twin.train_stages[0].steps
    difference = steps - plan.flops / twin.flops * steps
    lines = [
        f"The scratch twin of {grown.name}: its target model trained from scratch with the same FLOPs, hence",
        f"on {human(twin.tokens)} tokens, not {human(plan.tokens)}. Compare the two at equal FLOPs, never tokens.",
        "",
        f"  torchrun --standalone --nproc-per-node 1 tools/run_recipe.py {file}",
        f"  python tools/compare_runs.py {scratch.folder} {grown.folder}",
        "",
        f"FLOPs     {twin.flops:.6g} here, {plan.flops:.6g} there, base included, {difference:+.2f} steps apart",
        "          (6 N D, N without the input embedding)",
        f"          {twin.paper_flops:.6g} and {plan.paper_flops:.6g} as the paper counts (N all parameters)",
        "values    the grown recipe's, every key written out; [train] and [parallel] as its last stage has them",
        "written   by tools/twin.py",
    ]
    for caveat in _caveats(plan):
        lines.append(f"note      {caveat}")
    comment = "\n".join(f"# {line}".rstrip() for line in lines)
    return f"{comment}\n\n{to_toml(scratch)}"


def _caveats(plan: Plan) -> list[str]:
    caveats = []
    if plan.recipe.base and plan.recipe.base.from_:
        caveats.append(
            "what the base from elsewhere has cost is not known, and not in the budget"
        )
    for stage in plan.train_stages:
        if stage.until and stage.name not in plan.found:
            caveats.append(
                "the loss decides when to grow: the budget is that of the latest growth; name the run's folder"
            )
    return caveats
