"""A recipe taken apart: its growths as hops between two models, its stages before their steps are known. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from stackgrow.recipe import Growth, Model, Recipe, Train


@dataclass(frozen=True)
class Hop:
    """One growth, resolved: the models on both sides and the layer map between them."""

    growth: Growth
    where: str
    source: Model
    target: Model
    layer_map: tuple[int, ...] | None


@dataclass(frozen=True)
class Part:
    """A train stage before its steps are known: its model, [train] with its own keys, its growth, which it comes
    before; or which it ``learns``."""

    model: Model
    train: Train
    table: str
    own: Collection[str]
    hop: Hop | None
    learns: bool = False

    def where(self, key: str) -> str:
        """The TOML path that this stage's value of ``key`` comes from."""
        return f"{self.table}.{key}" if key in self.own else f"train.{key}"


def parts_of(recipe: Recipe, hops: Sequence[Hop]) -> list[Part]:
    models = [hops[0].source if hops else recipe.model, *(hop.target for hop in hops)]
    own = [recipe.base.train if recipe.base else {}, *(hop.growth.train for hop in hops)]
    tables = ["base.train", *(f"{hop.where}.train" for hop in hops)]
    parts = []
    for model, keys, table, hop in zip(models, own, tables, [*hops, None], strict=True):
        parts.append(Part(model, dataclasses.replace(recipe.train, **keys), table, keys, hop))
        if hop and hop.growth.operator == "learn":
            train = dataclasses.replace(recipe.train, **hop.growth.learn)
            parts.append(Part(hop.target, train, f"{hop.where}.learn", hop.growth.learn, hop, learns=True))
    return parts


def resized(model: Model, widths: dict[str, Any], n_layers: int) -> Model:
    """``model`` with other widths and depth; key/value heads follow the heads where there are as many."""
    if "n_heads" in widths and model.n_kv_heads == model.n_heads:
        widths = {"n_kv_heads": widths["n_heads"], **widths}
    return dataclasses.replace(model, n_layers=n_layers, **widths)
