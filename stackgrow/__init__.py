"""Grow language models during pre-training: declarative recipes on torchtitan.

    import stackgrow

    print(stackgrow.make_plan("recipes/quickstart.toml").tokens)
    run = stackgrow.run_recipe("recipes/quickstart.toml", sets=["budget.tokens=200K"])
    run.curves("validation")["loss"]        # one value for every record, over all stages
    run.model()                             # as transformers loads it
    run.tokenizer.encode("def grow(")

What a function needs is imported when it is called: ``make_plan`` loads no torch. (``stackgrow.plan`` and
``stackgrow.run`` are rooms.)
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from stackgrow.data.tokenizer import Tokenizer
    from stackgrow.plan.stages import Plan
    from stackgrow.recipe.keys import Model

__all__ = ["Run", "grow", "load_run", "make_plan", "run_recipe"]
try:
    __version__ = importlib.metadata.version("stackgrow")
except (
    importlib.metadata.PackageNotFoundError
):  # imported from a checkout that is not installed
    __version__ = "unknown"


def make_plan(recipe: str | Path, sets: Sequence[str] = ()) -> Plan:
    """What a recipe would do, stage by stage; ``sets`` as on the command line, ``["parallel.tensor=2"]``.

    Raises:
        RecipeError: everything that is wrong with the recipe.
    """
    from stackgrow.plan import resolve
    from stackgrow.recipe.load import load_recipe

    return resolve.make_plan(load_recipe(recipe, sets), recipe)


def run_recipe(recipe: str | Path, sets: Sequence[str] = ()) -> Run:
    """Runs a recipe, or goes on with it, in this process, and returns the finished run. Under torchrun every rank calls
    it. Call it in the main thread: while it runs, SIGINT (a notebook's stop button) and SIGTERM save and stop the run.

    Raises:
        RecipeError: anything wrong with the recipe, before anything is created on disk.
        RunError: the run cannot go on; the message says why, and what to do.
    """
    from stackgrow.process import signals
    from stackgrow.run import engine

    try:
        engine.run(str(recipe), sets)
    finally:
        signals.unwatch()
    return load_run(make_plan(recipe, sets).recipe.folder)


def load_run(folder: str | Path) -> Run:
    """A run from its folder, finished or not.

    Raises:
        DamagedError: the folder is no run's.
    """
    from stackgrow.errors import DamagedError
    from stackgrow.run_folder.folder import RunFolder
    from stackgrow.run_folder.found import plan_of_run

    path = Path(folder)
    if not RunFolder(path).recipe_file.is_file():
        raise DamagedError(f"{path} is no run: it has no recipe.toml")
    return Run(path, plan_of_run(path))


def grow(
    weights: Mapping[str, Tensor],
    source: Model,
    target: Model,
    operator: str = "stack",
    layer_map: Sequence[int] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The target's weights from the source's, in memory, named as in a run's checkpoints (``source.tensors()``).

    ``layer_map``: for every layer of the target the layer of the source that it comes from; None where the depth stays.
    No two tensors of the result share memory. For models that do not fit, and for "learn", there is
    ``tools/grow_checkpoint.py`` and the recipe.

    Raises:
        GrowthError: the operator does not define this growth, or a tensor of the source is missing.
    """
    import torch

    from stackgrow.growth.operators import growth_rules
    from stackgrow.growth.rules import Alias, GrowthError, Zeros

    rules = growth_rules(operator, source, target, layer_map, seed)
    grown = {}
    for name, rule in rules.targets.items():
        missing = [needed for needed in rule.sources if needed not in weights]
        if missing:
            raise GrowthError(
                f"{name} comes from {missing[0]}, which the weights do not have"
            )
        # A rule may overwrite what it is given.
        sources = [weights[needed].clone() for needed in rule.sources]
        if isinstance(rule, Alias):
            grown[name] = sources[0]
        elif isinstance(rule, Zeros):
            grown[name] = torch.zeros(rules.target_shapes[name], dtype=sources[0].dtype)
        else:
            grown[name] = rule.fn(*sources)
    return grown


@dataclass(frozen=True)
class Run:
    """A run folder and the plan that it follows."""

    folder: Path
    plan: Plan

    def curves(
        self, loss: Literal["train", "validation"] = "train"
    ) -> dict[str, list[Any]]:
        """The records of all stages, one after the other, as columns: stage, step, tokens and flops (of the whole run,
        the base's included), loss. pandas makes a table of it as it is.

        Raises:
            ValueError: another word than "train" or "validation".
        """
        from stackgrow.run_folder.folder import RunFolder
        from stackgrow.run_folder.lines import iter_records

        if loss not in ("train", "validation"):
            raise ValueError(f'{loss!r} is no loss of a run: "train" or "validation"')
        columns: dict[str, list[Any]] = {
            "stage": [],
            "step": [],
            "tokens": [],
            "flops": [],
            "loss": [],
        }
        for stage in RunFolder(self.folder).stages():
            file = stage.metrics_file if loss == "train" else stage.validation_file
            for record in iter_records(file):
                for name, column in columns.items():
                    column.append(record[name])
        return columns

    def model(self, step: int | None = None, stage: str | None = None) -> Any:
        """A checkpoint as the model that transformers loads: the last of the last finished stage, or of ``stage``, or
        the one of ``step``. Needs the extra ``eval``.

        Raises:
            MissingExtraError: transformers is not installed.
            RunError: no such checkpoint, or a damaged one.
        """
        import tempfile

        from stackgrow.checkpoint.export import export_run
        from stackgrow.errors import MissingExtraError

        try:
            from transformers import AutoModelForCausalLM
        except ImportError as error:
            raise MissingExtraError(
                "a model needs transformers: pip install 'stackgrow[eval]'"
            ) from error
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "exported"
            export_run(self.folder, folder, stage=stage, step=step)
            return AutoModelForCausalLM.from_pretrained(folder)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the token store that the run trains on.

        Raises:
            StoreError: the store is not where the recipe says.
        """
        from stackgrow.data.store import read_manifest
        from stackgrow.data.tokenizer import store_tokenizer

        first_store, _ = self.plan.recipe.data.stores[0]
        return store_tokenizer(read_manifest(first_store))
