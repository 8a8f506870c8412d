"""What a growth operator is: for every target tensor, the rule that makes it from source tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:  # plans are made from layer maps without loading torch
    import torch

Shape: TypeAlias = tuple[int, ...]


class GrowthError(ValueError):
    """A growth that is not defined: the layer map, the geometries or the tensor names do not fit together."""


@dataclass(frozen=True)
class Alias:
    """The target tensor is the source tensor, bit for bit; on disk no weight byte moves."""

    source: str

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)


@dataclass(frozen=True)
class Compute:
    """The target tensor is ``fn(*sources)``, in the sources' dtype.

    ``fn`` gets whole CPU tensors, which it may overwrite, and must not depend on rank or call order: each
    Compute runs once, on any rank. ``note`` tells growth.json what ``fn`` does.
    """

    sources: tuple[str, ...]
    fn: Callable[..., torch.Tensor]
    note: str


@dataclass(frozen=True)
class Zeros:
    """The target tensor is zero, in the dtype of the source tensor ``like``; on disk, all of one shape are one."""

    like: str

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.like,)


Rule: TypeAlias = Alias | Compute | Zeros


@dataclass(frozen=True)
class Moment:
    """Asks an operator for the rules of an AdamW moment instead of the weights': the same map, each of whose
    coefficients is raised to ``power``, without what does not depend on the source. ``asymmetric``: zero for every
    entry that copies what an entry before it copies too. See moments.py."""

    power: int  # 1: exp_avg; 2: exp_avg_sq
    asymmetric: bool = False


@dataclass(frozen=True)
class Rules:
    """One whole growth: a rule for every target tensor, and every source tensor used or named in ``dropped``.

    The shapes are those of ``Model.tensors()``. Raises GrowthError, naming the tensors, when a key is
    unaccounted for in either direction or an Alias would change a shape.
    """

    targets: Mapping[str, Rule]
    source_shapes: Mapping[str, Shape]
    target_shapes: Mapping[str, Shape]
    dropped: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        made, source, target = set(self.targets), set(self.source_shapes), set(self.target_shapes)
        used = {name for rule in self.targets.values() for name in rule.sources}
        problems = [
            *_named("no rule makes these target tensors", target - made),
            *_named("the target model has no such tensors", made - target),
            *_named("the source model has no such tensors", (used | self.dropped) - source),
            *_named("these source tensors are neither used nor dropped", source - used - self.dropped),
            *_named("these source tensors are dropped, yet used", used & self.dropped),
            *_named("an Alias keeps the shape; use Compute for", self._reshaped()),
        ]
        if problems:
            raise GrowthError("; ".join(problems))

    def _reshaped(self) -> list[str]:
        pairs = [(t, r.source) for t, r in self.targets.items() if isinstance(r, Alias)]
        shapes = [(t, self.target_shapes.get(t), s, self.source_shapes.get(s)) for t, s in pairs]
        return [f"{t} {want} from {s} {have}" for t, want, s, have in shapes if want and have and want != have]


def _named(what: str, names: Iterable[str], most: int = 8) -> list[str]:
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return [f"{what}: {', '.join(names[:most])}{more}"] if names else []
