"""A Plan: the exact list of stages with their steps, tokens, FLOPs, bytes and learning rates. No torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from stackgrow.growth import learned_shapes
from stackgrow.growth.operators import operator_named
from stackgrow.plan import guidelines
from stackgrow.plan.batches import Batches
from stackgrow.plan.until import Until
from stackgrow.recipe.keys import Model, Parallel, Recipe, Train
from stackgrow.recipe.values import Duration, Rewarm
from stackgrow.recipe.write import canonical_hash, to_dict

CHECKPOINT_BYTES = 12  # per parameter: float32 weight and AdamW's two float32 moments


@dataclass(frozen=True)
class GrowthMask:
    """What G_random's mask covers, as the growth before the stage made it, and how long it takes from 0 to 1."""

    source: Model
    layer_map: tuple[int, ...] | None
    ramp: Duration


@dataclass(frozen=True)
class Continued:
    """The schedule goes on where the stages before it, of ``steps`` steps, left it; the rate rises from
    ``rewarm.ratio`` times what it would be to that."""

    steps: int
    rewarm: Rewarm | None = None

    def factor(self, step: int) -> float:
        """What the schedule's rate is multiplied by in step ``step`` of the stage, 1 being the first."""
        if self.rewarm is None:
            return 1.0
        return self.rewarm.ratio + (1 - self.rewarm.ratio) * min(
            1.0, (step - 1) / self.rewarm.rewarm_steps
        )


@dataclass(frozen=True)
class Freeze:
    """The embedding and the lowest ``layers`` are not trained for the first ``length`` of a stage (MSLT)."""

    layers: int
    length: Duration


@dataclass(frozen=True)
class NewRate:
    """What ``growth`` made new has a rate of its own (SPARKLING, arXiv 2602.02472)."""

    growth: GrowStage
    rewarm: Rewarm


