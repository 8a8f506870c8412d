"""G_zero and G_random: the source's parameters beside new ones, which at first leave the function as it was.

Zero weights keep the new outputs of G_zero at zero. Those of G_random are masked by c, which training raises from 0
to 1: ``new_outputs`` and ``new_layers`` say what to mask; the mask itself belongs to the training stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from stackgrow.growth.depth import depth_rules
from stackgrow.growth.draw import draw, generator
from stackgrow.growth.rules import (
    Alias,
    Compute,
    GrowthError,
    Moment,
    Rule,
    Rules,
    Zeros,
)
from stackgrow.growth.width import (
    AXES,
    check_widths,
    head_channels,
    kept_channels,
    kind,
    repeats,
    times,
)
from stackgrow.recipe.keys import Model

if TYPE_CHECKING:  # a plan checks a growth by its rules, and needs no torch for that
    from torch import Tensor

BLOCK_OUTPUTS = ("attention.wo.weight", "feed_forward.w2.weight")


def zero_width_rules(
    source: Model,
    target: Model,
    seed: int,
    moment: Moment | None = None,
    grown: Model | None = None,
) -> Rules:
    """G_zero (eqs. 12-19): E' = [E, 0], W' = [[W, A], [0, C]], mu' = [alpha mu, 1]; see ``Padding``. The official code
    (tongxuluo/prts, zero.py) has [mu, 0] instead, behind which the new channels of the stream never learn.

    ``grown`` is the model that the whole growth makes, whose layer count the initialization depends on: the target
    itself, where only widths grow.
    """
    return Padding(
        source, target, grown or target, seed, zero=True, moment=moment
    ).rules()


def random_width_rules(
    source: Model,
    target: Model,
    seed: int,
    moment: Moment | None = None,
    grown: Model | None = None,
) -> Rules:
    """G_random (eqs. 20-33): E' = [E, random], W' = [[W, A], [B, C]], mu' = [alpha mu, 1]; see ``Padding``, and
    ``zero_width_rules`` for ``grown``. GrowthError where the embedding is the head, too."""
    if source.tie_embeddings:
        raise GrowthError(
            '"random" does not widen a model with tie_embeddings: the mask covers new channels of the embedding, and '
            'not those of the head, which are the same numbers; use "zero" or "split"'
        )
    return Padding(
        source, target, grown or target, seed, zero=False, moment=moment
    ).rules()


def new_outputs(source: Model, target: Model) -> dict[str, Tensor]:
    """Eqs. 21 and 27: for each embedding and linear whose output has new channels, True at those, which training
    multiplies by c. The head has none: its outputs are the vocabulary."""
    import torch

    kept = kept_channels(source, target)
    masks = {}
    for name, shape in target.tensors().items():
        if len(shape) != 2:
            continue
        outputs = (
            1 if name == "tok_embeddings.weight" else 0
        )  # the dimension that holds them
        is_new = torch.ones(shape[outputs], dtype=torch.bool)
        is_new[kept[AXES[kind(name)][outputs]]] = False
        if is_new.any():
            masks[name] = is_new
    return masks


def zero_depth_rules(layer_map: Sequence[int], source: Model, target: Model) -> Rules:
    """G_zero depthwise (A.4): target layer i copies source layer ``layer_map[i]``, and a layer of ``new_layers``
    adds nothing to the residual stream, its attention.wo and feed_forward.w2 being zero. The official code
    (tongxuluo/prts) repeats layers in place, 0 0 0 0 1 1 1 1, as LEMON does."""
    return _with_new_layers(
        layer_map, source, target, BLOCK_OUTPUTS, lambda name, like: Zeros(like)
    )


def random_depth_rules(
    layer_map: Sequence[int],
    source: Model,
    target: Model,
    seed: int,
    moment: Moment | None = None,
) -> Rules:
    """G_random depthwise (eqs. 34-36): the layers of ``new_layers`` are drawn like the initialization, and training
    masks what their attention and SwiGLU add to the residual stream; the others are copies."""

    def drawn(name: str, like: str) -> Rule:
        def fn(
            replaced: Tensor,
        ) -> Tensor:  # in the dtype of the layer that it replaces
            shape = tuple(replaced.shape)
            return draw(name, shape, target, generator(seed, "new", name)).to(
                replaced.dtype
            )

        if moment:
            return Zeros(like)
        return Compute((like,), fn, "random instead of")

    return _with_new_layers(
        layer_map, source, target, tuple(source.layer_tensors()), drawn
    )


def new_layers(layer_map: Sequence[int], n_source: int) -> list[int]:
    """The target layers that are new: all but the first copy of each source layer. GrowthError unless those first
    copies are all the source layers in their order, without which no choice of new layers preserves the function."""
    new = []
    kept_sources: list[int] = []
    for i, layer in enumerate(layer_map):
        if layer in kept_sources:
            new.append(i)
        else:
            kept_sources.append(layer)
    if kept_sources != list(range(n_source)):
        raise GrowthError(
            f"layer map {list(layer_map)}: without repetitions it must name the source layers 0 to {n_source - 1} in "
            f"order, for the function to be preserved; it names {kept_sources}"
        )
    return new


def _with_new_layers(
    layer_map: Sequence[int],
    source: Model,
    target: Model,
    tensors: Sequence[str],
    make: Callable[[str, str], Rule],
) -> Rules:
    """The copies of ``depth_rules``, but those ``tensors`` of each new layer as ``make(name, replaced)`` has them."""
    rules = depth_rules(layer_map, source, target)
    targets = dict(rules.targets)
    for layer in new_layers(layer_map, source.n_layers):
        for tensor in tensors:
            name = f"layers.{layer}.{tensor}"
            targets[name] = make(name, targets[name].sources[0])
    return replace(rules, targets=targets)


@dataclass(frozen=True)
class Padding:
    """The widthwise growth of G_zero and G_random: the source's parameters beside new ones.

    A, B, C are drawn like the initialization, alpha = sqrt(d)/sqrt(D), and a norm's new entries are 1, as initially.

    head_dim may grow by a whole factor n: pair p becomes pair n p, whose frequency in the wider head is the same,
    and W_Q is multiplied by sqrt(n), because scores are divided by sqrt(head_dim). A new query head that shares an
    old key/value head would pass on the mean of its values: the columns of wo that read it start at zero.

    The paper's RMSNorm has no epsilon; with one, [x, 0] meets eps D / d. The function is preserved exactly where
    target.norm_eps = source.norm_eps d / D, and otherwise as far as mean(x^2) exceeds eps.
    """

    source: Model
    target: Model
    grown: Model
    seed: int
    zero: bool  # whether new outputs read nothing that was there before: G_zero
    moment: Moment | None

    def rules(self) -> Rules:
        """Raises GrowthError where the growth is not defined."""
        check_widths(self.source, self.target)
        self._check_norm_eps()
        kept = kept_channels(self.source, self.target)
        have, want = self.source.tensors(), self.target.tensors()
        note = f"pad, {'zero' if self.zero or self.moment else 'random'}"
        targets: dict[str, Rule] = {}
        for name, shape in want.items():
            places = [kept[axis] for axis in AXES[kind(name)]]
            if have[name] == shape:
                targets[name] = Alias(name)
            elif len(shape) == 1:
                targets[name] = Compute(
                    (name,), self._padded_vector(name, places[0]), note
                )
            else:
                targets[name] = Compute(
                    (name,), self._padded_matrix(name, places[0], places[1]), note
                )
        return Rules(targets, have, want)

    def _check_norm_eps(self) -> None:
        kept, given = self.source.norm_eps, self.target.norm_eps
        exact = kept * self.source.dim / self.target.dim
        if given != kept and not math.isclose(given, exact, rel_tol=1e-6):
            raise GrowthError(
                f"norm_eps {kept:g} -> {given:g}: keep it, as the paper does, or preserve the "
                f"function exactly with {exact:g} (source norm_eps * {self.source.dim} / {self.target.dim})"
            )

    def _padded_vector(
        self, name: str, places: list[int]
    ) -> Callable[[Tensor], Tensor]:
        """A norm as [alpha mu, 1], a bias as [b, 0]; ``places`` are those of the source's entries in the target."""
        factor = math.sqrt(self.source.dim) / math.sqrt(self.target.dim)
        if name.endswith(".bias"):
            is_query = kind(name) == "attention.wq.bias"
            factor = math.sqrt(self._head_factor) if is_query else 1.0
        factor **= self._power

        def fn(vector: Tensor) -> Tensor:
            wide = self._new(name, vector)
            wide[places] = times(vector, factor)
            return wide

        return fn

    def _padded_matrix(
        self, name: str, row_places: list[int], column_places: list[int]
    ) -> Callable[[Tensor], Tensor]:
        """[[W, A], [B, C]]; the places are those of the source's rows and columns in the target."""
        tensor = kind(name)

        def fn(weight: Tensor) -> Tensor:
            import torch

            wide = self._new(name, weight)
            rows = torch.tensor(row_places)
            columns = torch.tensor(column_places)

            # G_zero: new outputs do not read old channels, and the embedding's are zero.
            if self.zero and tensor == "tok_embeddings":
                wide[:] = 0
            elif self.zero:
                wide[:, columns] = 0

            # What heads need: see the class.
            if tensor == "attention.wo":
                wide[:, self._sharing_channels()] = 0
            if tensor == "attention.wq" and self._head_factor > 1:
                factor = math.sqrt(self._head_factor) ** self._power
                weight = times(weight, factor)

            # The source in its places.
            wide[rows[:, None], columns] = weight
            return wide

        return fn

    @property
    def _head_factor(self) -> int:
        return self.target.head_dim // self.source.head_dim

    @property
    def _power(self) -> int:
        return self.moment.power if self.moment else 1

    def _new(self, name: str, like: Tensor) -> Tensor:
        """The whole target tensor as it is where it is new: drawn, or, of a moment, zero."""
        shape = self.target.tensors()[name]
        if self.moment:
            return like.new_zeros(shape)
        return draw(name, shape, self.grown, generator(self.seed, "new", name)).to(
            like.dtype
        )

    def _sharing_channels(self) -> list[int]:
        """The channels of new query heads that share an old key/value head."""
        r, R = repeats(self.source), repeats(self.target)
        heads = []
        for group in range(self.source.kv_heads):
            for t in range(r, R):
                heads.append(group * R + t)
        return head_channels(heads, range(self.target.head_dim), self.target.head_dim)
