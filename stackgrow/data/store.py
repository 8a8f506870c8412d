"""The token store: a folder of .npy shards and the manifest that says what they are.

    data/name/
      manifest.json                 written last; a folder without it is not a store
      tokenizer.model               or tokenizer.json
      sources-00.json               the files it came from, and their documents, in order; one list for each corpus
      train-00-0000-0000.npy, ...   corpus, task, number: one flat array of token ids (uint16, or uint32 above 65,536)
      validation-00-0000-0000.npy, ...

A split is one long stream of tokens, document after document, each opened by BOS; shards merely cut it. numpy
is imported inside the methods, so that a recipe is checked against a manifest in milliseconds.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
import re
import resource
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackgrow.errors import DamagedError
from stackgrow.seal.files import file_records

if TYPE_CHECKING:
    import numpy as np

FORMAT = 1
MANIFEST = "manifest.json"
DTYPES = {"uint16": 2**16, "uint32": 2**32}  # name -> how many ids fit
OPEN_SHARDS = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4  # at a time; a 750B-token store has thousands
AGAIN = "prepare the store again with tools/prepare_data.py, or copy it again"


class StoreError(DamagedError, ValueError):
    """A token store that is absent, incomplete, damaged or too small; the message says what to do."""


@dataclass(frozen=True)
class Shard:
    """One file of a split; ``documents`` counts those that begin in it, ``bytes`` is the size of the file."""

    file: str
    tokens: int
    documents: int
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Split:
    tokens: int
    documents: int
    shards: tuple[Shard, ...]

    def windows(self, seq_len: int) -> int:
        """How many sequences of ``seq_len`` inputs, each with its labels shifted by one, the split holds.

        Window i covers tokens [i * seq_len, i * seq_len + seq_len + 1).
        """
        return max(0, self.tokens - 1) // seq_len


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says; ``raw`` is all of it (sources, skipped files, tool versions, inputs)."""

    folder: Path
    dtype: str
    vocab_size: int
    bos_id: int
    tokenizer: str
    tokenizer_sha256: str
    splits: Mapping[str, Split]
    raw: Mapping[str, Any]

    def hash(self, split: str) -> str:
        """SHA-256 over all that decides which token stands where in ``split``, and over nothing else."""
        shards = [shard.sha256 for shard in self.splits[split].shards]
        content = [FORMAT, self.dtype, self.vocab_size, self.tokenizer_sha256, split, shards]
        return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of the store in folder ``path``; touches no shard and imports neither numpy nor torch.

    Raises:
        StoreError: no manifest, one of another format, or one that contradicts itself.
    """
    folder = Path(path)
    try:
        raw = json.loads((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(
            f"{folder} is not a token store (no {MANIFEST}); write it with tools/prepare_data.py --out"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{folder / MANIFEST} cannot be read ({error}); {AGAIN}") from error
    try:
        return _parse(folder, raw)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"is malformed: {error}"
        raise StoreError(f"{folder / MANIFEST} {what}; {AGAIN}") from error


def _parse(folder: Path, raw: Any) -> Manifest:
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise ValueError(f"it is not a token store of format {FORMAT}")
    dtype, vocab_size, bos_id = raw["dtype"], _count(raw["vocab_size"]), _count(raw["bos_id"])
    if dtype not in DTYPES or not bos_id < vocab_size <= DTYPES[dtype]:
        raise ValueError(f"dtype {dtype!r}, vocab_size {vocab_size} and bos_id {bos_id} disagree")
    splits = {name: _parse_split(name, raw["splits"][name]) for name in ("train", "validation")}
    files = [shard.file for split in splits.values() for shard in split.shards]
    if len(files) > len(set(files)):
        raise ValueError(f"it names {next(file for file in files if files.count(file) > 1)} twice")
    for corpus in raw.get("corpora", []):
        _plain(corpus["list"]["file"])
    tokenizer = _plain(raw["tokenizer"]["file"])
    return Manifest(folder, dtype, vocab_size, bos_id, tokenizer, str(raw["tokenizer"]["sha256"]), splits, raw)


def _parse_split(name: str, raw: dict[str, Any]) -> Split:
    shards = tuple(
        Shard(_plain(s["file"]), _count(s["tokens"]), _count(s["documents"]), str(s["sha256"]), _count(s["bytes"]))
        for s in raw["shards"]
    )
    total = sum(shard.tokens for shard in shards)
    if total != raw["tokens"]:
        raise ValueError(f"split {name} claims {raw['tokens']} tokens, its shards add up to {total}")
    return Split(total, _count(raw["documents"]), shards)


def _plain(name: Any) -> str:
    """A store can come from a stranger: its manifest may name files of its own folder and nothing else."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        raise ValueError(f"{name!r} is not a plain file name inside the store")
    return name


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


