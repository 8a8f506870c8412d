"""The paper's names for what a plan does, for the legends of figures and the heads of tables."""

from __future__ import annotations

import dataclasses

from stackgrow.growth.depth import stack_map
from stackgrow.growth.operators import operator_named
from stackgrow.plan.stages import GrowStage, Plan

FROM_SCRATCH = "from scratch"


def method_of(plan: Plan) -> str:
    """``G_stack``, ``G_zero widthwise``, ``G_stack, then G_random``; ``from scratch`` where nothing grows."""
    if not plan.growths:
        return FROM_SCRATCH
    names = [_name(stage) for stage in plan.growths]
    if len(names) > 1 and len(set(names)) == 1:
        return f"{names[0]}, {len(names)} growths"
    return ", then ".join(names)


def _name(stage: GrowStage) -> str:
    operator = operator_named(stage.operator)
    name = operator.title.partition(":")[0].removesuffix(" widthwise")
    if operator.links:  # whole layers, copied
        name = _copies(stage)
    elif stage.source.n_layers == stage.target.n_layers:
        name += " widthwise"
    elif (
        dataclasses.replace(stage.source, n_layers=stage.target.n_layers)
        != stage.target
    ):
        name += " in depth and width"
    if stage.noise:
        name += f" with noise {stage.noise:g}"
    return name


def _copies(stage: GrowStage) -> str:
    """Whole layers copied are G_stack in the paper's order alone."""
    assert stage.layer_map is not None
    layer_map = list(stage.layer_map)
    n_source = stage.source.n_layers
    if len(layer_map) % n_source == 0 and layer_map == stack_map(
        n_source, len(layer_map)
    ):
        return "G_stack"
    if layer_map == sorted(layer_map) and len(set(layer_map)) == n_source:
        return "G_direct, interleaved"
    return "own layer map"
