"""A recipe's stages, laid one after the other: each begins at the token where the one before stopped. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from stackgrow.growth.operators import settings_of
from stackgrow.plan.batches import Batches
from stackgrow.plan.checks import schedule_problems
from stackgrow.plan.checks_growth import continued_problems, new_rate_problems
from stackgrow.plan.parts import Hop, Part
from stackgrow.plan.stages import (
    Continued,
    Freeze,
    GrowStage,
    ImportStage,
    LearnStage,
    NewRate,
    Stage,
    TrainStage,
)
from stackgrow.plan.timing import due, shown
from stackgrow.plan.until import Until
from stackgrow.recipe.keys import Growth, LossSlope, Recipe
from stackgrow.recipe.load import Problem
from stackgrow.recipe.values import Duration, Rewarm, Share
from stackgrow.text import human

StepsUntil = Callable[
    [TrainStage, Until], int
]  # the steps of a stage whose end the loss decides


def lay_out(
    recipe: Recipe, parts: Sequence[Part], steps_until: StepsUntil
) -> tuple[list[Stage], list[Problem]]:
    """The stages of ``parts`` and the growths between them, up to the first that there is no room for."""
    timeline = Timeline(recipe, steps_until)
    if recipe.base and recipe.base.from_:
        timeline.add_import(parts[0])
    for part in parts:
        if part.trained and not timeline.add_train(part):
            break
        if part.then_grows:
            timeline.add_growth(part.then_grows)
    return timeline.stages, timeline.problems


class Timeline:
    """The stages so far, and what is wrong with them."""

    def __init__(self, recipe: Recipe, steps_until: StepsUntil):
        self.recipe = recipe
        self.steps_until = steps_until
        self.stages: list[Stage] = []
        self.problems: list[Problem] = []
        self.grown: Hop | None = None  # the last growth

    @property
    def trained(self) -> list[TrainStage]:
        return train_stages(self.stages)

    @property
    def tokens(self) -> int:
        return sum(stage.tokens for stage in self.trained)

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.trained)

    @property
    def position(self) -> int:
        """Sequences of the data that are consumed by now."""
        if self.trained:
            last = self.trained[-1]
            return last.position(last.steps)
        return self.recipe.base.position if self.recipe.base else 0

    def add_import(self, part: Part) -> None:
        """The base model of ``part``, taken over from elsewhere."""
        base = self.recipe.base
        assert base is not None
        stage = ImportStage(
            index=len(self.stages),
            source=part.model,
            target=part.model,
            operator="import",
            layer_map=None,
            noise=0.0,
            seed=self.recipe.seed,
            folder=base.from_,
            position=base.position,
        )
        self.stages.append(stage)

    def add_growth(self, hop: Hop) -> None:
        index, growth = len(self.stages), hop.growth
        stage = GrowStage(
            index=index,
            source=hop.source,
            target=hop.target,
            operator=growth.operator,
            layer_map=hop.layer_map,
            noise=growth.noise,
            seed=self.recipe.seed + index,
            ramp=growth.ramp,
            optimizer=None if growth.optimizer == "reset" else growth.optimizer,
            **settings_of(growth),
        )
        self.stages.append(stage)
        self.grown = hop

    def add_train(self, part: Part) -> bool:
        """Adds the train stage of ``part``; False where there is no room for it."""
        stage = self._train_stage(part)
        if stage.steps < 1 and not self._grows_untrained(part):
            self.problems.append(self._no_room(part))
            return False
        if self.grown and not part.learns:
            stage = self._carried_on(stage, self.grown)
        self.problems.extend(schedule_problems(stage, part))
        self.stages.append(stage)
        return True

    def _grows_untrained(self, part: Part) -> bool:
        """Whether ``part`` is the base of a run whose first growth is at 0 tokens: its stage of no steps saves the
        model as it is initialised."""
        if self.stages or part.hop is None:
            return False
        timing = part.hop.growth.timing
        return isinstance(timing, Duration) and timing.amount == 0

    def _train_stage(self, part: Part) -> TrainStage:
        """Up to the growth (nearest step) or to the end of the budget (never beyond it); its steps are below 1 where
        there is no room for it."""
        hop = part.hop
        if hop is None:
            left = self.recipe.budget.tokens - self.tokens
            return self._stage(part, Batches.of(part.train).within(left))
        if part.learns:
            return self._learn_stage(part, hop)
        timing = hop.growth.timing
        if not isinstance(timing, LossSlope):
            return self._stage(part, self._steps_to(part, hop, timing))
        earliest = self._steps_to(part, hop, timing.min)
        latest = self._steps_to(part, hop, timing.max)
        until = Until(timing.loss_slope, earliest, latest)
        stage = self._stage(part, latest, until)
        return dataclasses.replace(stage, steps=self.steps_until(stage, until))

    def _stage(self, part: Part, steps: int, until: Until | None = None) -> TrainStage:
        before = self.stages[-1] if self.stages else None
        return TrainStage(
            index=len(self.stages),
            model=part.model,
            train=part.train,
            seq_len=self.recipe.data.seq_len,
            steps=steps,
            start_tokens=self.tokens,
            start_sequences=self.position,
            start_flops=sum(stage.flops for stage in self.trained),
            mask=before.mask if before and not before.trains else None,
            until=until,
            parallel=part.parallel,
            document_mask=self.recipe.data.document_mask,
        )

    def _learn_stage(self, part: Part, hop: Hop) -> TrainStage:
        length = hop.growth.learn_steps
        assert length is not None, "operator_key_problems ask for it"
        stage = self._stage(part, 0)
        return LearnStage(
            index=stage.index,
            model=stage.model,
            train=stage.train,
            seq_len=stage.seq_len,
            steps=stage.reached(length),
            start_tokens=stage.start_tokens,
            start_sequences=stage.start_sequences,
            start_flops=stage.start_flops,
            parallel=stage.parallel,
            document_mask=stage.document_mask,
            source=hop.source,
            seed=self.recipe.seed + stage.index,
            maps=hop.growth.maps,
        )

    def _steps_to(self, part: Part, hop: Hop, timing: Duration | Share | str) -> int:
        """Steps of ``part`` from now to the growth: timings count from the start of the run."""
        length = due(self.recipe, hop, timing)
        if length.unit == "steps":
            return length.amount - self.steps
        return Batches.of(part.train).nearest(length.amount - self.tokens)

    def _carried_on(self, stage: TrainStage, grown: Hop) -> TrainStage:
        """The stage after a growth, with what the growth says of its schedule and its layers."""
        freeze = None
        if grown.growth.freeze:
            freeze = Freeze(grown.source.n_layers, grown.growth.freeze)
        new_rate = None
        growth = self.stages[-1]
        if grown.growth.lr_new and isinstance(growth, GrowStage):
            new_rate = NewRate(growth, grown.growth.lr_new)
        schedule = None
        of_models = [before for before in self.trained if not before.learns_maps]
        if of_models:
            schedule = continued(grown.growth, of_models[-1])
        stage = dataclasses.replace(
            stage, schedule=schedule, freeze=freeze, new_rate=new_rate
        )
        if schedule:
            self.problems.extend(continued_problems(stage, of_models[-1], grown.where))
            self.problems.extend(new_rate_problems(stage, grown.where))
        return stage

    def _no_room(self, part: Part) -> Problem:
        step = f"{human(Batches.of(part.train).at(1))} tokens"
        if part.hop is None and self.grown and self.grown.growth.timing == "auto":
            budget = human(self.recipe.budget.tokens)
            guideline = (
                "[guideline]"
                if self.recipe.guideline
                else "the paper's guideline, fitted on models of 410M to 3B"
            )
            return (
                f"{self.grown.where}.timing",
                f"{shown(self.recipe, self.grown)} leaves no step of a budget of {budget} tokens: it is {guideline}; "
                'give an amount of your own, such as "10%"',
            )
        if part.hop is None:
            return (
                "budget.tokens",
                f"{human(self.recipe.budget.tokens)} leaves no step of {step} after {human(self.tokens)} of earlier "
                "stages; raise the budget or lower the timings",
            )
        return (
            f"{part.hop.where}.timing",
            f"{shown(self.recipe, part.hop)} is not at least one step of {step} after the previous growth or the "
            f"start, at {human(self.tokens)}; timings count from the start of the run and must rise",
        )


def train_stages(stages: Iterable[Stage]) -> list[TrainStage]:
    return [stage for stage in stages if isinstance(stage, TrainStage)]


def continued(growth: Growth, before: TrainStage) -> Continued | None:
    """Where the schedule of the stage after ``growth`` begins; None where it restarts."""
    if growth.lr == "restart":
        return None
    steps = before.steps
    if before.schedule:
        steps += before.schedule.steps
    rewarm = growth.lr if isinstance(growth.lr, Rewarm) else None
    return Continued(steps, rewarm)