class TokenStore:
    """One split of a token store, whose files are opened when first needed.

    It keeps ``open_files`` of them open, and pickles without them, so that loader workers open their own.
    """

    def __init__(self, manifest: Manifest, split: str):
        self.manifest = manifest
        self.split = split
        self.shards = manifest.splits[split].shards
        self.n_tokens = manifest.splits[split].tokens
        self.open_files = OPEN_SHARDS
        self._starts = list(itertools.accumulate((shard.tokens for shard in self.shards), initial=0))
        self._files: dict[int, int] = {}

    @classmethod
    def open(cls, path: str | Path, split: str = "train") -> TokenStore:
        """Split ``split`` ("train" or "validation") of the store in folder ``path``.

        Raises:
            StoreError: no such store, an empty split, or a file that is missing or of another size than the
                manifest states.
        """
        manifest = read_manifest(path)
        if not manifest.splits[split].tokens:
            raise StoreError(
                f"{path} has an empty {split} split; prepare it again from more than one document, "
                "with --validation above 0"
            )
        store = cls(manifest, split)
        for shard in store.shards:
            store._check_size(shard)
        if not (manifest.folder / manifest.tokenizer).is_file():
            raise StoreError(f"{manifest.folder / manifest.tokenizer} is missing; {AGAIN}")
        return store

    def windows(self, seq_len: int) -> int:
        return self.manifest.splits[self.split].windows(seq_len)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the split, across shard boundaries, in the store's dtype; read-only."""
        import numpy as np

        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of a split of {self.n_tokens}")
        parts = [self._read(i, a, b) for i, a, b in self._pieces(start, stop)]
        return np.frombuffer(parts[0] if len(parts) == 1 else b"".join(parts), self.manifest.dtype)

    def document(self, token: int) -> int:
        """The number, from 0, of the document that this token of the split belongs to."""
        index, first, _ = next(self._pieces(token, token + 1))
        before = self.tokens(token - first, token + 1)  # in this shard
        begun = int((before == self.manifest.bos_id).sum())
        return sum(shard.documents for shard in self.shards[:index]) + begun - 1

    def verify(self) -> None:
        """Reads every byte; raises StoreError at the first file whose content the manifest does not state."""
        stated = {shard.file: shard.sha256 for shard in self.shards}
        stated[self.manifest.tokenizer] = self.manifest.tokenizer_sha256
        lists = [corpus["list"] for corpus in self.manifest.raw.get("corpora", [])]
        stated |= {made["file"]: made["sha256"] for made in lists}
        with ThreadPoolExecutor() as pool:  # hashing leaves other threads alone
            hashes = pool.map(lambda name: file_records(self.manifest.folder, [name])[name]["sha256"], stated)
            for (name, sha256), found in zip(stated.items(), hashes, strict=True):
                if found != sha256:
                    raise StoreError(f"{self.manifest.folder / name} is damaged (SHA-256 differs); {AGAIN}")
        for start, shard in zip(self._starts, self.shards, strict=False):
            tokens = self.tokens(start, start + shard.tokens)
            if int(tokens.max()) >= self.manifest.vocab_size:
                raise StoreError(f"{shard.file} holds token ids beyond the vocabulary; {AGAIN}")
            if int((tokens == self.manifest.bos_id).sum()) != shard.documents:
                raise StoreError(f"{shard.file} does not hold the {shard.documents} documents it states; {AGAIN}")

    def _read(self, index: int, first: int, last: int) -> bytes:
        """The bytes of tokens [first, last) of a shard; a positioned read takes no memory beyond them."""
        shard, size = self.shards[index], int(self.manifest.dtype[4:]) // 8
        descriptor, left = self._file(index), (last - first) * size
        parts = []
        while left:
            parts.append(os.pread(descriptor, left, shard.bytes - (shard.tokens - last) * size - left))
            if not parts[-1]:
                raise StoreError(f"{self.manifest.folder / shard.file} ends early; {AGAIN}")
            left -= len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard, first, last + 1) of each stretch of [start, stop), counted within its shard."""
        index = bisect.bisect_right(self._starts, start) - 1
        while start < stop:
            base, end = self._starts[index], min(stop, self._starts[index + 1])
            yield index, start - base, end - base
            start, index = end, index + 1

    def _file(self, index: int) -> int:
        """A file descriptor of the shard, whose header is what numpy writes before such an array."""
        if index not in self._files:
            shard = self.shards[index]
            path = self.manifest.folder / shard.file
            self._check_size(shard)
            if len(self._files) >= self.open_files:
                os.close(self._files.pop(next(iter(self._files))))
            descriptor = os.open(path, os.O_RDONLY)
            descr = {"uint16": "<u2", "uint32": "<u4"}[self.manifest.dtype]
            header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': ({shard.tokens},), }}"
            if not os.pread(descriptor, 256, 0)[10:].startswith(header.encode()):
                os.close(descriptor)
                raise StoreError(f"{path} does not hold {shard.tokens} tokens of {self.manifest.dtype}; {AGAIN}")
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead: the next window is elsewhere
            self._files[index] = descriptor
        return self._files[index]

    def _check_size(self, shard: Shard) -> None:
        path = self.manifest.folder / shard.file
        if not path.is_file():
            raise StoreError(f"{path} is missing; {AGAIN}")
        if path.stat().st_size != shard.bytes:
            raise StoreError(f"{path} has {path.stat().st_size} bytes, the manifest states {shard.bytes}; {AGAIN}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # bound: at exit there is no os
        for descriptor in self.__dict__.get("_files", {}).values():
            close(descriptor)
