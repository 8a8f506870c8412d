"""Documents -> the shards of one task, and a record of them that is written last: a datatrove pipeline step."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from stackgrow.data.read import Inputs, Reader
from stackgrow.data.store import SPLITS, Shard
from stackgrow.data.tokenizer import Tokenizer
from stackgrow.seal.files import file_records, write_json
from stackgrow.text import human

STORE, PARTS = "store", "parts"  # folders of a preparation's work folder
BATCH = 2**20  # characters of text encoded at a time


class TokenWriter(PipelineStep):
    """Encodes the documents of a task into shards of its own: neither the number of workers nor a kill changes a byte.
    A document is held out when the hash of its text, as a number below 1, is below ``validation``."""

    type = "WRITER"
    name = "stackgrow"

    def __init__(self, work: str, reader: Reader, validation: float):
        super().__init__()
        self.work = Path(work)
        self.reader = reader
        self.validation = validation

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> None:
        started = time.monotonic()
        inputs = Inputs.of(self.work)
        tokenizer = _tokenizer_in(self.work, inputs.tokenizer)
        begin = inputs.begin
        if begin is None:
            begin = [tokenizer.bos_id]
        shards = self._shard_writers(inputs, rank, counts_ends=not begin)
        files: dict[
            int, list[int]
        ] = {}  # number of the file -> documents in each of SPLITS
        lowest = 1.0
        # A document's split follows from its text alone: no other file, and no second preparation, moves it.
        for batch in batches(data):
            texts = [document.text for document in batch]
            for document, ids in zip(batch, tokenizer.encode_batch(texts), strict=True):
                share = fraction(document.id)
                lowest = min(lowest, share)
                split = "validation" if share < self.validation else "train"
                shards[split].add(_concatenated(begin, ids, inputs.end))
                documents = files.setdefault(
                    document.metadata["file"], [0] * len(SPLITS)
                )
                documents[SPLITS.index(split)] += 1
        splits = {split: writer.finish() for split, writer in shards.items()}
        # Written last: a task without its record is done again.
        record = {
            "splits": splits,
            "files": files,
            "lowest": lowest,
            "skipped": self.reader.skipped,
        }
        write_json(self.work / PARTS / f"{rank:05d}.json", record)
        tokens = sum(split["tokens"] for split in splits.values())
        rate = human(tokens / max(time.monotonic() - started, 1e-9))
        print(
            f"task {rank + 1} of {world_size}: {human(tokens)} tokens, {rate} tokens/s",
            file=sys.stderr,
            flush=True,
        )

    def _shard_writers(
        self, inputs: Inputs, rank: int, *, counts_ends: bool
    ) -> dict[str, ShardWriter]:
        writers = {}
        for split in SPLITS:
            writers[split] = ShardWriter(
                folder=self.work / STORE,
                name=f"{split}-{inputs.corpus:02d}-{rank:04d}",
                size=inputs.options["tokens_per_shard"],
                dtype=inputs.dtype,
                counts_ends=counts_ends,
            )
        return writers


def _concatenated(*parts: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([np.asarray(part, np.uint32) for part in parts])


def fraction(digest: str) -> float:
    """A hexadecimal hash as a number of at least 0 and below 1."""
    return int(digest[:13], 16) / 16**13


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def _tokenizer_in(work: Path, name: str) -> Tokenizer:
    file = work / STORE / name
    return _cached_tokenizer(str(file), file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _cached_tokenizer(path: str, written: int) -> Tokenizer:
    """One for all tasks of a process; ``written``: when its file was."""
    return Tokenizer.parse(Path(path).read_bytes(), path)


class ShardWriter:
    """Cuts one split's stream of tokens into files of exactly ``size`` tokens, the last one excepted.

    A shard's ``documents`` are those that begin in it; with ``counts_ends``, those that end in it.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        size: int,
        dtype: str,
        *,
        counts_ends: bool = False,
    ):
        self.folder = folder
        self.name = name
        self.size = size
        self.dtype = dtype
        self.counts_ends = counts_ends
        self.buffer = np.empty(0, dtype)
        self.filled = 0
        self.documents = 0
        self.shards: list[Shard] = []

    def add(self, document: np.ndarray) -> None:
        if not len(self.buffer):
            self.buffer = np.empty(
                self.size, self.dtype
            )  # memory is taken as it is filled
        counted_at = len(document) - 1 if self.counts_ends else 0
        start = 0
        while start < len(document):
            room = self.size - self.filled
            end = min(start + room, len(document))
            filled = self.filled + end - start
            self.buffer[self.filled : filled] = document[start:end]
            if start <= counted_at < end:
                self.documents += 1
            self.filled = filled
            start = end
            if self.filled == self.size:
                self._flush()

    def finish(self) -> dict[str, Any]:
        """What a manifest says of the split."""
        if self.filled:
            self._flush()
        return {
            "tokens": sum(shard.tokens for shard in self.shards),
            "documents": sum(shard.documents for shard in self.shards),
            "shards": [asdict(shard) for shard in self.shards],
        }

    def _flush(self) -> None:
        name = f"{self.name}-{len(self.shards):04d}.npy"
        write_file(self.folder / name, self.buffer[: self.filled])
        record = file_records(self.folder, [name])[name]
        self.shards.append(
            Shard(name, self.filled, self.documents, record["sha256"], record["bytes"])
        )
        self.filled = 0
        self.documents = 0


def write_file(path: Path, content: bytes | np.ndarray) -> None:
    """Writes a file that is whole or not there; its temporary name is this process's own, and goes when it fails."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            if isinstance(content, bytes):
                stream.write(content)
            else:
                header = np.lib.format.header_data_from_array_1_0(content)
                np.lib.format.write_array_header_1_0(stream, header)
                stream.write(content.data)  # np.save would not say why it could not
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
