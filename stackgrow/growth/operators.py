"""The growth operators by name. Importable without torch: an operator is loaded when its rules are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from stackgrow.growth.depth import GEOMETRY
from stackgrow.growth.rules import Alias, Compute, GrowthError, Moment, Rule, Rules, Zeros
from stackgrow.recipe.keys import Model

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Operator:
    """``width``, ``depth`` and ``whole`` name functions of this package, "module:function", and what they take;
    those that make anything but copies take a Moment too."""

    name: str
    directions: tuple[str, ...]
    width: str = ""  # (source, target, seed, moment)
    depth: str = ""  # (layer_map, source, target), and (seed, moment) if ``seeded``
    whole: str = ""  # (source, target, network): width and depth in one, from matrices trained first
    seeded: bool = False


ANY = ("depth", "width", "both")
_TABLE = (  # equations of appendix A of the paper, https://arxiv.org/abs/2405.15319
    # G_direct depthwise (G_stack, Algorithm 1): whole layers are copied.
    Operator("stack", ("depth",), depth="depth:depth_rules"),
    # G_direct widthwise (eqs. 4-11): neurons are copied and their fan-out split; layers, if any, are stacked.
    Operator("split", ("width", "both"), "width:split_rules", "depth:depth_rules"),
    # G_zero (eqs. 12-19): new parameters whose outputs are zero.
    Operator("zero", ANY, "zero:zero_width_rules", "zero:zero_depth_rules"),
    # G_random (eqs. 20-36): new random parameters, whose outputs training unmasks.
    Operator("random", ANY, "zero:random_width_rules", "zero:random_depth_rules", seeded=True),
    # G_learn (LiGO, eqs. 37-42): learned linear maps of all weights.
    Operator("learn", ANY, whole="learned:learned_rules"),
)
OPERATORS: Mapping[str, Operator] = {operator.name: operator for operator in _TABLE}


def growth_rules(
    name: str,
    source: Model,
    target: Model,
    layer_map: Sequence[int] | None = None,
    seed: int = 0,
    network: Any = None,
    moment: Moment | None = None,
) -> Rules:
    """The rules of one growth: in width where the geometry differs, then in depth by ``layer_map``, if given.

    ``seed`` should differ between the growths of a run. "learn" takes its trained HyperNetwork instead of a map, and
    has no rules for a ``moment``. Raises GrowthError for an unknown operator, and where it does not define the growth.
    """
    if name not in OPERATORS:
        raise GrowthError(f"no growth operator {name!r}: the operators are {', '.join(OPERATORS)}")
    operator, wide = OPERATORS[name], replace(target, n_layers=source.n_layers)
    if operator.whole:
        if network is None or layer_map is not None:
            raise GrowthError(f"{name!r} takes a trained network, which says how layers mix, and no layer map")
        return _call(operator.whole, source, target, network)
    if layer_map is None and wide == source:
        raise GrowthError("nothing grows: the target has the source's layers and widths")
    wider = bool(operator.width) and any(getattr(source, key) != getattr(wide, key) for key in GEOMETRY)
    direction = ("both" if wider else "depth") if layer_map is not None else "width"
    if direction not in operator.directions:
        able = [other.name for other in _TABLE if direction in other.directions]
        raise GrowthError(f"{name!r} does not grow in {direction}: use {', '.join(able)}")
    if layer_map is None:
        return _call(operator.width, source, target, seed, moment)
    deeper = _call(operator.depth, layer_map, wide if wider else source, target, *[seed, moment][: 2 * operator.seeded])
    if moment and moment.asymmetric:
        deeper = first_copies(layer_map, deeper)
    return compose(_call(operator.width, source, wide, seed, moment), deeper) if wider else deeper


def first_copies(layer_map: Sequence[int], rules: Rules) -> Rules:
    """The rules of a growth in depth, with zeros in every layer whose source layer an earlier one copies too."""
    again = tuple(f"layers.{i}." for i, layer in enumerate(layer_map) if layer in layer_map[:i])
    zeros = {name: Zeros(rule.sources[0]) for name, rule in rules.targets.items() if name.startswith(again)}
    return replace(rules, targets={**rules.targets, **zeros})


def compose(first: Rules, second: Rules) -> Rules:
    """``second`` after ``first``, as one growth of the source of ``first``."""
    targets = {name: _through(first.targets, rule) for name, rule in second.targets.items()}
    used = {name for rule in targets.values() for name in rule.sources}
    return Rules(targets, first.source_shapes, second.target_shapes, frozenset(set(first.source_shapes) - used))


def _through(first: Mapping[str, Rule], rule: Rule) -> Rule:
    if isinstance(rule, Alias):
        return first[rule.source]
    if isinstance(rule, Zeros):
        return Zeros(first[rule.like].sources[0])
    outer, inner = rule, [first[name] for name in rule.sources]
    assert not any(isinstance(step, Zeros) for step in inner), "no growth in width makes a tensor of zeros"

    def fn(*tensors: torch.Tensor) -> torch.Tensor:
        made, left = [], list(tensors)
        for step in inner:
            mine, left = left[: len(step.sources)], left[len(step.sources) :]
            made.append(step.fn(*mine) if isinstance(step, Compute) else mine[0])
        return outer.fn(*made)

    notes = [outer.note, *(step.note for step in inner if isinstance(step, Compute))]
    return Compute(tuple(fqn for step in inner for fqn in step.sources), fn, " of ".join(notes))


def _call(function: str, *arguments: Any) -> Rules:
    module, name = function.split(":")
    rules = getattr(import_module(f"stackgrow.growth.{module}"), name)(*arguments)
    assert isinstance(rules, Rules)
    return rules