@dataclass(frozen=True)
class TrainStage:
    """Trains one model for ``steps`` optimizer steps from data position ``start_sequences`` on; where ``until`` is
    given, ``steps`` are the most until the stage has found its end itself. 0 steps: it saves the model as it is
    initialised, for a growth of an untrained base."""

    index: int
    model: Model
    train: Train
    seq_len: int
    steps: int
    start_tokens: int
    start_sequences: int
    start_flops: float
    mask: GrowthMask | None = None
    kind: str = "train"
    until: Until | None = None
    parallel: Parallel = field(default_factory=Parallel)
    schedule: Continued | None = (
        None  # None: the learning rate's schedule begins with the stage
    )
    freeze: Freeze | None = None
    new_rate: NewRate | None = None
    document_mask: bool = False

    trains: ClassVar[bool] = True
    learns_maps: ClassVar[bool] = False
    imports: ClassVar[bool] = False
    folds_maps: ClassVar[bool] = False
    finds: ClassVar[type[int] | type[str] | None] = (
        int  # the step at which the loss called for growth
    )

    @property
    def name(self) -> str:
        return f"stage-{self.index}-train-{self.model.n_layers}L"

    @property
    def output_model(self) -> Model:
        return self.model

    @property
    def output_step(self) -> int | None:
        return self.steps

    @property
    def batches(self) -> Batches:
        return Batches.of(self.train)

    @property
    def batch_sequences(self) -> int:
        """Sequences in one step, after the batch's warm-up."""
        return self.train.global_batch_tokens // self.seq_len

    @property
    def tokens(self) -> int:
        return self.batches.tokens(self.steps)

    def position(self, step: int) -> int:
        """Sequences consumed since the start of the run, after ``step`` steps of this stage."""
        return self.start_sequences + self.batches.tokens(step) // self.seq_len

    @property
    def flops_per_token(self) -> float:
        """6 N with N all parameters that multiply, i.e. without the input embedding (torchtitan's count)."""
        return guidelines.training_flops(self.model.multiplied_parameters(), 1)

    @property
    def flops(self) -> float:
        return self.flops_after(self.steps)

    @property
    def paper_flops(self) -> float:
        """6 N D with N all parameters, as the paper counts (the insets of its Figures 1 and 5)."""
        return guidelines.training_flops(self.model.parameters(), self.tokens)

    def flops_after(self, steps: int) -> float:
        """Of the first ``steps`` steps. A frozen step costs 6 N a token like any other, less the backward pass of the
        frozen layers, 4 N of theirs: no gradient goes below the lowest trained layer."""
        frozen_tokens = self.batches.tokens(min(steps, self.frozen_steps))
        per_layer = (
            self.model.non_embedding_parameters() - self.model.dim
        ) // self.model.n_layers
        frozen_parameters = per_layer * self.frozen_layers
        return (
            self.flops_per_token * self.batches.tokens(steps)
            - 4 * frozen_parameters * frozen_tokens
        )

    @property
    def frozen_steps(self) -> int:
        return self.reached(self.freeze.length) if self.freeze else 0

    @property
    def frozen_layers(self) -> int:
        return self.freeze.layers if self.freeze else 0

    @property
    def attention_flops(self) -> float:
        width, seq_len = self.model.query_width, self.seq_len
        frozen_tokens = self.batches.tokens(self.frozen_steps)
        spared = (
            guidelines.attention_flops(
                self.frozen_layers, width, seq_len, frozen_tokens
            )
            * 2
            / 3
        )
        return (
            guidelines.attention_flops(self.model.n_layers, width, seq_len, self.tokens)
            - spared
        )

    @property
    def warmup_steps(self) -> int:
        return self.reached(self.train.warmup) if self.train.warmup.amount else 0

    @property
    def horizon_steps(self) -> int:
        if isinstance(self.train.horizon, Duration):
            return self.reached(self.train.horizon)
        return self.until.max_steps if self.until else self.steps

    def micro_batch(self, data_ranks: int) -> int:
        """Sequences per forward pass on one rank: the most that train.micro_batch allows and that divides the
        rank's share of every step."""
        share = math.gcd(*self.batches.sizes) // self.seq_len // data_ranks
        most = min(share, self.train.micro_batch)
        return max(
            sequences for sequences in range(1, most + 1) if share % sequences == 0
        )

    def checkpoint_tensors(self) -> dict[str, tuple[int, ...]]:
        return dict(self.model.tensors())

    @property
    def checkpoint_bytes(self) -> int:
        return CHECKPOINT_BYTES * self.model.parameters()

    @property
    def made_parameters(self) -> int:
        """Numbers that every rank holds whole beside what the stage trains."""
        return 0

    def identity(self) -> dict[str, Any]:
        plain = to_dict(self)
        free = {f.name for f in dataclasses.fields(Train) if f.metadata["free"]}
        plain["train"] = {
            key: value for key, value in plain["train"].items() if key not in free
        }
        plain.pop("start_flops")
        plain.pop("parallel")  # all of it is free
        if (
            self.train.on_spike != "skip"
        ):  # the weights depend on neither, and old recipes keep their hashes
            plain["train"].pop("on_spike")
            plain["train"].pop("spike_sigmas")
        if not self.document_mask:  # as before there was one
            plain.pop("document_mask")
        if (
            self.until
        ):  # where the loss decides the end, it is not known when the stage begins
            plain["steps"] = self.until.max_steps
        return plain

    def place(self, step: int) -> dict[str, Any]:
        """What every record of optimizer step ``step`` states: how far the run is then, earlier stages included."""
        tokens = self.batches.tokens(step)
        return {
            "stage": self.name,
            "step": step,
            "position": self.position(step),
            "tokens": self.start_tokens + tokens,
            "flops": self.start_flops + self.flops_after(step),
        }

    def mask_value(self, step: int) -> float:
        """The mask c in optimizer step ``step``: linear from 0 before the first step to 1 at the end of the ramp."""
        assert self.mask is not None
        return min(1.0, step / self.reached(self.mask.ramp))

    def every(self, duration: Duration) -> int:
        """An interval of the recipe in this stage's steps after the batch's warm-up, at least 1."""
        return max(1, duration.steps(self.train.global_batch_tokens))

    def reached(self, duration: Duration) -> int:
        """The step of this stage at which ``duration`` has passed since its start, at least 1."""
        if duration.unit == "steps":
            return max(1, duration.amount)
        return max(1, self.batches.nearest(duration.amount))

    def learning_rate(self, step: int) -> float:
        """The rate of optimizer step ``step`` (1 to ``steps``), as torchtitan 0.2.2's scheduler has it."""
        if not 1 <= step <= self.steps:
            raise ValueError(
                f"step {step} is not in {self.name}, which has steps 1 to {self.steps}"
            )
        return self.rate_at(step)

    def rate_at(self, step: int) -> float:
        """The same, for steps beyond the last too: the checkpoint of a step holds the rate of the next."""
        if self.schedule:
            return self._scheduled(step + self.schedule.steps) * self.schedule.factor(
                step
            )
        return self._scheduled(step)

    def new_learning_rate(self, step: int) -> float:
        """The rate of new parameters in optimizer step ``step`` (SPARKLING, eq. 28): from the schedule's at the growth
        to ratio times that in ``rewarm_steps``, then by a cosine to the schedule's end."""
        assert self.new_rate
        assert self.schedule
        rewarm = self.new_rate.rewarm
        at_growth = self._scheduled(self.schedule.steps + 1)
        peak = rewarm.ratio * at_growth
        steps_since = step - 1
        if steps_since < rewarm.rewarm_steps:
            risen = steps_since / rewarm.rewarm_steps
            return at_growth + (peak - at_growth) * risen

        decay_steps = self.horizon_steps - self.schedule.steps - rewarm.rewarm_steps
        progress = (steps_since - rewarm.rewarm_steps) / decay_steps
        floor = self.train.min_learning_rate
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    def _scheduled(self, step: int) -> float:
        """The rate of the schedule's own step ``step``, from 1."""
        peak = self.train.learning_rate
        floor = self.train.min_learning_rate / peak
        if step <= self.warmup_steps:
            return peak * (step / self.warmup_steps)

        decay_steps = self.horizon_steps - self.warmup_steps
        if self.train.schedule == "wsd":
            decay_steps = min(
                decay_steps, round(self.horizon_steps * self.train.decay_fraction)
            )
        # The horizon ends one step after the last, so that the last step's rate is not zero.
        steps_in_decay = step - 1 - (self.horizon_steps - decay_steps)
        if decay_steps == 0 or steps_in_decay <= 0:
            return peak

        progress = steps_in_decay / decay_steps
        if self.train.schedule == "cosine":
            left = 0.5 * (1 + math.cos(math.pi * progress))
        else:
            left = 1 - progress
        return peak * (floor + (1 - floor) * left)


