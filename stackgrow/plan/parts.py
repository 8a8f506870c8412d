"""A recipe taken apart: its growths as hops between two models, its stages before their steps are known. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stackgrow.growth.operators import Operator, operator_named
from stackgrow.plan import guidelines
from stackgrow.recipe.keys import Growth, Model, Parallel, Recipe, Train


@dataclass(frozen=True)
class Hop:
    """One growth, resolved: the models on both sides and the layer map between them."""

    growth: Growth
    where: str
    source: Model
    target: Model
    layer_map: tuple[int, ...] | None

    @property
    def operator(self) -> Operator:
        return operator_named(self.growth.operator)

    @property
    def widens(self) -> bool:
        return dataclasses.replace(self.source, n_layers=self.target.n_layers) != self.target


@dataclass(frozen=True)
class Part:
    """A train stage before its steps are known: its model, [train] and [parallel] with its own keys, its growth, which
    it comes before; or which it ``learns``."""

    model: Model
    train: Train
    table: str
    own: Collection[str]
    parallel: Parallel
    places: Mapping[str, str]  # the TOML paths of the keys of [parallel] that are its own
    hop: Hop | None
    learns: bool = False
    masking: Hop | None = None  # the growth before it, whose mask it raises

    @property
    def at_work(self) -> Hop | None:
        """The growth whose operator is at work while this stage trains: it learns its maps, or raises its mask."""
        return self.hop if self.learns else self.masking

    @property
    def trained(self) -> bool:
        """Not where an imported base grows at once."""
        return self.learns or not (self.hop and self.hop.growth.timing == "start")

    def where(self, key: str) -> str:
        """The TOML path that this stage's value of ``key`` comes from."""
        return f"{self.table}.{key}" if key in self.own else f"train.{key}"

    def place(self, key: str) -> str:
        """The TOML path of a key of [parallel]."""
        return self.places.get(key, f"parallel.{key}")


def parts_of(recipe: Recipe, hops: Sequence[Hop]) -> list[Part]:
    """The train stages in order: the base's, and one after every growth; before a growth that is learned, another."""
    parts = []
    before: Hop | None = None  # the growth that leads to this stage
    for hop in [*hops, None]:
        if before:
            model, name = before.target, before.where
        else:
            model, name = hops[0].source if hops else recipe.model, "base"
        table = before.growth if before else recipe.base
        own = table.train if table else {}
        layout = table.parallel if table else {}
        parallel = dataclasses.replace(recipe.parallel, **layout)
        places = {key: f"{name}.parallel.{key}" for key in layout}
        train = dataclasses.replace(recipe.train, **own)
        masking = before if before and before.operator.masked else None
        parts.append(Part(model, train, f"{name}.train", own, parallel, places, hop, masking=masking))
        if hop and hop.operator.learned:
            own = {"batch_warmup": (), **hop.growth.learn}  # a few steps, all of the full batch
            train = dataclasses.replace(recipe.train, **own)
            parts.append(Part(hop.target, train, f"{hop.where}.learn", own, parallel, places, hop, learns=True))
        before = hop
    return parts


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
