"""Rank 0 takes the run folder: nothing in it is another recipe's, nobody else works in it, and what is about to run
stands in it."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from stackgrow import seal
from stackgrow.data.order import Order
from stackgrow.errors import LockedError
from stackgrow.plan.stages import Plan
from stackgrow.process.logs import log_to
from stackgrow.process.progress import say
from stackgrow.process.ranks import lock
from stackgrow.recipe.load import RecipeError
from stackgrow.recipe.write import to_toml
from stackgrow.run import extend
from stackgrow.run.changed import (
    changed_versions,
    refuse_changed,
    refuse_other_validation,
)
from stackgrow.run.preflight import import_problems
from stackgrow.run_folder import provenance
from stackgrow.run_folder.extended import Extension
from stackgrow.run_folder.folder import RunFolder
from stackgrow.run_folder.found import with_found

logger = logging.getLogger(__name__)


def claim(
    held: ExitStack, plan: Plan, order: Order, file: str, sets: Sequence[str]
) -> tuple[Plan, str]:
    """Takes the folder for a session that lasts until ``held`` is closed. Returns the plan with what its stages have
    found, and the identity of the session.

    Raises:
        RecipeError: an imported base that does not fit the recipe.
        RunError: the folder is another recipe's, damaged, or in use.
    """
    run = RunFolder(Path(plan.recipe.folder).absolute())
    plan = with_found(plan, run, order.data_hash, file)
    problems = import_problems(plan)
    if problems:
        raise RecipeError(file, problems)
    held.enter_context(run_lock(run))

    # Nothing is written before it is known that this is the run that was begun here.
    changes, extension = _changes(plan, run, order)
    if extension:
        extend.announce(plan, run, extension)

    # What runs stands in the folder before it runs.
    session = held.enter_context(provenance.session(run, plan, file, sets, order))
    if extension:
        provenance.add(run, plan.stages[-1].name, extended=extension.hash)
    _write_recipe(plan, run, sets)
    log_to(run.log_file(0))
    if extension:
        say(extend.told(plan, run, extension))
        extend.begin(plan, run, extension)
    if changes:
        logger.warning(
            "Other versions than in the session before: %s", "; ".join(changes)
        )
    return plan, session


def check_folder(plan: Plan, order: Order, file: str) -> str:
    """Whether ``claim`` would take the folder; begins no session, and makes no folder. Returns how a finished run would
    be gone on with, where it would; else "".

    Raises:
        RecipeError, RunError: as claim does.
    """
    run = RunFolder(Path(plan.recipe.folder).absolute())
    plan = with_found(plan, run, order.data_hash, file)
    problems = import_problems(plan)
    if problems:
        raise RecipeError(file, problems)
    if not run.path.is_dir():
        return ""
    with run_lock(run):
        _, extension = _changes(plan, run, order)
    return extend.told(plan, run, extension) if extension else ""


def _changes(
    plan: Plan, run: RunFolder, order: Order
) -> tuple[list[str], Extension | None]:
    """The versions that are not as in the session before, and how the run's last stage becomes longer, if it does;
    RunError where the run cannot go on for what has changed."""
    extension = refuse_changed(plan, run, plan.stage_hashes(order.data_hash))
    refuse_other_validation(plan, run, provenance.validation_hash(plan, order))
    versions = changed_versions(run, accept=plan.recipe.run.accept_versions)
    return versions, extension


@contextmanager
def run_lock(run: RunFolder) -> Iterator[None]:
    """One process group per run folder; the kernel frees the lock when its holder dies.

    Raises:
        LockedError: naming the holder.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    seal.sync_folder(run.path.parent)
    with run.lock_file.open("a+", encoding="utf-8") as file:
        try:
            lock(file)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise LockedError(
                f"{run.path} is in use by {holder}; wait for it or stop it first"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def _write_recipe(plan: Plan, run: RunFolder, sets: Sequence[str]) -> None:
    header = f"# {plan.recipe.name}, resolved: every key with its value, command-line overrides applied.\n"
    overrides = "".join(f"# --set {assignment}\n" for assignment in sets)
    seal.write_text(run.recipe_file, header + overrides + "\n" + to_toml(plan.recipe))
