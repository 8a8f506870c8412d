"""The numbers in a run's records, or a message that says which one is none: a stranger's file may hold anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stackgrow.errors import DamagedError
from stackgrow.run_folder.lines import iter_records

LARGEST = 1e100  # whatever is counted or measured; sums of squares stay finite


def read_columns(file: Path, names: Sequence[str]) -> np.ndarray:
    """Values of all records that have all of ``names``, [names, records]; what is NaN or infinite is left out.

    Raises:
        DamagedError: a record is none, or a value is no number.
    """
    rows = []
    for number, record in enumerate(iter_records(file), start=1):
        if all(name in record for name in names):
            row = [_number(record[name], name, f"{file}:{number}") for name in names]
            if all(math.isfinite(value) for value in row):
                rows.append(row)
    return np.array(rows, dtype=float).reshape(-1, len(names)).T


def _number(value: Any, name: str, where: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or (math.isfinite(value) and abs(value) > LARGEST):
        raise DamagedError(
            f"{where}: {name} is {str(value)[:40]!r}, which is no such number; restore the file"
        )
    return float(value)
