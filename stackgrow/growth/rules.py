"""What a growth operator is: for every target tensor, the rule that makes it from source tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:  # plans are made from layer maps without loading torch
    import torch

Shape: TypeAlias = tuple[int, ...]
SHOWN = 8  # of the names in one error message


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
        made = set(self.targets)
        source = set(self.source_shapes)
        target = set(self.target_shapes)
        used: set[str] = set()
        for rule in self.targets.values():
            used.update(rule.sources)
        problems = [
            *_listed("no rule makes these target tensors", target - made),
            *_listed("the target model has no such tensors", made - target),
            *_listed(
                "the source model has no such tensors", (used | self.dropped) - source
            ),
            *_listed(
                "these source tensors are neither used nor dropped",
                source - used - self.dropped,
            ),
            *_listed("these source tensors are dropped, yet used", used & self.dropped),
            *_listed(
                "an Alias keeps the shape; use Compute for", self._reshaped_aliases()
            ),
        ]
        if problems:
            raise GrowthError("; ".join(problems))

    def _reshaped_aliases(self) -> Iterator[str]:
        for name, rule in self.targets.items():
            if not isinstance(rule, Alias):
                continue
            before = self.source_shapes.get(rule.source)
            after = self.target_shapes.get(name)
            if before and after and before != after:
                yield f"{name} {after} from {rule.source} {before}"


def _listed(problem: str, names: Iterable[str]) -> list[str]:
    """One line that says the problem and names the first few; nothing where there are none."""
    names = sorted(names)
    if not names:
        return []
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"{problem}: {', '.join(names[:SHOWN])}{more}"]
