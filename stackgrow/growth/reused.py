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
        memory = None
        still_lent = []
        for block, borrower in self.lent:
            if borrower() is not None:
                still_lent.append((block, borrower))
            elif memory is None and block.nbytes == size:
                memory = block
        if memory is None:
            memory = np.empty(size, np.uint8)
        view = memory[:]  # lives as long as any tensor on it
        self.lent = [*still_lent, (memory, weakref.ref(view))]
        return torch.from_numpy(view).view(dtype).view(shape)
