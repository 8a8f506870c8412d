"""The recipes that come with the package, by their names."""

from __future__ import annotations

import sysconfig
from pathlib import Path

CHECKOUT = Path(__file__).parents[2] / "recipes"
INSTALLED = (
    Path("share") / "stackgrow" / "recipes"
)  # in the environment's prefix: see pyproject.toml


def shipped_recipes() -> Path:
    """The folder of recipes: the checkout's, or that of the installed package."""
    if (CHECKOUT / "quickstart.toml").is_file():
        return CHECKOUT
    return Path(sysconfig.get_path("data")) / INSTALLED


def find_recipe(given: str) -> str:
    """The file that a command line means: a path as it is, or else a shipped recipe's name, ``quickstart`` or
    ``paper/7b_300b_gstack``. What is neither comes back as it is, and the loader says that it cannot be read."""
    if Path(given).exists() or given.endswith(".toml"):
        return given
    named = shipped_recipes() / f"{given}.toml"
    if named.is_file() and named.resolve().is_relative_to(shipped_recipes().resolve()):
        return str(named)
    return given
