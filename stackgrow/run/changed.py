"""What may not change between two sessions of one run: the recipe's identity, the data, the engine's versions."""

from __future__ import annotations

from pathlib import Path

from stackgrow import seal
from stackgrow.errors import ChangedError, DamagedError
from stackgrow.plan.stages import Plan
from stackgrow.run_folder import provenance
from stackgrow.run_folder.folder import DONE, STAGE_FILE, RunFolder
from stackgrow.text import differences

ENGINE = ("torch", "torchtitan")  # whose minor versions change numerics and formats


def refuse_changed(plan: Plan, folder: Path, hashes: dict[str, str]) -> None:
    """An edited recipe must not go on in the folder of the old one.

    Raises:
        ChangedError: naming the stage and the values that differ.
    """
    known = {stage.name: stage for stage in plan.stages}
    for stage_folder in RunFolder(folder).stages():
        path = stage_folder.path
        stored, done = seal.read_json(stage_folder.stage_file), stage_folder.done()
        if done is not None and (stored is None or stored.get("stage_hash") != done.get("stage_hash")):
            raise DamagedError(f"{path / DONE} and {path / STAGE_FILE} disagree; restore them or move {path} away")
        if stored is None or stored.get("stage_hash") == hashes.get(path.name):
            continue
        changes = ["the recipe has no such stage"]
        if path.name in known:
            new = {"seed": plan.recipe.seed, **known[path.name].identity()}
            changes = list(differences({"seed": stored.get("seed"), **stored.get("stage", {})}, new))
        what = "; ".join(changes[:6]) or "the data or a stage before it"
        raise ChangedError(
            f"{path} was made by another recipe: {what}. Undo the change, or use another folder "
            f"(--set run.folder={plan.recipe.folder}-2), or move {path.name} and the stages after it away"
        )


def changed_versions(folder: Path, accept: bool) -> list[str]:
    """``torch 2.13.0 -> 2.13.1`` for every package that is not as in the run's last session.

    Raises:
        ChangedError: another minor version of the engine, unless that is accepted.
    """
    sessions = RunFolder(folder).provenance().get("sessions") or [{}]
    old, new = sessions[-1].get("packages", {}), provenance.versions()
    pairs = {name: (old.get(name, "none"), new.get(name, "none")) for name in {**old, **new}} if old else {}
    changes = {name: f"{name} {before} -> {after}" for name, (before, after) in pairs.items() if before != after}
    minor = [changes[name] for name in ENGINE if name in changes and len({*map(_minor, pairs[name])}) > 1]
    if minor and not accept:
        raise ChangedError(
            f"{folder} was run with other versions: {'; '.join(minor)}. The rest would not be what it would have been, "
            "bit for bit, and may not load; install the old ones, or accept it with --set run.accept_versions=true"
        )
    return list(changes.values())


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split("+")[0].split(".")[:2])
