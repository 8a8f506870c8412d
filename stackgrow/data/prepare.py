"""Text files -> a token store, in one deterministic order, complete or not there at all.

Two passes: the first reads and hashes every file, which fixes the documents, their split and the fingerprint
of the inputs; the second encodes them into shards. Everything is written to a folder beside the target,
synced, the manifest last, and renamed into place.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import stat
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from stackgrow.data.store import DTYPES, FORMAT, MANIFEST, Manifest, Shard, TokenStore, read_manifest
from stackgrow.data.tokenizer import Tokenizer, train_tokenizer
from stackgrow.progress import clock
from stackgrow.seal import file_records, sync_folder, write_json

TOKENIZER = "tokenizer.model"
BATCH_BYTES = 2**24  # text encoded at a time, over all cores
TRAINING_BYTES = 2**28  # text a tokenizer is trained on at most; the trainer holds it in memory
SKIPPED_NAMES = 20  # names kept per reason in the manifest
STDLIB_EXCLUDED = (
    "site-packages",
    "dist-packages",
    "lib2to3",
    "encodings",
    "**/test",
    "**/tests",
    "**/idle_test",
)


class PrepareError(ValueError):
    """Inputs or an output folder that cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Source:
    """Files below ``root`` whose relative path matches ``pattern`` and none of ``exclude``: globs in which
    ``**/`` stands for any number of folders."""

    root: Path
    pattern: str = "**/*"
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Document:
    name: str  # relative path, with forward slashes
    path: Path
    sha256: str
    bytes: int
    split: str = "train"


class Skipped(dict[str, dict[str, Any]]):
    """Why and how many files were left out, with some of their names: never silently."""

    def add(self, reason: str, name: str) -> None:
        entry = self.setdefault(reason, {"files": 0, "names": []})
        entry["files"] += 1
        if len(entry["names"]) < SKIPPED_NAMES:
            entry["names"].append(name)


def stdlib_source() -> Source:
    """The Python standard library's own code: about 10 MB of text that every machine has."""
    exclude = (*(f"{folder}/**" for folder in STDLIB_EXCLUDED), "_sysconfigdata*")
    return Source(Path(sysconfig.get_path("stdlib")), "**/*.py", exclude)


def prepare(
    sources: Sequence[Source],
    out: str | Path,
    *,
    tokenizer: int | str | Path,
    validation: float = 0.02,
    tokens_per_shard: int = 2**26,
) -> tuple[Manifest, bool]:
    """Writes the token store ``out``. Returns its manifest, and False if equal inputs had already made it.

    Args:
        tokenizer: a SentencePiece model file, or the vocabulary size of one to train on the training split.
        validation: the share of documents, chosen by their hash, in the validation split; at least one
            document unless it is 0 or there is but one.

    Raises:
        PrepareError: no documents, bad options, files that change meanwhile, or ``out`` is in the way.
        TokenizerError: the tokenizer cannot be read or trained. OSError: the store cannot be written.
    """
    if not 0 <= validation < 1:
        raise PrepareError(f"validation share {validation} must be at least 0 and below 1")
    if not 1 <= tokens_per_shard <= 2**30:
        raise PrepareError(f"tokens per shard {tokens_per_shard} must be between 1 and {2**30}")
    out, skipped = Path(out).absolute(), Skipped()
    documents = _split(_scan(sources, skipped), validation)
    known = tokenizer if isinstance(tokenizer, int) else Tokenizer.load(tokenizer)
    options = {
        "tokenizer": f"trained, {known} pieces" if isinstance(known, int) else known.sha256,
        "validation": validation,
        "tokens_per_shard": tokens_per_shard,
    }
    content = [FORMAT, options, [[document.name, document.sha256] for document in documents]]
    inputs = {"fingerprint": hashlib.sha256(json.dumps(content).encode()).hexdigest(), "options": options}
    if existing := _existing(out, inputs):
        return existing, False
    with _folder_in_place_of(out) as folder:
        made = train_tokenizer(_sample(documents), known) if isinstance(known, int) else known
        _write(folder / TOKENIZER, made.model)
        dtype = next(name for name, ids in DTYPES.items() if made.vocab_size <= ids)
        manifest = {
            "format": FORMAT,
            "dtype": dtype,
            "vocab_size": made.vocab_size,
            "bos_id": made.bos_id,
            "tokenizer": {"file": TOKENIZER, "sha256": made.sha256},
            "splits": _write_shards(documents, made, tokens_per_shard, dtype, folder),
            "sources": [{**asdict(source), "root": str(source.root)} for source in sources],
            "skipped": skipped,
            "inputs": inputs,
            "versions": {
                "python": platform.python_version(),
                "numpy": np.__version__,
                "sentencepiece": sentencepiece.__version__,
            },
        }
        write_json(folder / MANIFEST, manifest)
    return read_manifest(out), True


