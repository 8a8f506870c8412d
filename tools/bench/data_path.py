"""Tokens per second of the data path, beside its peers and its limits, in one run.

    make bench-data                       into an environment of its own: litdata brings torchvision, which breaks
                                          transformers where torch is a CPU build

Loading, one process, the same tokens in sequences of 2,048, eight at a time: stackgrow's loader; torchtitan's own,
which encodes Hugging Face text as it goes; litdata's StreamingDataset of tokens; and the limit, random windows of a
memory map. Preparing, on all cores: what tools/prepare_data.py does from *.jsonl.zst to a store; and the limit,
SentencePiece alone in a loop in as many processes. The contestants take turns; figures are medians.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow

from stackgrow.data.prepare import prepare
from stackgrow.data.read import FileReader, Skipped, Source, list_files, stdlib_source
from stackgrow.data.store import TokenStore
from stackgrow.data.tokenizer import train_tokenizer

# Not torch: the processes that prepare load what this one does, and in tools/prepare_data.py that is without it.
if TYPE_CHECKING:
    from torch import Tensor

    Batches = Iterator[Tensor]  # int64 [BATCH, SEQ_LEN]

SEQ_LEN, BATCH, VOCABULARY = 2048, 8, 4096


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="turns of each loader (default: 5)"
    )
    parser.add_argument(
        "--seconds", type=float, default=1.5, help="of one turn (default: 1.5)"
    )
    parser.add_argument(
        "--megabytes", type=int, default=90, help="of text to prepare (default: 90)"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if importlib.util.find_spec("litdata") is None:
        parser.error(
            "litdata is not installed here: `make bench-data` makes an environment for it"
        )
    texts = stdlib_texts()
    with tempfile.TemporaryDirectory() as folder:
        report: dict[str, Any] = {
            "cores": os.cpu_count(),
            "sequence": SEQ_LEN,
            "batch": BATCH,
            **loading(texts, Path(folder), args.rounds, args.seconds),
            **preparing(texts, Path(folder), args.megabytes),
        }
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    for name, value in report.items():
        digits = 2 if value < 100 else 0
        print(f"{name:<46}{value:,.{digits}f}")
    return 0


def stdlib_texts() -> list[str]:
    source = stdlib_source()
    reader = FileReader(source.root, text_key="text", drop=(), skipped=Skipped())
    texts = []
    for file in list_files([source], Skipped()):
        texts += [document.text for document in reader.read_file(file.name)]
    return texts


def write_rows(texts: list[str], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if file.suffix == ".zst":
        rows = pyarrow.compress(rows, "zstd", asbytes=True)
    file.write_bytes(rows)


def loading(
    texts: list[str], folder: Path, rounds: int, seconds: float
) -> dict[str, float]:
    write_rows(texts, folder / "rows" / "a.jsonl")
    tokenizer = byte_level(texts, folder / "hf")
    prepare(
        [Source(str(folder / "rows"))],
        folder / "store",
        tokenizer=tokenizer,
        validation=0,
    )
    store = TokenStore.open(folder / "store")
    contestants = {
        "stackgrow": stackgrow_batches(store),
        "torchtitan": torchtitan_batches(folder),
        "litdata": litdata_batches(store, folder / "litdata"),
        "memmap": memmap_batches(folder / "store" / store.shards[0].file),
    }
    for batches in contestants.values():
        for _ in range(3):  # files are opened and processes warm
            assert next(batches).shape == (BATCH, SEQ_LEN)
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, batches in contestants.items():
            rates[name].append(rate(batches, seconds))
    report = {
        f"loading, {name}, tokens per second": statistics.median(values)
        for name, values in rates.items()
    }
    for peer in ("torchtitan", "litdata", "memmap"):
        ratios = [
            ours / theirs
            for ours, theirs in zip(rates["stackgrow"], rates[peer], strict=True)
        ]
        report[f"loading, stackgrow / {peer}"] = statistics.median(ratios)
    return report


def rate(batches: Batches, seconds: float) -> float:
    """Tokens per second over at least ``seconds``."""
    count = 0
    elapsed = 0.0
    began = time.perf_counter()
    while elapsed < seconds:
        for _ in range(4):
            next(batches)
        count += 4
        elapsed = time.perf_counter() - began
    return count * BATCH * SEQ_LEN / elapsed


def stackgrow_batches(store: TokenStore) -> Batches:
    from stackgrow.data.loader import TokenLoader, WindowDataset

    data = WindowDataset([store], [1.0], SEQ_LEN, seed=1)
    loader = TokenLoader(
        data, global_batch=BATCH, micro_batch=BATCH, dp_rank=0, dp_world_size=1
    )
    return (inputs["input"] for inputs, _ in loader)


def memmap_batches(shard: Path) -> Batches:
    import torch

    tokens = np.load(shard, mmap_mode="r")
    starts = np.random.default_rng(1).integers(0, len(tokens) - SEQ_LEN - 1, 1 << 16)
    while True:
        for at in range(0, len(starts), BATCH):
            inputs = np.empty((BATCH, SEQ_LEN), np.int64)
            labels = np.empty((BATCH, SEQ_LEN), np.int64)
            for row, start in enumerate(starts[at : at + BATCH].tolist()):
                inputs[row] = tokens[start : start + SEQ_LEN]
                labels[row] = tokens[start + 1 : start + SEQ_LEN + 1]
            yield torch.from_numpy(inputs)


def torchtitan_batches(folder: Path) -> Batches:
    from stackgrow.titan import device

    device.install()
    from datasets import load_dataset
    from torchtitan.components.tokenizer import HuggingFaceTokenizer
    from torchtitan.config import JobConfig
    from torchtitan.hf_datasets import DatasetConfig, text_datasets

    def load(path: str) -> Any:
        return load_dataset(
            "json",
            data_files=f"{path}/a.jsonl",
            split="train",
            cache_dir=str(folder / "cache"),
        )

    text_datasets.DATASETS["bench"] = DatasetConfig(
        str(folder / "rows"), load, lambda row: row["text"]
    )
    job = JobConfig()
    job.training.dataset = "bench"
    job.training.dataset_path = None
    job.training.local_batch_size = BATCH
    job.training.seq_len = SEQ_LEN
    loader = text_datasets.build_text_dataloader(
        1, 0, HuggingFaceTokenizer(str(folder / "hf")), job
    )
    return (inputs["input"] for inputs, _ in loader)


def litdata_batches(store: TokenStore, folder: Path) -> Batches:
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader, optimize

    part = 1 << 18
    inputs = list(range(0, store.n_tokens - part, part))
    parts = TokenParts(store, part)
    optimize(
        parts,
        inputs,
        str(folder),
        chunk_size=(SEQ_LEN + 1) * 8192,
        item_loader=TokensLoader(),
        num_workers=1,
    )
    data = StreamingDataset(
        str(folder), item_loader=TokensLoader(block_size=SEQ_LEN + 1), shuffle=True
    )
    loader = StreamingDataLoader(data, batch_size=BATCH, num_workers=0, drop_last=True)
    while True:
        for batch in loader:
            yield batch[:, :-1].long()


class TokenParts:
    """What litdata stores of a part of the corpus."""

    def __init__(self, store: TokenStore, size: int):
        self.store = store
        self.size = size

    def __call__(self, start: int) -> Iterator[Tensor]:
        import torch

        yield torch.from_numpy(
            self.store.tokens(start, start + self.size).astype(np.int64)
        )


def byte_level(texts: list[str], folder: Path) -> Path:
    """A tokenizer that torchtitan reads, too."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    model.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    folder.mkdir()
    model.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder / "tokenizer.json"


