"""Why a run ends early: each cause has an exit code (sysexits style) and one message that says what to do."""

from __future__ import annotations


class RunError(RuntimeError):
    """A run cannot go on; the message names the cause, the place and the remedy."""

    exit_code = 1


class DamagedError(RunError):
    """A file of the run is missing, damaged or not what it claims to be."""

    exit_code = 65


class ChangedError(RunError):
    """The run folder was made by another recipe, by other data or in another way than the one asked for now."""

    exit_code = 65


class LockedError(RunError):
    """Another process works in the run folder."""

    exit_code = 73


class NonFiniteError(RunError):
    """The loss, the gradient or the weights are NaN or infinite."""

    exit_code = 76
