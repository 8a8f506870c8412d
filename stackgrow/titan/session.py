"""The process group that all stages of one session share, and the end that all its ranks come to together."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torchtitan.config import job_config as titan
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.utils import device_type

from stackgrow.errors import LostRankError, RunError, disk_error, retold
from stackgrow.process import signals
from stackgrow.recipe.keys import Recipe
from stackgrow.titan import device

GPU_TRACE_BUFFER = 20000  # torchtitan's default size of NCCL's flight recorder; gloo has none
TELLER = "stackgrow/teller"  # in the store: "<rank> <exit code>" of the first rank that ended for a known reason
READY = "stackgrow/ready"  # likewise: [], or [exit code, message] of what keeps rank 0 from beginning
OTHERS_SECONDS = 2.0  # within which the other ranks notice what one has noticed

place = "the start"  # what this rank is at, for messages
_store: dist.Store | None = None  # in which ranks tell each other why they end; torchrun's agent keeps it


def start(recipe: Recipe, logs: Path) -> None:
    """Joins the process group; plain ``python`` becomes a group of one."""
    device.default_environment()
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    own = [*([recipe.base.train] if recipe.base else []), *(growth.train for growth in recipe.growth)]
    offload = any(keys.get("cpu_offload", recipe.train.cpu_offload) for keys in [{}, *own])  # NCCL has no CPU tensors
    dist_utils.init_distributed(
        comm(recipe, GPU_TRACE_BUFFER if gpu else 0), enable_cpu_backend=gpu and offload, base_folder=str(logs)
    )
    global _store
    _store = dist.distributed_c10d._get_default_store()


def agree(refusal: RunError | None) -> None:
    """Rank 0 says whether the run can begin; where it cannot, all ranks end for rank 0's reason. Not by a collective:
    NCCL's first one takes minutes to notice that a rank is gone.

    Raises:
        RunError: ``refusal``, on every rank.
    """
    assert _store is not None
    rank, heard = dist.get_rank(), [f"{READY}/{r}" for r in range(1, dist.get_world_size())]
    if rank == 0:
        _store.set(READY, json.dumps([refusal.exit_code, str(refusal)] if refusal else []))
        _store.wait(heard)  # it may be this process that keeps the store
        if refusal:
            raise refusal
        return
    told = json.loads(_store.get(READY))
    _store.set(f"{READY}/{rank}", "")
    if told:
        raise retold(*told)


def stop() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def at(where: str) -> None:
    """States what this rank is at."""
    global place
    place = where


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
            known.teller, _ = _first_word(dist.get_rank(), known.exit_code)
        raise known from error.__cause__
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise _why_collective_failed(error) from error


def _first_word(rank: int, exit_code: int) -> tuple[int, int]:
    """The rank that was first to end for a known reason, and its exit code; this one, if there was none."""
    assert _store is not None
    rank, exit_code = map(int, _store.compare_set(TELLER, "", f"{rank} {exit_code}").decode().split())
    return rank, exit_code


def _why_collective_failed(error: RuntimeError) -> RunError:
    """Another rank may have ended for a reason of its own; else those are lost that do not say that they wait."""
    rank, ranks, waiting = dist.get_rank(), range(dist.get_world_size()), "stackgrow/waiting/{}"
    silent = [r for r in ranks if r != rank]
    try:
        assert _store is not None
        _store.set(waiting.format(rank), "")
        time.sleep(OTHERS_SECONDS)
        silent = [r for r in silent if not _store.check([waiting.format(r)])]
        teller, exit_code = _first_word(min(set(ranks) - set(silent)), LostRankError.exit_code)
    except dist.DistError:  # the store went with the rank that kept it
        silent, teller, exit_code = [0], rank, LostRankError.exit_code
    names = ", ".join(map(str, silent)) or "none"
    found = LostRankError(
        f"{place}: rank {rank} waited in vain for another rank; silent: {names}. It died, hangs, or the network "
        f"failed; its log is in logs/. Give the same command again to go on ({str(error).splitlines()[0]})"
    )
    found.teller, found.exit_code = teller, exit_code
    return found


def comm(recipe: Recipe, trace_buffer: int = 0) -> titan.Comm:
    """Timeouts of collectives; ``trace_buffer`` switches NCCL's flight recorder on."""
    return titan.Comm(
        init_timeout_seconds=recipe.run.init_timeout,
        train_timeout_seconds=recipe.run.train_timeout,
        trace_buf_size=trace_buffer,
    )
