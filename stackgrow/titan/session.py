"""The process group that all stages of one session share, and the end that all its ranks come to together."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.utils import device_type

from stackgrow.errors import LostRankError, RunError, disk_error, retold
from stackgrow.process import alerts, signals
from stackgrow.recipe.keys import Recipe
from stackgrow.titan import device
from stackgrow.titan.config import comm_config

GPU_TRACE_BUFFER = (
    20000  # torchtitan's default size of NCCL's flight recorder; gloo has none
)
# Keys of the store.
FIRST = "stackgrow/teller"  # "<rank> <exit code>" of the first rank that ended for a known reason
READY = (
    "stackgrow/ready"  # [], or [exit code, message] of what keeps rank 0 from beginning
)
WAITING = "stackgrow/waiting/{}"  # there once the rank waits in vain for others
OTHERS_SECONDS = 2.0  # within which the other ranks notice what one has noticed

place = "the start"  # what this rank is at, for messages
_store: dist.Store | None = (
    None  # in which ranks tell each other why they end; torchrun's agent keeps it
)


def start(recipe: Recipe, logs: Path) -> None:
    """Joins the process group; plain ``python`` becomes a group of one."""
    global _store
    device.default_environment()
    trace_buffer = 0
    needs_cpu_backend = False
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        trace_buffer = GPU_TRACE_BUFFER
        needs_cpu_backend = _any_stage_offloads(recipe)  # NCCL has no CPU tensors
    else:
        device.keep_freed_memory()
    dist_utils.init_distributed(
        comm_config(recipe, trace_buffer),
        enable_cpu_backend=needs_cpu_backend,
        base_folder=str(logs),
    )
    _store = dist.distributed_c10d._get_default_store()


def _any_stage_offloads(recipe: Recipe) -> bool:
    own_tables = [growth.train for growth in recipe.growth]
    if recipe.base:
        own_tables.append(recipe.base.train)
    if any(keys.get("cpu_offload") for keys in own_tables):
        return True
    return recipe.train.cpu_offload


def agree(refusal: RunError | None) -> None:
    """Rank 0 says whether the run can begin; where it cannot, all ranks end for rank 0's reason. Not by a collective:
    NCCL's first one takes minutes to notice that a rank is gone.

    Raises:
        RunError: ``refusal``, on every rank.
    """
    assert _store is not None
    rank = dist.get_rank()
    if rank == 0:
        word = [refusal.exit_code, str(refusal)] if refusal else []
        _store.set(READY, json.dumps(word))
        # Rank 0 may be the process that keeps the store: it stays until all have read it.
        _store.wait([f"{READY}/{other}" for other in range(1, dist.get_world_size())])
        if refusal:
            raise refusal
        return
    word = json.loads(_store.get(READY))
    _store.set(f"{READY}/{rank}", "")
    if word:
        exit_code, message = word
        raise retold(exit_code, message)


def stop() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def at(where: str) -> None:
    """States what this rank is at."""
    global place
    place = where
    alerts.at(where)


def stop_if_asked() -> None:
    """Collective: StoppedError on all ranks if one was asked to stop. For places where all work is saved."""
    asked = torch.tensor(float(signals.asked() is not None), device=device_type)
    dist.all_reduce(asked)
    if asked.item():
        raise signals.stopped(place)


@contextmanager
def together() -> Iterator[None]:
    """What ends one rank ends all with one exit code, told once.

    Raises:
        LostRankError: a collective failed; it names the stage, the step, this rank and those that are silent.
    """
    try:
        yield
    except (RunError, OSError) as error:
        known = error if isinstance(error, RunError) else disk_error(error)
        with suppress(dist.DistError):
            known.teller = _first_to_end(dist.get_rank(), known.exit_code).rank
        raise known from error.__cause__
    except RuntimeError as error:
        if "DataLoader worker" in str(
            error
        ):  # torch raises it wherever the main thread is
            why = str(error).splitlines()[0]
            lost = LostRankError(
                f"{place}: a process that reads data was ended from outside, as it is when memory runs out ({why}). "
                "Give the same command again, with fewer of them (data.workers) or more memory"
            )
            with suppress(dist.DistError):
                lost.teller = _first_to_end(dist.get_rank(), lost.exit_code).rank
            raise lost from error
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise _why_collective_failed(error) from error


class Ended(NamedTuple):
    rank: int
    exit_code: int


def _first_to_end(rank: int, exit_code: int) -> Ended:
    """The rank that was first to end for a known reason, and its exit code; this one, if there was none."""
    assert _store is not None
    first = _store.compare_set(FIRST, "", f"{rank} {exit_code}").decode()
    first_rank, first_exit_code = first.split()
    return Ended(int(first_rank), int(first_exit_code))


def _why_collective_failed(error: RuntimeError) -> RunError:
    """Another rank may have ended for a reason of its own; else those are lost that do not say that they wait."""
    rank = dist.get_rank()
    try:
        silent = _silent_ranks()
        waiting = set(range(dist.get_world_size())) - set(silent)
        first = _first_to_end(min(waiting), LostRankError.exit_code)
    except dist.DistError:  # the store went with the rank that kept it
        silent = [0]
        first = Ended(rank, LostRankError.exit_code)
    names = ", ".join(str(other) for other in silent) or "none"
    lost = LostRankError(
        f"{place}: rank {rank} waited in vain for another rank; silent: {names}. It died, hangs, or the network "
        f"failed; its log is in logs/. Give the same command again to go on ({str(error).splitlines()[0]})"
    )
    lost.teller = first.rank
    lost.exit_code = first.exit_code
    return lost


def _silent_ranks() -> list[int]:
    """The other ranks that do not say within a moment that they, too, wait in vain."""
    assert _store is not None
    rank = dist.get_rank()
    _store.set(WAITING.format(rank), "")
    time.sleep(OTHERS_SECONDS)
    others = [other for other in range(dist.get_world_size()) if other != rank]
    return [other for other in others if not _store.check([WAITING.format(other)])]
