"""The growth operators: the one table of what each is, needs and forbids, and the rules of a growth by its operator.

Importable without torch: an operator's own module is loaded when its rules are asked for.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from stackgrow.growth import own
from stackgrow.growth.depth import GEOMETRY
from stackgrow.growth.rules import (
    Alias,
    Compute,
    GrowthError,
    Moment,
    Rule,
    Rules,
    Zeros,
)
from stackgrow.recipe.keys import Model

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Limit:
    """What a key of [train], or "parallel.tensor", may be in the stage where an operator is at work: while its maps
    are trained, or its mask rises. ``why`` goes on after the value that was given."""

    key: str
    allowed: tuple[object, ...]  # the first is what to use instead
    why: str
    widthwise: bool = False  # a limit only where widths grow


@dataclass(frozen=True)
class Operator:
    """One way to grow. ``width``, ``depth`` and ``whole`` name functions of this package, "module:function", that make
    Rules; each is given those arguments of ``growth_rules`` that its parameters name."""

    name: str
    title: str
    paper: str  # where arXiv 2405.15319 defines it
    directions: tuple[str, ...]
    preserves: str  # whether the grown model computes what the source does
    width: str = ""
    depth: str = ""
    whole: str = ""  # width and depth in one, from a network that a stage of its own trains first
    needs: Mapping[str, str] = field(
        default_factory=dict
    )  # keys of [[growth]] that it alone has: an example of each, as TOML
    options: tuple[str, ...] = ()  # keys of [[growth]] that it has and some others lack
    refuses: Mapping[str, str] = field(
        default_factory=dict
    )  # keys of [[growth]] that it lacks: why
    forbids: tuple[Limit, ...] = ()
    links: bool = False  # it only copies whole tensors: on disk no weight byte moves
    studied: bool = (
        False  # the paper's guidelines and speed-ups at scale are of this one
    )

    @property
    def keys(self) -> set[str]:
        """The keys of [[growth]] that it has and others may lack."""
        return {*self.needs, *self.options}

    @property
    def learned(self) -> bool:
        """Whether a stage of its own trains its maps before they are folded in."""
        return bool(self.whole)

    @property
    def masked(self) -> bool:
        """Whether the stage after it raises a mask over what is new."""
        return "ramp" in self.needs


DEPTH, WIDTH, BOTH = "depth", "width", "both"
# Keys of [[growth]] that are arguments of growth_rules by the same names.
SETTINGS = ("norm", "maps", "shares", "shrink_factor", "perturbation")
FLOAT8 = 'replaces the layers that "random" masks and "learn" makes'
MADE = "is not supported where weights are made in the forward pass"

_TABLE = (
    Operator(
        name="stack",
        title="G_direct depthwise (G_stack): whole layers are copied",
        paper="Algorithm 1",
        directions=(DEPTH,),
        preserves="no",
        depth="depth:depth_rules",
        links=True,
        studied=True,
    ),
    Operator(
        name="split",
        title="G_direct widthwise: neurons are copied and their fan-out is split; layers, if any, are stacked",
        paper="eqs. 4-11",
        directions=(WIDTH, BOTH),
        preserves='in width yes with norm = "copied" and whole factors, else all but RMSNorm; in depth no',
        width="width:split_rules",
        depth="depth:depth_rules",
        options=("norm", "shares"),
    ),
    Operator(
        name="zero",
        title="G_zero: new parameters whose outputs are zero",
        paper="eqs. 12-19, A.4",
        directions=(DEPTH, WIDTH, BOTH),
        preserves="yes; in width as far as RMSNorm's epsilon allows",
        width="zero:zero_width_rules",
        depth="zero:zero_depth_rules",
    ),
    Operator(
        name="random",
        title="G_random: new random parameters behind a mask, which training raises from 0 to 1",
        paper="eqs. 20-36",
        directions=(DEPTH, WIDTH, BOTH),
        preserves="yes, while the mask is 0; in width as far as RMSNorm's epsilon allows",
        width="zero:random_width_rules",
        depth="zero:random_depth_rules",
        needs={"ramp": '"1000 steps"'},
        forbids=(
            Limit("precision", ("bf16", "fp32"), FLOAT8),
            Limit(
                "cpu_offload",
                (False,),
                'is not supported with the mask of "random", which stays on the GPU',
            ),
            Limit(
                "parallel.tensor",
                (1,),
                'cannot shard the widthwise mask of "random"',
                widthwise=True,
            ),
        ),
    ),
    Operator(
        name="learn",
        title="G_learn (LiGO): linear maps of all weights, trained first, then folded in",
        paper="eqs. 37-42",
        directions=(DEPTH, WIDTH, BOTH),
        preserves="no",
        whole="learned:learned_rules",
        needs={"learn_steps": '"100 steps"'},
        options=("learn", "maps"),
        refuses={
            "layer_map": "learns how layers mix",
            "order": "learns how layers mix",
            "optimizer": "mixes many weights into one: their exp_avg_sq do not tell its",
            "lr_new": "mixes all weights into each, so that none is new",
        },
        forbids=(
            Limit("precision", ("bf16", "fp32"), FLOAT8),
            Limit("cpu_offload", (False,), MADE),
            Limit("compile", (False,), MADE),
            Limit("activation_checkpoint", ("none",), MADE),
            Limit(
                "parallel.tensor",
                (1,),
                'is not supported: "learn" makes every weight on every rank',
            ),
        ),
    ),
    Operator(
        name="shrink",
        title="shrink, zero-pad, perturb: smaller weights under the noise of a new model",
        paper="later: arXiv 2411.07340, 2605.13405",
        directions=(WIDTH,),
        preserves="no",
        width="shrink:shrink_rules",
        needs={"shrink_factor": "0.4", "perturbation": "1.0"},
        refuses={"noise": "perturbs by itself"},
    ),
)
OPERATORS: Mapping[str, Operator] = {operator.name: operator for operator in _TABLE}


def operator_named(name: str) -> Operator:
    """The table's row, or that of a function of the user's own, "module:function", of which nothing is imported.
    Raises GrowthError, naming the nearest operator, where there is none."""
    if name in OPERATORS:
        return OPERATORS[name]
    if own.is_own(name):
        return Operator(
            name,
            "a function of your own",
            "",
            (DEPTH, WIDTH, BOTH),
            "as it says itself",
        )
    close = difflib.get_close_matches(name, list(OPERATORS), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise GrowthError(
        f"no growth operator {name!r}: the operators are {', '.join(OPERATORS)}{hint}"
    )


def settings_of(growth: object) -> dict[str, Any]:
    """The SETTINGS that a [[growth]], or the stage that carries it out, has."""
    settings = {}
    for name in SETTINGS:
        value = getattr(growth, name)
        if value is not None:
            settings[name] = value
    return settings


def growth_rules(
    name: str,
    source: Model,
    target: Model,
    layer_map: Sequence[int] | None = None,
    seed: int = 0,
    network: Any = None,
    moment: Moment | None = None,
    norm: str = "scaled",
    maps: str = "paper",
    shares: str = "drawn",
    shrink_factor: float = 0.4,
    perturbation: float = 1.0,
) -> Rules:
    """The rules of one growth: in width where the geometry differs, then in depth by ``layer_map``, if given.

    ``seed`` should differ between the growths of a run. An operator that is learned takes its trained HyperNetwork
    instead of a map, and has no rules for a ``moment``. ``norm`` and ``shares`` are for "split" (width.py), ``maps``
    for "learn" (learned_shapes.py), the last two for "shrink" (shrink.py). Raises GrowthError for an unknown operator,
    and where it does not define the growth; own.TrustError for a function of the user's own that may not run.
    """
    operator = operator_named(name)
    available = {
        "source": source,
        "target": target,
        "layer_map": layer_map,
        "seed": seed,
        "network": network,
        "moment": moment,
        "norm": norm,
        "maps": maps,
        "shares": shares,
        "shrink_factor": shrink_factor,
        "perturbation": perturbation,
        "grown": target,
    }
    if own.is_own(name):
        return own.rules(name, available)
    if operator.learned:
        if network is None or layer_map is not None:
            raise GrowthError(
                f"{name!r} takes a trained network, which says how layers mix, and no layer map"
            )
        return _call(operator.whole, available)
    wide = replace(target, n_layers=source.n_layers)
    if layer_map is None and wide == source:
        raise GrowthError(
            "nothing grows: the target has the source's layers and widths"
        )
    grows_wider = bool(operator.width) and _geometry(source) != _geometry(wide)
    _check_direction(operator, grows_wider, layer_map)

    # First wider, with the source's layers, then deeper.
    if layer_map is None:
        return _call(operator.width, available)
    deeper_source = wide if grows_wider else source
    deeper = _call(operator.depth, {**available, "source": deeper_source})
    if moment and moment.asymmetric:
        deeper = first_copies(layer_map, deeper)
    if not grows_wider:
        return deeper
    wider = _call(operator.width, {**available, "target": wide, "grown": target})
    return compose(wider, deeper)


def first_copies(layer_map: Sequence[int], rules: Rules) -> Rules:
    """The rules of a growth in depth, with zeros in every layer whose source layer an earlier one copies too."""
    again = tuple(
        f"layers.{i}." for i, layer in enumerate(layer_map) if layer in layer_map[:i]
    )
    zeros = {
        name: Zeros(rule.sources[0])
        for name, rule in rules.targets.items()
        if name.startswith(again)
    }
    return replace(rules, targets={**rules.targets, **zeros})


def compose(first: Rules, second: Rules) -> Rules:
    """``second`` after ``first``, as one growth of the source of ``first``."""
    targets = {}
    used: set[str] = set()
    for name, rule in second.targets.items():
        targets[name] = _through(first.targets, rule)
        used.update(targets[name].sources)
    dropped = frozenset(set(first.source_shapes) - used)
    return Rules(targets, first.source_shapes, second.target_shapes, dropped)


def _geometry(model: Model) -> list[object]:
    return [getattr(model, key) for key in GEOMETRY]


def _check_direction(
    operator: Operator, grows_wider: bool, layer_map: Sequence[int] | None
) -> None:
    if layer_map is None:
        direction = WIDTH
    else:
        direction = BOTH if grows_wider else DEPTH
    if direction not in operator.directions:
        able = [other.name for other in _TABLE if direction in other.directions]
        raise GrowthError(
            f"{operator.name!r} does not grow in {direction}: use {', '.join(able)}"
        )


def _through(first: Mapping[str, Rule], rule: Rule) -> Rule:
    """``rule`` of a second growth, as a rule on the source of the ``first``."""
    if isinstance(rule, Alias):
        return first[rule.source]
    if isinstance(rule, Zeros):
        return Zeros(first[rule.like].sources[0])
    inner = [first[name] for name in rule.sources]
    assert not any(isinstance(step, Zeros) for step in inner), (
        "no growth in width makes a tensor of zeros"
    )
    sources: list[str] = []
    notes = [rule.note]
    for step in inner:
        sources += step.sources
        if isinstance(step, Compute):
            notes.append(step.note)

    def fn(*tensors: Tensor) -> Tensor:
        made = []
        start = 0
        for step in inner:
            end = start + len(step.sources)
            made.append(
                step.fn(*tensors[start:end])
                if isinstance(step, Compute)
                else tensors[start]
            )
            start = end
        return rule.fn(*made)

    return Compute(tuple(sources), fn, " of ".join(notes))


def _call(function: str, available: Mapping[str, object]) -> Rules:
    """Calls a function of this package with what its parameters name."""
    module, name = function.split(":")
    rules_of: Callable[..., Rules] = getattr(
        import_module(f"stackgrow.growth.{module}"), name
    )
    asked = inspect.signature(rules_of).parameters
    return rules_of(**{parameter: available[parameter] for parameter in asked})
