"""What a checkpoint holds beside tensors, pickled once for each value that is different.

torchtitan saves an optimizer's rate, betas, eps and so on, a dozen values, beside each parameter: for 32 layers some
3,500 pickles, each in a zip archive of its own, of a dozen different values. dcp.py unpickles them once each, too.
"""

from __future__ import annotations

import io
from typing import Any

from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType


class OnceEachPlanner(DefaultSavePlanner):
    """DCP's save planner, which pickles equal plain values once. The files are the same to the byte."""

    def __init__(self) -> None:
        super().__init__()
        self._pickled: dict[tuple[type, str], bytes] = {}

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        if write_item.type != WriteItemType.BYTE_IO or not is_plain(object):
            return super().transform_object(write_item, object)
        key = type(object), repr(object)
        if key not in self._pickled:
            pickled = super().transform_object(write_item, object)
            self._pickled[key] = pickled.getvalue()
        return io.BytesIO(self._pickled[key])


def is_plain(value: Any) -> bool:
    """Whether a value is told from every other by its type and its repr."""
    if isinstance(value, tuple):
        return all(is_plain(entry) for entry in value)
    return value is None or type(value) in (bool, int, float, str)
