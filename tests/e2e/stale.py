"""A file system as another machine sees it through NFS: a name that was not there stays unknown for a while, and a
folder's listing can be as old. What this process makes itself, it sees at once."""

from __future__ import annotations

import builtins
import errno
import functools
import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOOKS = ("stat", "lstat", "open", "statvfs", "listdir", "scandir")
MAKES = ("mkdir", "rename", "replace", "link")  # the last path that they are given


class StaleNames:
    """Installed for all below ``folder``; names and listings stay as they were for ``seconds``."""

    def __init__(self, folder: Path, seconds: float):
        self.folder, self.seconds = str(folder), seconds
        self.missing: dict[str, float] = {}
        self.listings: dict[str, tuple[float, list[str]]] = {}
        self.listdir, self.lstat = os.listdir, os.lstat
        for name in LOOKS:
            setattr(os, name, self._looking(getattr(os, name)))
        for name in MAKES:
            setattr(os, name, self._making(getattr(os, name)))
        os.listdir = self._listing
        io.open = builtins.open = self._looking(builtins.open)

    def _below(self, path: Any) -> str | None:
        text = os.fspath(path) if isinstance(path, (str, Path)) else ""
        return text if text.startswith(self.folder + "/") else None

    def _look_up(self, path: str) -> None:
        """Each part of a path is looked up, unless it is remembered not to be there."""
        place = self.folder
        for part in Path(path).relative_to(self.folder).parts:
            place = f"{place}/{part}"
            if time.monotonic() - self.missing.get(place, -1e9) < self.seconds:
                raise FileNotFoundError(errno.ENOENT, "not there, as remembered", path)
            try:
                self.lstat(place)
                self.missing.pop(place, None)
            except FileNotFoundError:
                self.missing[place] = time.monotonic()
                raise

    def _looking(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def inner(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
            if below := self._below(path):
                mode = args[0] if args else kwargs.get("mode", "r")
                makes = (
                    mode & os.O_CREAT
                    if isinstance(mode, int)
                    else set("wax") & set(mode)
                )
                if makes:
                    self._made(below)
                self._look_up(str(Path(below).parent) if makes else below)
            return original(path, *args, **kwargs)

        return inner

    def _making(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def inner(*args: Any, **kwargs: Any) -> Any:
            if below := self._below(
                args[-1] if original.__name__ != "mkdir" else args[0]
            ):
                self._look_up(str(Path(below).parent))
                self._made(
                    below
                )  # or another was faster: the server says so, and what was remembered is wrong
            return original(*args, **kwargs)

        return inner

    def _made(self, path: str) -> None:
        self.missing.pop(path, None)
        self.listings.pop(str(Path(path).parent), None)

    def _listing(self, path: Any = ".") -> list[str]:
        below = self._below(path)
        if not below:
            return self.listdir(path)
        self._look_up(below)
        seen, names = self.listings.get(below, (-1e9, []))
        if time.monotonic() - seen > self.seconds:
            names = self.listdir(path)
            self.listings[below] = (time.monotonic(), names)
        return list(names)