def summary(manifest: Manifest, written: bool) -> str:
    """What a store holds, for the person who prepared it."""
    lines = [f"{manifest.folder}: {'prepared' if written else 'already prepared'}"]
    for name, split in manifest.splits.items():
        counts = f"{split.documents:,} documents, {split.tokens:,} tokens, {len(split.shards):,} shards"
        lines.append(f"  {name}: {counts}")
    lines.append(f"  vocabulary: {manifest.vocab_size:,}, tokenizer {manifest.tokenizer_sha256[:12]}")
    lines += [f"  skipped, {why}: {entry['files']:,}" for why, entry in manifest.raw["skipped"].items()]
    return "\n".join(lines)


def _scan(sources: Sequence[Source], skipped: Skipped) -> list[Document]:
    """Every usable document of the sources, ordered by relative path, then by source."""
    found: list[tuple[str, int, Path]] = []
    for number, source in enumerate(sources):
        if not source.root.is_dir():
            raise PrepareError(f"{source.root} is not a folder; give one that holds the text files")
        found += [(name, number, source.root / name) for name in _names(source, skipped)]
    documents, seen = [], set()
    for name, _, path in sorted(found):
        content, fault = _read(path)
        real = path.resolve()
        if fault or real in seen:
            skipped.add(fault or "same file found twice", name)
        else:
            documents.append(Document(name, path, hashlib.sha256(content).hexdigest(), len(content)))
        seen.add(real)
    if not documents:
        where = ", ".join(f"{source.root}/{source.pattern}" for source in sources)
        reasons = ", ".join(f"{entry['files']} {why}" for why, entry in skipped.items())
        raise PrepareError(f"no documents in {where} (skipped: {reasons or 'none'}); look at --pattern, --exclude")
    return documents


def _names(source: Source, skipped: Skipped) -> Iterator[str]:
    wanted = _regex(source.pattern)
    unwanted = re.compile("|".join(_regex(pattern) for pattern in source.exclude) or r"(?!)", re.DOTALL)
    walk = os.walk(source.root, onerror=lambda error: skipped.add("unreadable", str(error.filename)))
    for folder, folders, files in walk:
        base = Path(folder).relative_to(source.root)
        # "test/**" matches "test/", so that an excluded folder is not even entered.
        folders[:] = [name for name in folders if not unwanted.fullmatch(f"{(base / name).as_posix()}/")]
        for name in folders:
            if (Path(folder) / name).is_symlink():
                skipped.add("linked folder, not followed", (base / name).as_posix())
        for name in ((base / file).as_posix() for file in files):
            if re.fullmatch(wanted, name, re.DOTALL) and not unwanted.fullmatch(name):
                yield name


def _regex(pattern: str) -> str:
    """A glob over relative paths: ``*`` and ``?`` stay within a folder, ``**/`` is any number of folders."""
    special = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.findall(r"\*\*/|\*\*|\*|\?|[^*?]+", pattern)
    return "".join(special.get(part) or re.escape(part) for part in parts)


