"""An operator of the user's own: ``operator = "my_package.my_module:rules"``, a function that makes Rules.

Its parameters name what it is given: ``source`` and ``target`` (Model), ``layer_map`` (a tuple, or None where the depth
stays), ``seed`` (of this growth), and ``moment`` (Moment or None), without which AdamW's state cannot be carried over.

It is code, and a recipe or a run folder may be a stranger's: nothing of it is imported, let alone called, unless the
command line said ``--trust``. Modules are looked for as Python does it, and then in the working directory.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from stackgrow.growth.rules import GrowthError, Rules

AVAILABLE = ("source", "target", "layer_map", "seed", "moment")

_trusted = False


class TrustError(GrowthError):
    """A function of the user's own would have to run, and the command line did not say --trust."""


def trust() -> None:
    """From now on this process may run functions that recipes name. For the ``--trust`` of a tool, and tests."""
    global _trusted
    _trusted = True


def trusted() -> bool:
    return _trusted


def is_own(operator: str) -> bool:
    return ":" in operator


def rules(operator: str, available: Mapping[str, object]) -> Rules:
    """What the function makes of the growth. Raises TrustError, and GrowthError where it cannot be used."""
    function = _load(operator)
    asked = inspect.signature(function).parameters
    unknown = [name for name in asked if name not in AVAILABLE]
    if unknown:
        raise GrowthError(
            f"{operator} asks for {', '.join(unknown)}; its parameters can be {', '.join(AVAILABLE)}"
        )
    if available["moment"] and "moment" not in asked:
        raise GrowthError(
            f'{operator} has no parameter "moment", so that it grows no optimizer state: use "reset"'
        )
    made = function(**{name: available[name] for name in asked})
    if not isinstance(made, Rules):
        raise GrowthError(
            f"{operator} gave {type(made).__name__}, not stackgrow.growth.rules.Rules"
        )
    return made


def file_hash(operator: str) -> str:
    """SHA-256 of the file that the function stands in. Raises as ``rules`` does."""
    file = inspect.getsourcefile(_load(operator))
    assert file is not None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _load(operator: str) -> Callable[..., object]:
    if not _trusted:
        raise TrustError(
            f"{operator} is code that the recipe names: it runs only with --trust on the command line"
        )
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    module, name = operator.split(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise GrowthError(f"{operator} cannot be loaded: {error}") from error
    if not callable(function):
        raise GrowthError(f"{operator} is no function")
    return function
