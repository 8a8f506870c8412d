"""When and how much to grow: a recipe's forms of ``timing`` resolved, and what the guidelines say of them. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from stackgrow.growth.depth import kept_connections
from stackgrow.plan import guidelines
from stackgrow.plan.parts import Hop
from stackgrow.plan.stages import TrainStage
from stackgrow.recipe.keys import LossSlope, Recipe
from stackgrow.recipe.values import Duration, Share
from stackgrow.text import human

LONG_WARMUP = 0.2  # of a stage's steps


def due(recipe: Recipe, hop: Hop, timing: Duration | Share | str) -> Duration:
    """Tokens or steps from the start of the run to this growth."""
    if isinstance(timing, Duration):
        return timing
    if isinstance(timing, Share):
        return Duration(timing.of(recipe.budget.tokens), "tokens")
    return Duration(auto(recipe, hop), "tokens")


def auto(recipe: Recipe, hop: Hop) -> int:
    """The guideline's tokens for this growth: the recipe's own, or the paper's."""
    n, fit = hop.target.non_embedding_parameters(), recipe.guideline
    constants = (fit.a, fit.b, fit.c) if fit else guidelines.TIMING
    try:
        return round(
            guidelines.growth_timing(
                n, guidelines.training_flops(n, recipe.budget.tokens), constants
            )
        )
    except OverflowError:  # of a fit that makes no sense: beyond any budget
        return 10 * recipe.budget.tokens


def shown(recipe: Recipe, hop: Hop) -> str:
    """The timing as given, and what it comes to where that is not said."""
    timing = hop.growth.timing
    if isinstance(timing, LossSlope):
        return f'"{timing.min}" to "{timing.max}"'
    length = due(recipe, hop, timing)
    if timing == length:
        return f'"{timing}"'
    return f'"{timing}" (here {human(length.amount)})'


def timing_note(recipe: Recipe, hop: Hop) -> Iterator[str]:
    """What "auto" comes to, where from, and whether it is used beyond what it was fitted on; and what 0 means."""
    timing = hop.growth.timing
    if isinstance(timing, Duration) and timing.amount == 0:
        yield f"{hop.where}.timing: 0, the base grows as it is initialised, without a step of training (d = 0)"
    if hop.growth.timing != "auto":
        return
    n = hop.target.non_embedding_parameters()
    c = guidelines.training_flops(n, recipe.budget.tokens)
    fit = recipe.guideline
    beyond = ""
    if fit:
        source = fit.source
        limits = ((n, fit.max_parameters), (c, fit.max_flops))
        exceeded = [human(limit) for value, limit in limits if limit and value > limit]
        if exceeded:
            beyond = f", extrapolated: fitted up to {', '.join(exceeded)}"
    else:
        source = "the paper's section 4.2, eq. 2"
        if not guidelines.in_fitted_range(n, c):
            beyond = ", extrapolated: fitted on 410M to 3B, up to 1.2e21"
    guideline = f"guideline d = {human(auto(recipe, hop))} tokens, {source}"
    yield f"{hop.where}.timing: {guideline} (N = {human(n)} without embedding and head, C = 6 N D = {c:.2e}{beyond})"


def warmup_note(stage: TrainStage) -> Iterator[str]:
    """Whether a stage is over soon after its learning rate has risen. Maps that LiGO learns are left out: half of their
    steps are warm-up by its author's settings."""
    if not stage.steps:
        return
    share = stage.warmup_steps / stage.steps
    if stage.schedule is None and not stage.learns_maps and share > LONG_WARMUP:
        steps = f"{stage.warmup_steps:,} of its {stage.steps:,} steps"
        yield f"{stage.name}: its warm-up takes {steps}, {share:.0%}, more than a fifth; its own table may shorten it"


def factor_note(recipe: Recipe, hop: Hop) -> Iterator[str]:
    """Whether the paper found other factors of G_stack to be better."""
    before, after = hop.source.n_layers, hop.target.n_layers
    low, high = guidelines.BEST_FACTORS
    if not hop.operator.studied or hop.growth.layer_map is not None:
        return
    if hop.growth.factor == "auto":
        n = hop.target.non_embedding_parameters()
        preliminary = guidelines.preliminary_factor(
            n, guidelines.training_flops(n, recipe.budget.tokens)
        )
        yield (
            f"{hop.where}.factor: {guidelines.GROWTH_FACTOR}, which the paper uses throughout (section 4.2); its "
            f"preliminary equation (appendix F, eq. 50) would give {preliminary:.1f}"
        )
    if not low * before <= after <= high * before:
        swept = "swept 2 to 24 at 1.1B and 4 to 32 at 3B: section 4.2"
        yield f"{hop.where}.factor: {after // before} is beyond the best of the paper, {low} to {high} ({swept})"


def connections_note(hop: Hop) -> Iterator[str]:
    """The connection rate, by which the paper orders its ablations (appendix H.2, Table 5), of layers that are stacked
    in another way than G_stack's."""
    is_gstack = hop.growth.layer_map is None and hop.growth.order == "stack"
    if not hop.layer_map or not hop.operator.studied or is_gstack:
        return
    kept, every = kept_connections(hop.layer_map), len(hop.layer_map) - 1
    rate = 100 * kept / every
    yield f"{hop.where}: keeps {kept} of {every} connections between layers, R_c = {rate:.1f}% (paper, eq. 51)"


def bounds_note(
    latest: TrainStage, hop: Hop, flops: tuple[float, float]
) -> Iterator[str]:
    """What is known beforehand of a growth whose timing the loss decides; ``flops`` are those of the run, grown at the
    earliest and at the latest."""
    until = latest.until
    if until is None or not isinstance(hop.growth.timing, LossSlope):
        return
    first = human(latest.start_tokens + latest.batches.tokens(until.min_steps))
    last = human(latest.start_tokens + latest.batches.tokens(until.max_steps))
    yield (
        f"{hop.where}.timing: after {first} to {last} tokens, step {until.min_steps:,} to "
        f"{until.max_steps:,} of {latest.name}, as soon as the loss falls by less than {until.slope:g} per billion "
        f"tokens (a line over {until.window:,} steps); {flops[0]:.3g} to {flops[1]:.3g} FLOPs; here the latest"
    )
