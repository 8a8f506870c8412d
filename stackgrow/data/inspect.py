"""What token stores hold, and what stands at a position of a run: for people."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stackgrow.data.order import read_order
from stackgrow.data.store import (
    AGAIN,
    SPLITS,
    Manifest,
    StoreError,
    TokenStore,
    read_manifest,
)
from stackgrow.data.tokenizer import store_tokenizer
from stackgrow.recipe.keys import Recipe
from stackgrow.text import printable

ENDS = {
    "bos": "BOS before each",
    "eos": "EOS after each",
    "both": "BOS before each, EOS after it",
}


@dataclass(frozen=True)
class Piece:
    """The part of a training sequence that one document makes up: tokens [start, stop) of the sequence, and that the
    document is the ``number``-th (from 0) of those that a file gave to the split."""

    start: int
    stop: int
    document: int
    file: str
    number: int


def summary(manifest: Manifest, state: str) -> str:
    """Counts, the tokenizer, and what was left out and why; ``state`` of the store is told first."""
    lines = [f"{manifest.folder}: {state}"]
    for name, split in manifest.splits.items():
        counts = f"{split.documents:,} documents, {split.tokens:,} tokens, {len(split.shards):,} shards"
        lines.append(f"  {name}: {counts}")
    lines.append(
        f"  vocabulary: {manifest.vocab_size:,}, tokenizer {manifest.tokenizer_sha256}"
    )
    lines.append(f"  documents: {ENDS[manifest.document_ends]}")
    for corpus in manifest.raw.get("corpora", []):
        for source in corpus.get("sources", []):
            lines.append(f"  from {source['root']}/{source['pattern']}")
        for reason, entry in corpus.get("skipped", {}).items():
            examples = ", ".join(entry["names"][:3])
            lines.append(
                f"  left out, {reason}: {entry['count']:,}, such as {examples}"
            )
    return "\n".join(printable(line) for line in lines)


def sequence(recipe: Recipe, position: int) -> str:
    """Which sequence a run of the recipe trains at this position: its place, its documents and its text.

    Raises:
        StoreError: a store is absent or damaged.
    """
    order = read_order(recipe.data, recipe.seed)
    seq_len = recipe.data.seq_len
    [(number, window)] = order.windows([position])
    store = TokenStore.open(order.manifests[number].folder)
    tokenizer = store_tokenizer(store.manifest)
    start = window * seq_len
    tokens = store.tokens(start, start + seq_len)
    of_this_store = order.sequences(position + 1)[number]
    epoch = (of_this_store - 1) // order.n_windows[number]
    lines = [
        f"position {position}: window {window} of {store.manifest.folder}, epoch {epoch}"
    ]
    for piece in pieces(store, start, start + seq_len):
        where = f"document {piece.document}, number {piece.number} of {piece.file}"
        text = tokenizer.decode(tokens[piece.start : piece.stop].tolist())
        lines.append(f"  tokens {piece.start} to {piece.stop - 1}: {where}")
        lines.append(f"    {text!r}")
    return "\n".join(lines)


def pieces(store: TokenStore, start: int, stop: int) -> Iterator[Piece]:
    """The documents in tokens [start, stop) of a split."""
    tokens = store.tokens(start, stop)
    cuts = np.flatnonzero(tokens == store.manifest.bos_id)
    if store.manifest.document_ends == "eos":
        cuts = cuts + 1  # the next document begins after it
    bounds = sorted({0, *cuts.tolist(), len(tokens)})
    document = store.document(start)
    for begin, end in itertools.pairwise(bounds):
        file, number = _origin(store, document)
        yield Piece(begin, end, document, file, number)
        document += 1


def _origin(store: TokenStore, document: int) -> tuple[str, int]:
    """The file that a document of the split came from, and which of those that the file gave to the split it is."""
    column = 3 + SPLITS.index(
        store.split
    )  # of a row: root, file, bytes, documents in train, in validation
    number = document
    for corpus in store.manifest.raw.get("corpora", []):
        for row in _listed_files(
            store.manifest.folder / corpus["list"]["file"], corpus["list"]["sha256"]
        ):
            if number < row[column]:
                return f"{row[0]}/{row[1]}", number
            number -= row[column]
    raise StoreError(
        f"{store.manifest.folder} does not tell which file that document came from; {AGAIN}"
    )


def _listed_files(path: Path, sha256: str) -> list[list[Any]]:
    """The rows of a corpus' list of files."""
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != sha256:
        raise StoreError(f"{path} is missing or damaged (SHA-256 differs); {AGAIN}")
    rows: list[list[Any]] = json.loads(content)["files"]
    return rows


def verify(folder: str) -> str:
    """Reads every byte of a store. Raises StoreError at the first that is not what the manifest states."""
    manifest = read_manifest(folder)
    for name, split in manifest.splits.items():
        if split.tokens:
            TokenStore.open(folder, name).verify()
    return summary(manifest, "every byte is what the manifest states")
