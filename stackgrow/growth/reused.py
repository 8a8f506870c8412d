"""Memory for the results of a growth. To be given new memory takes longer than to make what it will hold."""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a plan checks a growth by its rules, and needs neither for that
    import numpy as np
    import torch


class Reused:
    """Lends memory, and lends it again for another tensor of that size when nobody has the first any more."""

    def __init__(self) -> None:
        self.lent: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Like torch.empty, on the CPU."""
        import numpy as np
        import torch

        size = math.prod(shape) * dtype.itemsize
        free = [memory for memory, borrowed in self.lent if borrowed() is None and memory.nbytes == size]
        memory = free[0] if free else np.empty(size, np.uint8)
        view = memory[:]  # lives as long as any tensor on it
        in_use = [(other, borrowed) for other, borrowed in self.lent if borrowed() is not None]
        self.lent = [*in_use, (memory, weakref.ref(view))]
        return torch.from_numpy(view).view(dtype).view(shape)
