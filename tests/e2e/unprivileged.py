"""A script of tools/ as somebody runs it who is not root: ``unprivileged.py tools/report.py runs/a``.

Root passes over the permissions of files by two capabilities. Without them it is refused like any other user, and still
finds a Python that lies in its own home.
"""

from __future__ import annotations

import ctypes
import runpy
import sys

CAP_DAC_OVERRIDE = 1  # linux/capability.h
CAP_DAC_READ_SEARCH = 2
VERSION_3 = 0x20080522  # of the calls: two sets of 32 capabilities


def drop_root_access() -> None:
    """Gives both capabilities up, for good; who never had them loses nothing."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(VERSION_3, 0)  # of this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    if libc.capget(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    for number in range(3):
        sets[number] &= ~(1 << CAP_DAC_OVERRIDE | 1 << CAP_DAC_READ_SEARCH)
    if libc.capset(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capset")


if __name__ == "__main__":
    drop_root_access()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