def _read(path: Path) -> tuple[bytes, str]:
    """The content of a file, and why it cannot be used ("" when it can)."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            return b"", "not a regular file"
        content = path.read_bytes()
        content.decode()
    except OSError:
        return b"", "unreadable"
    except UnicodeDecodeError:
        return b"", "not UTF-8"
    return content, "" if content else "empty"


def _split(documents: list[Document], validation: float) -> list[Document]:
    """Sets the split of each document by the hash of its path and content: no other document changes it."""

    def rank(document: Document) -> float:
        digest = hashlib.sha256(os.fsencode(document.name) + b"\0" + document.sha256.encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    order = sorted(documents, key=rank)
    count = sum(rank(document) < validation for document in order)
    count = min(max(count, 1 if validation else 0), len(order) - 1)
    chosen = {document.path for document in order[:count]}
    return [replace(d, split="validation") if d.path in chosen else d for d in documents]


def _existing(out: Path, inputs: dict[str, Any]) -> Manifest | None:
    """The store at ``out`` when it came from the same inputs; None when nothing is in the way."""
    if not (out / MANIFEST).exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise PrepareError(f"{out} exists and is not a token store; name another folder with --out")
        return None
    manifest = read_manifest(out)
    if (was := manifest.raw.get("inputs", {})) != inputs:
        what = "options" if was.get("options") != inputs["options"] else "files"
        raise PrepareError(f"{out} was prepared from other {what}; name another --out, or delete that folder")
    for name, split in manifest.splits.items():
        if split.tokens:
            TokenStore.open(out, name)
    return manifest


@contextlib.contextmanager
def _folder_in_place_of(out: Path) -> Iterator[Path]:
    """An empty folder beside ``out`` that becomes ``out`` when the block ends well and vanishes otherwise.

    What a killed preparation left there is removed; a lock keeps two live ones apart.
    """
    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    handle = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = partial.exists() and os.path.samestat(os.fstat(handle), partial.stat())
        except BlockingIOError:
            mine = False
        if not mine:  # locked, or renamed by its owner between our two calls
            raise PrepareError(f"another preparation of {out} is at work; let it finish, then run again")
        try:
            for leftover in partial.iterdir():
                leftover.unlink()
            yield partial
            partial.rename(out)
            sync_folder(out.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(handle)


def _write(path: Path, content: bytes | np.ndarray) -> None:
    with path.open("wb") as stream:
        if isinstance(content, bytes):
            stream.write(content)
        else:
            np.save(stream, content, allow_pickle=False)
        stream.flush()
        os.fsync(stream.fileno())


def _text(document: Document) -> str:
    content, _ = _read(document.path)
    if hashlib.sha256(content).hexdigest() != document.sha256:
        raise PrepareError(f"{document.path} changed while it was being prepared; run again")
    return content.decode()


def _sample(documents: list[Document]) -> Iterator[str]:
    """Training documents, in the order of their hashes, up to TRAINING_BYTES."""
    total = 0
    for document in sorted(documents, key=lambda d: d.sha256):
        if document.split == "train" and total < TRAINING_BYTES:
            total += document.bytes
            yield _text(document)


class _ShardWriter:
    """Cuts one split's stream of tokens into files of exactly ``size`` tokens, the last one excepted."""

    def __init__(self, folder: Path, split: str, size: int, dtype: str):
        self.folder, self.split = folder, split
        self.buffer = np.empty(size, dtype)
        self.filled = self.documents = 0
        self.shards: list[Shard] = []

    def add(self, tokens: np.ndarray) -> None:
        self.documents += 1
        while len(tokens):
            part = tokens[: len(self.buffer) - self.filled]
            tokens = tokens[len(part) :]
            self.buffer[self.filled : self.filled + len(part)] = part
            self.filled += len(part)
            if self.filled == len(self.buffer):
                self.flush()

    def flush(self) -> None:
        if self.filled:
            name = f"{self.split}-{len(self.shards):05d}.npy"
            _write(self.folder / name, self.buffer[: self.filled])
            record = file_records(self.folder, [name])[name]
            self.shards.append(Shard(name, self.filled, self.documents, **record))
            self.filled = self.documents = 0

    def finish(self) -> dict[str, Any]:
        self.flush()
        return {
            "tokens": sum(shard.tokens for shard in self.shards),
            "documents": sum(shard.documents for shard in self.shards),
            "shards": [asdict(shard) for shard in self.shards],
        }


def _write_shards(
    documents: list[Document], tokenizer: Tokenizer, size: int, dtype: str, folder: Path
) -> dict[str, Any]:
    writers = {split: _ShardWriter(folder, split, size, dtype) for split in ("train", "validation")}
    progress = _Progress(documents)
    ends = itertools.accumulate(document.bytes for document in documents)
    for _, pairs in itertools.groupby(zip(documents, ends, strict=True), lambda pair: pair[1] // BATCH_BYTES):
        batch = [document for document, _ in pairs]
        for document, ids in zip(batch, tokenizer.encode_batch([_text(d) for d in batch]), strict=True):
            writers[document.split].add(np.array([tokenizer.bos_id, *ids], dtype))
            progress.add(document.bytes, len(ids) + 1)
    return {split: writer.finish() for split, writer in writers.items()}


class _Progress:
    """One line on a terminal: files, tokens, tokens per second, time left; nothing elsewhere."""

    def __init__(self, documents: list[Document]):
        self.all_files, self.all_bytes = len(documents), sum(document.bytes for document in documents)
        self.files = self.bytes = self.tokens = 0
        self.began = time.monotonic()
        self.shown = 0.0 if sys.stderr.isatty() else float("inf")

    def add(self, size: int, tokens: int) -> None:
        self.files, self.bytes, self.tokens = self.files + 1, self.bytes + size, self.tokens + tokens
        now, last = time.monotonic(), self.files == self.all_files
        if now - self.shown > 0.2 or (last and self.shown < float("inf")):
            self.shown, elapsed = now, max(now - self.began, 1e-9)
            rate = f"{self.tokens:,} tokens, {self.tokens / elapsed:,.0f} tokens/s"
            left = clock(elapsed * (self.all_bytes - self.bytes) / self.bytes)
            line = f"{self.files:,}/{self.all_files:,} files, {rate}, ETA {left}"
            print(f"\r\x1b[K{line}", end="\n" if last else "", file=sys.stderr, flush=True)
