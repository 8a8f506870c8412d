"""The token store: a folder of .npy shards and the manifest that says what they are.

    data/name/
      manifest.json                 written last; a folder without it is not a store
      tokenizer.model               or tokenizer.json
      sources-00.json               the files it came from, and their documents, in order; one list for each corpus
      train-00-0000-0000.npy, ...   corpus, task, number: one flat array of token ids (uint16, or uint32 above 65,536)
      validation-00-0000-0000.npy, ...

A split is one long stream of tokens, document after document; shards merely cut it. The manifest's ``document_ends``
says where one document ends and the next begins: at a BOS before each ("bos"), at an EOS after each ("eos", as in the
paper's code), or at "both". numpy is imported inside the methods, so that a recipe is checked against a manifest in
milliseconds.
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
from typing import TYPE_CHECKING, Any, NamedTuple

from stackgrow.errors import DamagedError
from stackgrow.seal.files import file_records, named

if TYPE_CHECKING:
    import numpy as np

FORMAT = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "validation")
DOCUMENT_ENDS = ("bos", "eos", "both")
DTYPES = {"uint16": 2**16, "uint32": 2**32}  # name -> how many ids fit
OPEN_SHARDS = (
    resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4
)  # at a time; a 750B-token store has thousands
AGAIN = "prepare the store again with tools/prepare_data.py, or copy it again"


class StoreError(DamagedError, ValueError):
    """A token store that is absent, incomplete, damaged or too small; the message says what to do."""


@dataclass(frozen=True)
class Shard:
    """One file of a split; ``bytes`` is the size of the file, and ``documents`` counts those that begin in it (where
    ``document_ends`` is "eos": that end in it)."""

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
    """What manifest.json says; ``raw`` is all of it (sources, skipped files, tool versions, inputs).

    ``bos_id`` stands once for each document: its BOS, or where ``document_ends`` is "eos" its EOS, which is then also
    what stands before every document but the first. ``eos_id`` is None where the tokenizer has none, and in stores from
    before ``document_ends`` was written down.
    """

    folder: Path
    dtype: str
    vocab_size: int
    bos_id: int
    tokenizer: str
    tokenizer_sha256: str
    splits: Mapping[str, Split]
    raw: Mapping[str, Any]
    document_ends: str = "bos"
    eos_id: int | None = None

    def fits(self, vocab_size: int) -> bool:
        """Whether a model of this vocabulary can be trained on the store: it has as many ids, or more up to a multiple
        of 64 for the sake of fast kernels. Far more would be another tokenizer's."""
        padding = vocab_size - self.vocab_size
        if padding == 0:
            return True
        return vocab_size % 64 == 0 and 0 < padding <= max(128, self.vocab_size // 50)

    def hash(self, split: str) -> str:
        """SHA-256 over all that decides which token stands where in ``split``, and over nothing else."""
        shards = [shard.sha256 for shard in self.splits[split].shards]
        content = [
            FORMAT,
            self.dtype,
            self.vocab_size,
            self.tokenizer_sha256,
            split,
            shards,
        ]
        if self.document_ends != "bos":
            content.append(self.document_ends)
        return hashlib.sha256(
            json.dumps(content, separators=(",", ":")).encode()
        ).hexdigest()


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of the store in folder ``path``; touches no shard and imports neither numpy nor torch.

    Raises:
        StoreError: no manifest, one of another format, or one that contradicts itself.
    """
    folder = Path(path)
    file = folder / MANIFEST
    try:
        raw = json.loads(_regular_bytes(file))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(
            f"{folder} is not a token store (no {MANIFEST}); write it with tools/prepare_data.py --out"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{file} cannot be read ({error}); {AGAIN}") from error
    try:
        return _parse(folder, raw)
    except KeyError as error:
        raise StoreError(f"{file} lacks {error}; {AGAIN}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise StoreError(f"{file} is malformed: {error}; {AGAIN}") from error


def _regular_bytes(file: Path) -> bytes:
    """The bytes of a file. Raises OSError also for what is no regular file: a pipe would be waited for without end."""
    if file.exists() and not file.is_file():
        raise OSError("it is not a regular file")
    return file.read_bytes()


def _parse(folder: Path, raw: Any) -> Manifest:
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise ValueError(f"it is not a token store of format {FORMAT}")
    dtype = raw["dtype"]
    vocab_size = _count(raw["vocab_size"])
    bos_id = _count(raw["bos_id"])
    if dtype not in DTYPES or not bos_id < vocab_size <= DTYPES[dtype]:
        raise ValueError(
            f"dtype {dtype!r}, vocab_size {vocab_size} and bos_id {bos_id} disagree"
        )
    document_ends, eos_id = _parse_ends(raw, vocab_size)
    splits = {name: _parse_split(name, raw["splits"][name]) for name in SPLITS}
    _refuse_doubles(splits)
    for corpus in raw.get("corpora", []):
        _plain(corpus["list"]["file"])
    return Manifest(
        folder=folder,
        dtype=dtype,
        vocab_size=vocab_size,
        bos_id=bos_id,
        tokenizer=_plain(raw["tokenizer"]["file"]),
        tokenizer_sha256=str(raw["tokenizer"]["sha256"]),
        splits=splits,
        raw=raw,
        document_ends=document_ends,
        eos_id=eos_id,
    )


def _parse_ends(raw: dict[str, Any], vocab_size: int) -> tuple[str, int | None]:
    """``document_ends`` and ``eos_id``, which older stores do not state: all their documents begin with BOS."""
    ends = raw.get("document_ends", "bos")
    if ends not in DOCUMENT_ENDS:
        raise ValueError(
            f"document_ends is {ends!r}, not one of {', '.join(DOCUMENT_ENDS)}"
        )
    if raw.get("eos_id") is None:
        if ends != "bos":
            raise ValueError(f"document_ends is {ends!r}, and there is no eos_id")
        return ends, None
    eos_id = _count(raw["eos_id"])
    if eos_id >= vocab_size:
        raise ValueError(f"vocab_size {vocab_size} and eos_id {eos_id} disagree")
    return ends, eos_id


def _parse_split(name: str, raw: dict[str, Any]) -> Split:
    shards = []
    for row in raw["shards"]:
        shard = Shard(
            file=_plain(row["file"]),
            tokens=_count(row["tokens"]),
            documents=_count(row["documents"]),
            sha256=str(row["sha256"]),
            bytes=_count(row["bytes"]),
        )
        shards.append(shard)
    total = sum(shard.tokens for shard in shards)
    if total != raw["tokens"]:
        raise ValueError(
            f"split {name} claims {raw['tokens']} tokens, its shards add up to {total}"
        )
    return Split(total, _count(raw["documents"]), tuple(shards))


def _refuse_doubles(splits: Mapping[str, Split]) -> None:
    seen = set()
    for split in splits.values():
        for shard in split.shards:
            if shard.file in seen:
                raise ValueError(f"it names {shard.file} twice")
            seen.add(shard.file)


def _plain(name: Any) -> str:
    """A store can come from a stranger: its manifest may name files of its own folder and nothing else."""
    if not isinstance(name, str) or not re.fullmatch(
        r"[A-Za-z0-9_][A-Za-z0-9._-]*", name
    ):
        raise ValueError(f"{name!r} is not a plain file name inside the store")
    return name


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


class Stretch(NamedTuple):
    """Tokens [first, last) of a shard, counted within it."""

    shard: int
    first: int
    last: int


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
        self._starts = list(
            itertools.accumulate((shard.tokens for shard in self.shards), initial=0)
        )
        self._files: dict[
            int, int
        ] = {}  # shard -> file descriptor, the one opened first in front

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
            raise StoreError(
                f"{manifest.folder / manifest.tokenizer} is missing; {AGAIN}"
            )
        return store

    def windows(self, seq_len: int) -> int:
        return self.manifest.splits[self.split].windows(seq_len)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the split, across shard boundaries, in the store's dtype; read-only.

        Raises:
            StoreError: a shard that is damaged, or a token that the vocabulary does not have.
        """
        import numpy as np

        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of a split of {self.n_tokens}")
        parts = [self._read(stretch) for stretch in self._stretches(start, stop)]
        content = parts[0] if len(parts) == 1 else b"".join(parts)
        tokens = np.frombuffer(content, self.manifest.dtype)
        # Whatever a store's hashes say: an embedding must not be indexed beyond its end.
        if len(tokens) and int(tokens.max()) >= self.manifest.vocab_size:
            self._refuse_token(start + int(tokens.argmax()), int(tokens.max()))
        return tokens

    def _refuse_token(self, position: int, token: int) -> None:
        stretch = next(self._stretches(position, position + 1))
        path = self.manifest.folder / self.shards[stretch.shard].file
        raise StoreError(
            f"{path} holds token id {token} at {stretch.first}, beyond the vocabulary of {self.manifest.vocab_size}; "
            f"{AGAIN}"
        )

    def document(self, token: int) -> int:
        """The number, from 0, of the document that this token of the split belongs to."""
        here = next(self._stretches(token, token + 1))
        earlier = sum(shard.documents for shard in self.shards[: here.shard])
        start_of_shard = token - here.first
        if self.manifest.document_ends == "eos":
            return earlier + self._separators(self.tokens(start_of_shard, token))
        return earlier + self._separators(self.tokens(start_of_shard, token + 1)) - 1

    def verify(self) -> None:
        """Reads every byte; raises StoreError at the first file whose content the manifest does not state."""
        with ThreadPoolExecutor() as pool:  # hashing leaves other threads alone
            stated = self._stated_hashes()
            for name, sha256 in zip(
                stated, pool.map(self._sha256, stated), strict=True
            ):
                if sha256 != stated[name]:
                    raise StoreError(
                        f"{self.manifest.folder / name} is damaged (SHA-256 differs); {AGAIN}"
                    )
        for start, shard in zip(self._starts, self.shards, strict=False):
            tokens = self.tokens(start, start + shard.tokens)
            if self._separators(tokens) != shard.documents:
                raise StoreError(
                    f"{shard.file} does not hold the {shard.documents} documents it states; {AGAIN}"
                )

    def _stated_hashes(self) -> dict[str, str]:
        """The SHA-256 that the manifest states of each file."""
        stated = {shard.file: shard.sha256 for shard in self.shards}
        stated[self.manifest.tokenizer] = self.manifest.tokenizer_sha256
        for corpus in self.manifest.raw.get("corpora", []):
            made_from = corpus["list"]
            stated[made_from["file"]] = made_from["sha256"]
        return stated

    def _separators(self, tokens: np.ndarray) -> int:
        """How many documents begin in these tokens (where ``document_ends`` is "eos": end)."""
        return int((tokens == self.manifest.bos_id).sum())

    def _sha256(self, name: str) -> str:
        path = self.manifest.folder / name
        if not path.is_file():
            raise StoreError(f"{path} is missing; {AGAIN}")
        return file_records(self.manifest.folder, [name])[name]["sha256"]

    def _read(self, stretch: Stretch) -> bytes:
        """The bytes of these tokens; a positioned read takes no memory beyond them."""
        shard = self.shards[stretch.shard]
        token_bytes = int(self.manifest.dtype.removeprefix("uint")) // 8
        end = (
            shard.bytes - (shard.tokens - stretch.last) * token_bytes
        )  # the tokens are the end of the file
        left = (stretch.last - stretch.first) * token_bytes
        path = self.manifest.folder / shard.file
        descriptor = self._file(stretch.shard)
        parts = []
        # One read may give less than was asked for.
        while left:
            with named(path):
                part = os.pread(descriptor, left, end - left)
            if not part:
                raise StoreError(f"{path} ends early; {AGAIN}")
            parts.append(part)
            left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _stretches(self, start: int, stop: int) -> Iterator[Stretch]:
        """Tokens [start, stop) of the split, shard by shard."""
        shard = bisect.bisect_right(self._starts, start) - 1
        while start < stop:
            shard_start = self._starts[shard]
            end = min(stop, self._starts[shard + 1])
            yield Stretch(shard, start - shard_start, end - shard_start)
            start = end
            shard += 1

    def _file(self, index: int) -> int:
        """A file descriptor of the shard, whose header is what numpy writes before such an array."""
        if index not in self._files:
            if len(self._files) >= self.open_files:
                oldest = next(iter(self._files))
                os.close(self._files.pop(oldest))
            self._files[index] = self._open_shard(self.shards[index])
        return self._files[index]

    def _open_shard(self, shard: Shard) -> int:
        path = self.manifest.folder / shard.file
        self._check_size(shard)
        descriptor = os.open(path, os.O_RDONLY)
        descr = {"uint16": "<u2", "uint32": "<u4"}[self.manifest.dtype]
        header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': ({shard.tokens},), }}"
        with named(path):
            start = os.pread(descriptor, 256, 0)
        if not start[10:].startswith(header.encode()):
            os.close(descriptor)
            raise StoreError(
                f"{path} does not hold {shard.tokens} tokens of {self.manifest.dtype}; {AGAIN}"
            )
        if hasattr(os, "posix_fadvise"):  # not on a Mac
            # No reading ahead: the next window is elsewhere.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        return descriptor

    def _check_size(self, shard: Shard) -> None:
        path = self.manifest.folder / shard.file
        if not path.is_file():
            raise StoreError(f"{path} is missing; {AGAIN}")
        size = path.stat().st_size
        if size != shard.bytes:
            raise StoreError(
                f"{path} has {size} bytes, the manifest states {shard.bytes}; {AGAIN}"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def __del__(
        self, close: Callable[[int], None] = os.close
    ) -> None:  # bound: at exit there is no os
        for descriptor in self.__dict__.get("_files", {}).values():
            close(descriptor)
