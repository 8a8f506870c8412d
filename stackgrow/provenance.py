"""What ran, on what, from what: written into the run folder before the work, one entry per session."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from stackgrow.load import recipe_hash
from stackgrow.recipe import Recipe

PACKAGES = ("stackgrow", "torch", "torchtitan", "torchdata", "numpy", "sentencepiece", "triton", "flash-attn")
REPOSITORY = Path(__file__).parent.parent


def provenance(
    recipe: Recipe, sets: Sequence[str], data: dict[str, Any], previous: dict[str, Any] | None
) -> dict[str, Any]:
    """The content of provenance.json: the recipe's and the data's identity, and every session up to this one."""
    sessions = list((previous or {}).get("sessions", []))
    return {
        "recipe_hash": recipe_hash(recipe),
        "data": data,
        "sessions": [*sessions, session(sets)],
    }


def session(sets: Sequence[str]) -> dict[str, Any]:
    """This process's circumstances; ``python`` alone counts as one rank."""
    return {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "overrides": list(sets),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "host": platform.node(),
        "hardware": hardware(),
        "python": platform.python_version(),
        "packages": versions(),
        "code": code_version(),
    }


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide numerics or formats."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def code_version() -> dict[str, str]:
    """The git commit of this code and a hash of what differs from it; empty outside a checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=10)
        return done.stdout if done.returncode == 0 else ""

    try:
        commit, changes = git("rev-parse", "HEAD").strip(), git("diff", "HEAD", "--", "stackgrow", "tools")
    except (OSError, subprocess.TimeoutExpired):
        return {}
    dirty = {"dirty_sha256": hashlib.sha256(changes.encode()).hexdigest()} if changes else {}
    return {"commit": commit, **dirty} if commit else {}


def hardware() -> dict[str, Any]:
    """Processor, and accelerators where torch is loaded and sees any."""
    facts: dict[str, Any] = {"machine": platform.machine(), "cpus": os.cpu_count()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts
