"""Where a rank's log goes."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path


def log_to(file: Path) -> None:
    """torchtitan logs into the run folder; the console is for progress, for stackgrow's own warnings and for errors."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    console = logging.StreamHandler(sys.stderr)
    console.addFilter(_is_for_the_console)
    logging.basicConfig(level=logging.INFO, handlers=[handler, console], force=True)
    warnings.filterwarnings(
        "ignore", message="'set_vital' is deprecated"
    )  # torchdata 0.11 on torch 2.13
    # A float32 recipe makes torchtitan ask for a float32 autocast, which is none.
    warnings.filterwarnings(
        "ignore", message="In .* autocast, but the target dtype is not supported"
    )


def _is_for_the_console(record: logging.LogRecord) -> bool:
    if record.name.startswith("stackgrow"):
        return record.levelno >= logging.WARNING
    return record.levelno >= logging.ERROR