def _without_plain(identity: dict[str, Any], **plain: object) -> dict[str, Any]:
    """``identity`` without the keys that have their ``plain`` value: as it was before there were such keys."""
    return {
        name: value
        for name, value in identity.items()
        if name not in plain or value != plain[name]
    }


@dataclass(frozen=True)
class LearnStage(TrainStage):
    """Trains LiGO's maps from ``source``, whose weights are frozen, to ``model`` (growth/learned.py)."""

    kind: str = "learn"
    source: Model = field(kw_only=True)
    seed: int = field(kw_only=True)  # the recipe's, made different for every growth
    maps: str = field(default="paper", kw_only=True)

    learns_maps: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"stage-{self.index}-learn-{self.model.n_layers}L"

    @property
    def flops_per_token(self) -> float:
        """6 N of the target, and making its weights and their gradients once per step; done again for every further
        micro-batch and rank, which is not counted, as recomputed activations are not."""
        making = learned_shapes.mapping_flops(self.source, self.model, self.maps)
        return super().flops_per_token + making / self.train.global_batch_tokens

    def checkpoint_tensors(self) -> dict[str, tuple[int, ...]]:
        shapes = learned_shapes.shapes(self.source, self.model, self.maps)
        tensors: dict[str, tuple[int, ...]] = {}
        for stored, (part, name) in learned_shapes.matrix_names(shapes).items():
            tensors[stored] = shapes[part][name]
        return tensors

    def identity(self) -> dict[str, Any]:
        return _without_plain(super().identity(), maps="paper")

    @property
    def made_parameters(self) -> int:
        """The source's weights, the target's and their gradients (titan/ligo.py)."""
        return self.source.parameters() + 2 * self.model.parameters()

    @property
    def checkpoint_bytes(self) -> int:
        return CHECKPOINT_BYTES * learned_shapes.parameters(
            self.source, self.model, self.maps
        )


@dataclass(frozen=True)
class GrowStage:
    """Converts the checkpoint of ``source`` into one of ``target``; trains nothing."""

    index: int
    source: Model
    target: Model
    operator: str
    layer_map: tuple[int, ...] | None  # None: the depth stays
    noise: float
    seed: int  # the recipe's, made different for every growth
    ramp: Duration | None = None
    optimizer: str | None = (
        None  # "copy" or "asymmetric"; None: its state is left behind
    )
    kind: str = "grow"
    norm: str = "scaled"
    maps: str = "paper"
    shares: str = "drawn"
    shrink_factor: float | None = None
    perturbation: float | None = None

    trains: ClassVar[bool] = False
    learns_maps: ClassVar[bool] = False
    imports: ClassVar[bool] = False
    finds: ClassVar[type[int] | type[str] | None] = None

    @property
    def name(self) -> str:
        return f"stage-{self.index}-grow"

    @property
    def folds_maps(self) -> bool:
        return operator_named(self.operator).learned

    @property
    def links(self) -> bool:
        """Whether its checkpoint is hard links to the source's bytes."""
        return operator_named(self.operator).links and not self.noise

    @property
    def output_model(self) -> Model:
        return self.target

    @property
    def output_step(self) -> int | None:
        return None

    def checkpoint_tensors(self) -> dict[str, tuple[int, ...]]:
        return dict(self.target.tensors())

    def identity(self) -> dict[str, Any]:
        return _without_plain(
            to_dict(self), norm="scaled", maps="paper", shares="drawn"
        )

    @property
    def mask(self) -> GrowthMask | None:
        """The mask of the stage that trains the grown model."""
        return GrowthMask(self.source, self.layer_map, self.ramp) if self.ramp else None

    @property
    def change(self) -> str:
        """``2 -> 8 layers, dim 64 -> 128``."""
        names = ("dim", "n_heads", "n_kv_heads", "ffn_dim")
        pairs = [
            (name, getattr(self.source, name), getattr(self.target, name))
            for name in names
        ]
        widths = [
            f", {name} {before} -> {after}"
            for name, before, after in pairs
            if before != after
        ]
        return f"{self.source.n_layers} -> {self.target.n_layers} layers" + "".join(
            widths
        )


