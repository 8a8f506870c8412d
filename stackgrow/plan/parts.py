"""A recipe taken apart: its growths as hops between two models, its stages before their steps are known. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stackgrow.growth.operators import Operator, operator_named
from stackgrow.plan import guidelines
from stackgrow.recipe.keys import Growth, Model, Parallel, Recipe, Train
from stackgrow.recipe.values import Duration


@dataclass(frozen=True)
class Hop:
    """One growth, resolved: the models on both sides and the layer map between them."""

    growth: Growth
    where: str  # its TOML path: "growth[0]"
    source: Model
    target: Model
    layer_map: tuple[int, ...] | None

    @property
    def operator(self) -> Operator:
        return operator_named(self.growth.operator)

    @property
    def widens(self) -> bool:
        return (
            dataclasses.replace(self.source, n_layers=self.target.n_layers)
            != self.target
        )


@dataclass(frozen=True)
class Part:
    """A train stage before its steps are known."""

    model: Model
    train: Train  # [train] with the stage's own keys
    table: str  # the TOML path of those: "base.train"
    own: Collection[str]  # which keys of [train] they are
    parallel: Parallel
    parallel_paths: Mapping[
        str, str
    ]  # the TOML paths of the keys of [parallel] that are the stage's own
    hop: Hop | None  # the growth that it comes before; None: the last stage
    learns: bool = False  # it trains the maps of that growth
    masking: Hop | None = None  # the growth before it, whose mask it raises

    @property
    def at_work(self) -> Hop | None:
        """The growth whose operator is at work while this stage trains: it learns its maps, or raises its mask."""
        return self.hop if self.learns else self.masking

    @property
    def trained(self) -> bool:
        """Not where an imported base grows at once."""
        at_once = self.hop is not None and self.hop.growth.timing == "start"
        return self.learns or not at_once

    @property
    def then_grows(self) -> Hop | None:
        """The growth that follows at once: where its maps are learned, it does so after the stage that learns them."""
        if self.hop and self.hop.operator.learned and not self.learns:
            return None
        return self.hop

    def path(self, key: str) -> str:
        """The TOML path that this stage's value of ``key`` of [train] comes from."""
        return f"{self.table}.{key}" if key in self.own else f"train.{key}"

    def parallel_path(self, key: str) -> str:
        """The TOML path of its value of ``key`` of [parallel]."""
        return self.parallel_paths.get(key, f"parallel.{key}")

    def beside(self, table: str) -> str:
        """The TOML path of what stands beside its keys of [train]: "base.model"."""
        return self.table.replace(".train", f".{table}")


def parts_of(recipe: Recipe, hops: Sequence[Hop]) -> list[Part]:
    """The train stages in order: the base's, and one after every growth; before a growth that is learned, another."""
    parts = []
    before: Hop | None = None  # the growth that leads to this stage
    for hop in [*hops, None]:
        part = _part_between(recipe, before, hop)
        parts.append(part)
        if hop and hop.operator.learned:
            parts.append(_learning_part(recipe, part, hop))
        before = hop
    return parts


def _part_between(recipe: Recipe, before: Hop | None, hop: Hop | None) -> Part:
    """The train stage after growth ``before`` (None: the base's), up to growth ``hop`` (None: the end)."""
    if before:
        model = before.target
    else:
        model = hop.source if hop else recipe.model
    name = before.where if before else "base"
    table = before.growth if before else recipe.base
    masking = before if before and before.operator.masked else None
    own_train = table.train if table else {}
    own_parallel = table.parallel if table else {}
    return Part(
        model=model,
        train=dataclasses.replace(recipe.train, **own_train),
        table=f"{name}.train",
        own=own_train,
        parallel=dataclasses.replace(recipe.parallel, **own_parallel),
        parallel_paths={key: f"{name}.parallel.{key}" for key in own_parallel},
        hop=hop,
        masking=masking,
    )


def _learning_part(recipe: Recipe, before: Part, hop: Hop) -> Part:
    """The stage that learns the maps of ``hop``, on the layout of the stage before it."""
    own = {**_author_settings(hop.growth), **hop.growth.learn}
    return Part(
        model=hop.target,
        train=dataclasses.replace(recipe.train, **own),
        table=f"{hop.where}.learn",
        own=own,
        parallel=before.parallel,
        parallel_paths=before.parallel_paths,
        hop=hop,
        learns=True,
    )


def _author_settings(growth: Growth) -> dict[str, Any]:
    """How LiGO's maps are trained unless the recipe says otherwise: as its author did for the paper (tongxuluo/prts,
    issue 2: rate 7e-5 to 7e-6 in 100 steps, 50 of them warm-up, weight decay 0.1), all with the full batch."""
    length = growth.learn_steps or Duration(
        0, "steps"
    )  # where it is missing, the plan says so
    return {
        "batch_warmup": (),
        "learning_rate": 7e-5,
        "min_learning_rate": 7e-6,
        "warmup": Duration(length.amount // 2, length.unit),
        "horizon": "stage",
        "weight_decay": 0.1,
    }


def factor_of(growth: Growth) -> int | None:
    """The growth factor g, where one is given."""
    if isinstance(growth.factor, str):  # "auto"
        return guidelines.GROWTH_FACTOR
    return growth.factor


def resized(model: Model, widths: dict[str, Any], n_layers: int) -> Model:
    """``model`` with other widths and depth; key/value heads follow the heads where there are as many."""
    if "n_heads" in widths and model.n_kv_heads == model.n_heads:
        widths = {"n_kv_heads": widths["n_heads"], **widths}
    return dataclasses.replace(model, n_layers=n_layers, **widths)
