"""The names of tensors: in our checkpoints (recipe/keys.py: ``Model.tensors``) and in torchtitan's model.

Checkpoints, growth and Hugging Face export know the first alone. With torchtitan 0.2.2 both are the same but for what
torch.compile and recomputation put into a name. From 0.3 on they differ: RENAMED then holds pairs such as
``"attention.wq": "attention.qkv_linear.wq"`` and ``"output": "lm_head"``, and nothing else here or in checkpoint.py
changes for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

RENAMED: dict[
    str, str
] = {}  # a part of a stored name -> what torchtitan's model has in its place
WRAPPERS = (
    "_orig_mod.",
    "_checkpoint_wrapped_module.",
)  # put into names by torch.compile and recomputation
EMBEDDING = "tok_embeddings"
HEAD = "output"


def stored_name(parameter_name: str) -> str:
    """A parameter of torchtitan's model by its name in a checkpoint."""
    name = parameter_name
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    for stored, titan in RENAMED.items():
        name = _replace_part(name, titan, stored)
    return name


def titan_name(name: str) -> str:
    """A tensor or module by its name in a checkpoint -> as torchtitan's model has it before it is wrapped."""
    for stored, titan in RENAMED.items():
        name = _replace_part(name, stored, titan)
    return name


class StoredNames:
    """A model's or an optimizer's state as DCP saves and loads it, by the names of a checkpoint."""

    def __init__(self, titan: Any):
        self.titan = titan  # what torchtitan's CheckpointManager has

    def state_dict(self) -> dict[str, Any]:
        return _renamed(self.titan.state_dict(), stored_name)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.titan.load_state_dict(_renamed(state_dict, titan_name))


def layer_name(index: int) -> str:
    return f"layers.{index}"


def _renamed(state: dict[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    return {rename(name): value for name, value in state.items()}


def _replace_part(name: str, old: str, new: str) -> str:
    """Replaces ``old`` where it is a whole run of the parts between dots."""
    return f".{name}.".replace(f".{old}.", f".{new}.").strip(".")