def preparing(
    texts: list[str], folder: Path, megabytes: int, rounds: int = 2
) -> dict[str, float]:
    workers = os.cpu_count() or 1
    model = folder / "tokenizer.model"
    model.write_bytes(train_tokenizer(texts, VOCABULARY).model)
    size = sum(len(text) for text in texts)
    repeats = max(workers, round(megabytes * 1e6 / size))
    for i in range(repeats):
        for part in range(
            4
        ):  # in tasks of about the same size, as those of a large corpus are
            rows = [f"# {i}\n{text}" for text in texts[part::4]]
            write_rows(rows, folder / "corpus" / f"{i:03d}-{part}.jsonl.zst")
    limit = []
    ours = []
    for i in range(rounds):
        limit.append(sentencepiece_alone(texts, repeats, model, workers))
        began = time.perf_counter()
        manifest, _ = prepare(
            [Source(str(folder / "corpus"))],
            folder / f"prepared-{i}",
            tokenizer=model,
            workers=workers,
        )
        assert manifest is not None
        tokens = sum(split.tokens for split in manifest.splits.values())
        ours.append(tokens / (time.perf_counter() - began))
    ratios = [a / b for a, b in zip(ours, limit, strict=True)]
    return {
        "preparing, workers": workers,
        "preparing, stackgrow, tokens per second": statistics.median(ours),
        "preparing, SentencePiece alone": statistics.median(limit),
        "preparing, stackgrow / SentencePiece": statistics.median(ratios),
    }


@dataclass(frozen=True)
class Encoded:
    """What one process has encoded, on the clock that all processes of a machine share."""

    tokens: int
    began: float
    ended: float


def sentencepiece_alone(
    texts: list[str], repeats: int, model: Path, workers: int
) -> float:
    """Tokens per second of all processes together, from the first call to the last."""
    shares = [repeats // workers] * workers
    for worker in range(repeats % workers):
        shares[worker] += 1
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(time.sleep, [0.2] * workers))  # they are there
        parts = list(
            pool.map(encode_all, [texts] * workers, shares, [str(model)] * workers)
        )
    tokens = sum(part.tokens for part in parts)
    seconds = max(part.ended for part in parts) - min(part.began for part in parts)
    return tokens / seconds


def encode_all(texts: list[str], repeats: int, model: str) -> Encoded:
    import sentencepiece

    encoder = sentencepiece.SentencePieceProcessor(model_file=model)
    tokens = 0
    began = time.monotonic()
    for _ in range(repeats):
        for text in texts:
            tokens += len(encoder.encode(text))
    return Encoded(tokens, began, time.monotonic())


if __name__ == "__main__":
    sys.exit(main())
