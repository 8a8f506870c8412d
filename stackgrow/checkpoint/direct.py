"""A new file that is written past the page cache: to fill memory with what nobody reads again costs more than the disk.

Where the file system has no O_DIRECT, it is written through the cache, which is let go of block by block.
"""

from __future__ import annotations

import errno
import fcntl
import math
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

DIRECT = getattr(os, "O_DIRECT", 0)
BLOCK = 1 << 24  # bytes written at a time
ALIGNED = 4096  # direct writes are multiples of a disk's sector, from memory that begins at one


class DirectFile:
    """Takes bytes in any portions. ``position``: how many so far. Complete, and on the disk, after ``finish``.

    One block is written while the next is filled: what fails is raised by a later call."""

    def __init__(self, path: Path):
        self.handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        with suppress(OSError):
            fcntl.fcntl(self.handle, fcntl.F_SETFL, DIRECT)
        # Anonymous maps begin at a page, as direct writes need.
        self.block = np.frombuffer(mmap.mmap(-1, BLOCK), np.uint8)
        self.spare = np.frombuffer(mmap.mmap(-1, BLOCK), np.uint8)
        self.filled = 0
        self.position = 0
        self.thread = ThreadPoolExecutor(1)
        self.sending = Future[None]()
        self.sending.set_result(None)

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), BLOCK):
            self._fill(view[start : start + BLOCK])
        self.position += len(view)
        return len(view)

    def flush(self) -> None:
        """torch.save asks for it; ``finish`` is what counts."""

    def _fill(self, part: memoryview) -> None:
        room = BLOCK - self.filled
        for piece in (part[:room], part[room:]):
            end = self.filled + len(piece)
            np.copyto(self.block[self.filled : end], np.frombuffer(piece, np.uint8))
            self.filled = end
            if self.filled == BLOCK:
                self._send(BLOCK)

    def _send(self, size: int) -> None:
        self.sending.result()
        self.sending = self.thread.submit(self._write, self.block, size)
        self.block, self.spare = self.spare, self.block
        self.filled = 0

    def _write(self, block: np.ndarray, size: int) -> None:
        sent = 0
        while sent < size:
            try:
                sent += os.write(self.handle, memoryview(block)[sent:size])
            except OSError as error:
                is_direct = fcntl.fcntl(self.handle, fcntl.F_GETFL) & DIRECT
                if error.errno != errno.EINVAL or not is_direct:
                    raise
                # Where the disk or a limit ends, what fits is not aligned: a write through the cache tells which it is.
                fcntl.fcntl(self.handle, fcntl.F_SETFL, 0)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.handle, 0, 0, os.POSIX_FADV_DONTNEED)

    def finish(self) -> None:
        whole = (
            math.ceil(self.filled / ALIGNED) * ALIGNED
        )  # the rest of the last sector is cut off again
        self._send(whole)
        self.sending.result()
        os.ftruncate(self.handle, self.position)
        os.fsync(self.handle)

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.thread.shutdown()
        os.close(self.handle)
