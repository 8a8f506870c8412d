"""Which checkpoint of a run is meant, and what is needed to read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stackgrow import seal
from stackgrow.data.order import read_order
from stackgrow.data.store import MANIFEST
from stackgrow.data.tokenizer import store_tokenizer
from stackgrow.errors import ChangedError, DamagedError
from stackgrow.plan.stages import Plan, Stage, TrainStage
from stackgrow.recipe.keys import Model, Recipe
from stackgrow.run_folder.folder import RunFolder, StageFolder, run_of
from stackgrow.run_folder.found import plan_of_run


@dataclass(frozen=True)
class Chosen:
    """The checkpoint at ``path``, which ``stage`` of ``plan`` left in ``run``."""

    run: Path
    plan: Plan
    stage: Stage
    path: Path

    @property
    def model(self) -> Model:
        return self.stage.output_model

    @property
    def step(self) -> int:
        """Of the stage; 0 for a grown checkpoint."""
        if not self.stage.trains:
            return 0
        manifest = seal.read_seal(self.path) or {}
        return int(manifest.get("step", 0))

    @property
    def train_stage(self) -> TrainStage:
        """The stage itself, or the first train stage after it: of a grown model the one that trains it, of an imported
        one perhaps that of another model."""
        for stage in self.plan.stages[self.stage.index :]:
            if isinstance(stage, TrainStage):
                return stage
        raise AssertionError("a plan ends with a train stage")


def choose(
    path: Path,
    stage: str | None = None,
    step: int | None = None,
    sets: Sequence[str] = (),
) -> Chosen | None:
    """Of run ``path``: the last checkpoint of its last finished stage, or of ``stage``, or that of ``step``; or the
    checkpoint ``path`` of a run. None where ``path`` lies in no run.

    Raises:
        DamagedError: no such checkpoint.
        RecipeError: the run's recipe.toml cannot be read.
    """
    run = run_of(path)
    if run is None:
        return None
    plan = plan_of_run(run, sets)
    if run != path:
        if stage or step is not None:
            raise DamagedError(
                f"{path} is a checkpoint already; leave out --stage and --step, or name the run {run}"
            )
        return Chosen(run, plan, _stage(plan, path.absolute().parts), path)
    names = [stage] if stage else _last_finished(plan, run)
    chosen = _stage(plan, names)
    return Chosen(
        run, plan, chosen, _checkpoint(RunFolder(run).stage(chosen.name), chosen, step)
    )


def _last_finished(plan: Plan, run: Path) -> list[str]:
    """The name of the last stage with a model that is finished, if any is."""
    finished = []
    for stage in _models(plan):
        if RunFolder(run).stage(stage.name).is_done():
            finished.append(stage.name)
    return finished[-1:]


def _models(plan: Plan) -> list[Stage]:
    """A learn stage trains linear maps: what it leaves is no model."""
    return [stage for stage in plan.stages if not stage.learns_maps]


def _stage(plan: Plan, names: Sequence[str]) -> Stage:
    """The stage that has one of the names."""
    for stage in _models(plan):
        if stage.name in names:
            return stage
    problem = f"{names[-1]} is not among" if names else "none is finished of"
    known = ", ".join(stage.name for stage in _models(plan))
    raise DamagedError(f"{problem} the run's models; name one: {known}")


def _checkpoint(folder: StageFolder, stage: Stage, step: int | None) -> Path:
    """The checkpoint of a step, or the newest."""
    if not stage.trains and step is None:
        return folder.checkpoints
    steps = folder.sealed_steps()
    if step is None and steps:
        step = steps[-1]
    if step is None or step not in steps:
        raise DamagedError(
            f"{folder.checkpoints} has not the checkpoint asked for; it has those of steps {steps}"
        )
    return folder.checkpoint(step)


def tokenizer_of(recipe: Recipe, run: Path) -> Path | None:
    """The store's tokenizer; None where there is no store. ChangedError for a store that is not the run's, StoreError
    for a damaged one."""
    for store, _ in recipe.data.stores:
        if not (Path(store) / MANIFEST).is_file():
            return None
    order = read_order(recipe.data, recipe.seed)
    manifest = order.manifests[0]
    if RunFolder(run).data_hash() != order.data_hash:
        raise ChangedError(
            f"{manifest.folder} is not the token store that {run} was trained on; move it away or back"
        )
    store_tokenizer(manifest)
    return manifest.folder / manifest.tokenizer
