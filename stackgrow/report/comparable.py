"""Whether two runs can be compared, and in what their recipes differ.

A loss is a number of nats per token of some text. Runs whose tokenizer, vocabulary, held-out text or sequence length
differ have losses of different things: no speed-up follows from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stackgrow.recipe.load import load_recipe
from stackgrow.recipe.write import to_dict
from stackgrow.run_folder.folder import RunFolder

ABSENT = "-"
UNKNOWN = "unknown"
FREE = ("name", "seed", "run")  # keys that say nothing about what was computed


def unlike(baseline: Path, run: Path) -> list[str]:
    """Why the losses of two runs are not of the same thing; [] where they are, or where nothing is known against it."""
    reasons = []
    before = _basis(baseline)
    after = _basis(run)
    for name, value in before.items():
        if UNKNOWN not in (value, after[name]) and value != after[name]:
            reasons.append(f"{name}: {value} -> {after[name]}")
    return reasons


def _basis(run: Path) -> dict[str, str]:
    """What a run's losses are of, by names for people; the hashes are in its provenance, where there is one."""
    recipe = load_recipe(RunFolder(run).recipe_file, trusted=True)
    return {
        "tokenizer": _data_hash(run, "tokenizer_sha256"),
        "vocabulary": str(recipe.model.vocab_size),
        "sequence length": str(recipe.data.seq_len),
        "validation data": _data_hash(run, "validation_hash"),
        "validation sequences": f"{recipe.validation.sequences}, {recipe.validation.take}",
    }


def _data_hash(run: Path, name: str) -> str:
    data = RunFolder(run).stated_provenance().get("data")
    value = data.get(name) if isinstance(data, dict) else None
    return f"SHA-256 {value[:12]}" if isinstance(value, str) else UNKNOWN


def differences(baseline: Path, run: Path) -> list[str]:
    """Every key in which two runs' recipes differ, and their training data: ``train.learning_rate: 0.001 -> 0.002``."""
    lines = []
    before = dict(_leaves(_compared(baseline)))
    after = dict(_leaves(_compared(run)))
    for name in sorted(before.keys() | after.keys()):
        old = before.get(name, ABSENT)
        new = after.get(name, ABSENT)
        if old != new:
            lines.append(f"{name}: {old} -> {new}")
    return lines


def _compared(run: Path) -> dict[str, Any]:
    recipe = to_dict(load_recipe(RunFolder(run).recipe_file, trusted=True))
    for name in FREE:
        recipe.pop(name, None)
    recipe["training data"] = _data_hash(run, "manifest_hash")
    return recipe


def _leaves(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """The dotted name and the text of every value in a tree of tables: ``growth[0].factor``, ``4``."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{where}.{name}" if where else name)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{where}[{number}]")
    else:
        yield where, str(value)