@dataclass(frozen=True)
class ImportStage(GrowStage):
    """Takes over a base model from elsewhere: a growth that changes nothing, of a checkpoint outside of the run."""

    folder: str = field(kw_only=True)
    position: int = field(kw_only=True)  # sequences of the data that it has consumed
    kind: str = "import"

    imports: ClassVar[bool] = True
    finds: ClassVar[type[int] | type[str] | None] = str  # a hash of the weights

    @property
    def folds_maps(self) -> bool:
        return False

    @property
    def links(self) -> bool:
        return False  # what is taken over from Hugging Face is written anew

    @property
    def name(self) -> str:
        return f"stage-{self.index}-import-{self.source.n_layers}L"

    @property
    def change(self) -> str:
        return f"{self.source.n_layers} layers from {self.folder}"


# Callers ask a stage what it does, not of which class it is:
#
#   trains              whether it makes optimizer steps
#   learns_maps         whether they train LiGO's maps: its checkpoint holds no model
#   folds_maps          whether it makes weights by the maps that the stage before it learned
#   imports             whether it takes over weights from outside of the run
#   finds               the type of what it may find out as it runs (run_folder/found.py); None: nothing
#   output_model        the model that its checkpoint holds, or that its maps lead to
#   output_step         the step of its last checkpoint; None: it has one checkpoint and no steps
#   checkpoint_tensors  names and shapes of its checkpoint's tensors, without optimizer state
#   identity            the values that define what it computes, of which its hash is made; keys marked free left out
#
# isinstance is left to those who go on with fields that one kind alone has.
Stage = TrainStage | GrowStage


@dataclass(frozen=True)
class Plan:
    """What a recipe does, step for step. ``notes`` are for the reader: nothing in them stops a run. ``found``: what
    stages have found out as they ran, by their names; see found.py."""

    recipe: Recipe
    stages: tuple[Stage, ...]
    notes: tuple[str, ...]
    found: dict[str, int | str] = field(default_factory=dict)

    @property
    def train_stages(self) -> list[TrainStage]:
        return [s for s in self.stages if isinstance(s, TrainStage)]

    @property
    def grow_stages(self) -> list[GrowStage]:
        """The growths, and the import of a base model if there is one."""
        return [s for s in self.stages if isinstance(s, GrowStage)]

    @property
    def growths(self) -> list[GrowStage]:
        return [s for s in self.grow_stages if not s.imports]

    @property
    def own_stages(self) -> list[Stage]:
        """Those whose result the run makes itself."""
        return [s for s in self.stages if not s.imports]

    @property
    def tokens(self) -> int:
        return sum(s.tokens for s in self.train_stages)

    @property
    def sequences(self) -> int:
        return sum(s.position(s.steps) - s.start_sequences for s in self.train_stages)

    @property
    def flops(self) -> float:
        return sum(s.flops for s in self.train_stages)

    @property
    def paper_flops(self) -> float:
        return sum(s.paper_flops for s in self.train_stages)

    @property
    def base_share(self) -> float:
        """The part of all FLOPs that is spent before the last stage."""
        return 1 - self.train_stages[-1].flops / self.flops

    def inputs(self, stage: Stage) -> tuple[Stage | None, Stage | None]:
        """The stage whose checkpoint ``stage`` starts from (None: random weights), and the one that trained the maps
        which a growth folds in whose operator is learned."""
        before = self.stages[stage.index - 1] if stage.index else None
        if stage.folds_maps:
            return self.stages[stage.index - 2], before
        return before, None

    def stage_hashes(self, data_hash: str) -> dict[str, str]:
        """Stage name -> SHA-256 of all that defines its result: itself, the seed, the data and its ancestors.

        Keys marked free in the recipe (ranks, paths, logging) are left out: they may change on resume.
        """
        hashes: dict[str, str] = {}
        parent = canonical_hash({"seed": self.recipe.seed, "data": data_hash})
        for stage in self.stages:
            parent = hashes[stage.name] = canonical_hash(
                {"parent": parent, "stage": stage.identity()}
            )
            if stage.name in self.found:
                parent = canonical_hash(
                    {"parent": parent, "found": self.found[stage.name]}
                )
        return hashes
