"""Why a run ends early: each cause has an exit code (sysexits style) and one message that says what to do.

     0  the budget is reached, and the last checkpoint is sealed
     1  a fault in the program, with a traceback
     2  the recipe, the data or the ranks do not fit; nothing was started
    65  something on disk is damaged, or was made by another recipe, other data or other versions; or a benchmark
        asks for what the model cannot answer
    69  a package is not installed that a page or a picture needs
    70  another rank died or hangs, or a process that reads data for one
    73  another process works in the run folder
    74  the disk is full, or reading or writing failed
    75  a signal asked to stop; a sealed checkpoint stands, and the same command goes on
    76  the loss, the gradient or the weights are not finite, or the loss jumped

A second signal ends a process at once (128 + its number). torchrun always ends with 1 and shows the ranks' code.
"""

from __future__ import annotations

import errno


class RunError(RuntimeError):
    """A run cannot go on; the message names the cause, the place and the remedy."""

    exit_code = 1
    teller: int | None = (
        None  # the rank that prints it; None: the first of every node, for each may have its own
    )


class DamagedError(RunError):
    """A file of the run is missing, damaged or not what it claims to be."""

    exit_code = 65


class ChangedError(RunError):
    """The run folder was made by another recipe, by other data or in another way than the one asked for now."""

    exit_code = 65


class LostRankError(RunError):
    """A collective failed: another rank died, hangs or cannot be reached."""

    exit_code = 70


class LockedError(RunError):
    """Another process works in the run folder."""

    exit_code = 73


class EvaluationError(RunError):
    """A benchmark asks for what the model cannot answer; the trained weights are saved."""

    exit_code = 65


class MissingExtraError(RunError):
    """A package is not installed; the message names the extra that brings it."""

    exit_code = 69


class DiskError(RunError):
    """Something could not be read or written."""

    exit_code = 74


class StoppedError(RunError):
    """A signal asked the run to stop, and it did, with all work saved."""

    exit_code = 75


class DivergedError(RunError):
    """The loss, the gradient or the weights are NaN or infinite, or the loss jumped."""

    exit_code = 76


def retold(exit_code: int, message: str) -> RunError:
    """What ended another rank, to end this one alike."""
    error = RunError(message)
    error.exit_code = exit_code
    return error


def disk_error(error: OSError) -> DiskError:
    """An operating system's error in a run's terms."""
    fault = f"{error.filename or 'a file of the run'}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskError(
            f"disk full: {fault}; make room, then give the same command again"
        )
    return DiskError(f"{fault}; restore access to it, then give the same command again")
