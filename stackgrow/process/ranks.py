"""What processes see of a disk that they share, and how they keep out of each other's way.

On NFS a name that was looked up before it was made stays unknown to other machines for up to a minute, and a folder's
listing can be as old. So rank 0 looks and tells, and the others wait until they see what it has seen.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

from stackgrow.errors import DiskError
from stackgrow.process import signals

VISIBLE_SECONDS = 120.0  # NFS clients look again after 60 (acdirmax)
CANNOT_LOCK = {
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOLCK,
}  # as Lustre mounted without flock
T = TypeVar("T")
logger = logging.getLogger(__name__)


def from_rank0(look: Callable[[], T]) -> T:
    """Collective: what ``look`` gives on rank 0, on every rank."""
    from torch import distributed as dist

    seen: list[Any] = [None]
    if dist.get_rank() == 0:
        seen = [look()]
    dist.broadcast_object_list(seen)
    return seen[0]


def wait_for(*paths: Path) -> None:
    """Waits until ``paths``, which rank 0 has made, are visible here; or until this rank is asked to stop, as it is
    when rank 0 has failed.

    Raises:
        DiskError: they never are, as where the run folder is on a disk of each machine's own.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        return
    deadline = time.monotonic() + VISIBLE_SECONDS
    for path in paths:
        while not path.exists() and not signals.asked():
            if time.monotonic() > deadline:
                raise DiskError(
                    f"{path}: written by rank 0, and after {VISIBLE_SECONDS:g} s not visible to rank {rank} on "
                    f"{platform.node()}; the run folder must be on a file system that all nodes share"
                )
            time.sleep(0.1)


def lock(file: int | IO[str], operation: int = fcntl.LOCK_EX) -> None:
    """Locks an open file or folder until it is closed. Where the file system has no locks, only warns.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    try:
        fcntl.flock(file, operation | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in CANNOT_LOCK:
            raise
        logger.warning(
            "This file system has no locks (%s): nothing keeps two processes apart",
            error.strerror,
        )
