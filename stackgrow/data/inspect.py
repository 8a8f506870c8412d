"""What token stores hold, and what stands at a position of a run: for people."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from stackgrow.data.order import read_order
from stackgrow.data.store import AGAIN, Manifest, StoreError, TokenStore, read_manifest
from stackgrow.data.tokenizer import store_tokenizer
from stackgrow.recipe.keys import Recipe
from stackgrow.text import printable


@dataclass(frozen=True)
class Piece:
    """The part of a training sequence that one document makes up: tokens [start, stop) of the sequence, and that the
    document is the ``number``-th (from 0) of those that a file gave to the split."""

    start: int
    stop: int
    document: int
    file: str
    number: int


def summary(manifest: Manifest, what: str) -> str:
    """Counts, the tokenizer, and what was left out and why."""
    lines = [f"{manifest.folder}: {what}"]
    for name, split in manifest.splits.items():
        counts = f"{split.documents:,} documents, {split.tokens:,} tokens, {len(split.shards):,} shards"
        lines.append(f"  {name}: {counts}")
    lines.append(f"  vocabulary: {manifest.vocab_size:,}, tokenizer {manifest.tokenizer_sha256}")
    for corpus in manifest.raw.get("corpora", []):
        lines += [f"  from {source['root']}/{source['pattern']}" for source in corpus.get("sources", [])]
        for why, entry in corpus.get("skipped", {}).items():
            lines.append(f"  left out, {why}: {entry['count']:,}, such as {', '.join(entry['names'][:3])}")
    return "\n".join(map(printable, lines))


def sequence(recipe: Recipe, position: int) -> str:
    """Which sequence a run of the recipe trains at this position: its place, its documents and its text.

    Raises:
        StoreError: a store is absent or damaged.
    """
    order, S = read_order(recipe.data, recipe.seed), recipe.data.seq_len
    which, window = order.windows([position])[0]
    store = TokenStore.open(order.manifests[which].folder)
    tokenizer = store_tokenizer(store.manifest)
    tokens = store.tokens(window * S, window * S + S)
    epoch = (order.sequences(position + 1)[which] - 1) // order.n_windows[which]
    lines = [f"position {position}: window {window} of {store.manifest.folder}, epoch {epoch}"]
    for piece in pieces(store, window * S, window * S + S):
        where = f"document {piece.document}, number {piece.number} of {piece.file}"
        lines += [
            f"  tokens {piece.start} to {piece.stop - 1}: {where}",
            f"    {tokenizer.decode(tokens[piece.start : piece.stop].tolist())!r}",
        ]
    return "\n".join(lines)


def pieces(store: TokenStore, start: int, stop: int) -> Iterator[Piece]:
    """The documents in tokens [start, stop) of a split."""
    begins = np.flatnonzero(store.tokens(start, stop) == store.manifest.bos_id)
    cuts = sorted({0, *begins.tolist(), stop - start})
    first = store.document(start)
    for i, (a, b) in enumerate(itertools.pairwise(cuts)):
        yield Piece(a, b, first + i, *_origin(store, first + i))


def _origin(store: TokenStore, document: int) -> tuple[str, int]:
    column = {"train": 3, "validation": 4}[store.split]
    for corpus in store.manifest.raw.get("corpora", []):
        path = store.manifest.folder / corpus["list"]["file"]
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != corpus["list"]["sha256"]:
            raise StoreError(f"{path} is damaged (SHA-256 differs); {AGAIN}")
        for row in json.loads(content)["files"]:
            if document < row[column]:
                return f"{row[0]}/{row[1]}", document
            document -= row[column]
    raise StoreError(f"{store.manifest.folder} does not tell which file that document came from; {AGAIN}")


def verify(folder: str) -> str:
    """Reads every byte of a store. Raises StoreError at the first that is not what the manifest states."""
    manifest = read_manifest(folder)
    for name, split in manifest.splits.items():
        if split.tokens:
            TokenStore.open(folder, name).verify()
    return summary(manifest, "every byte is what the manifest states")
