"""A corpus of 300 million sequences, 615B tokens: opened and read at any position as a small one is."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parents[2]
SEQUENCES, S, SHARD = 300_000_000, 2048, 2**26

MEASURE = """
import resource, sys, time
import numpy, torch
from stackgrow.data.loader import TokenLoader, WindowDataset
from stackgrow.recipe.keys import Data

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

before, began = resident(), time.process_time()  # not the clock: the machine may be busy
data = WindowDataset.open(Data(path=sys.argv[1], seq_len=2048), seed=7)
loader = TokenLoader(data, global_batch=8, micro_batch=8, dp_rank=0, dp_world_size=1, start_position=2**28 + 3)
batch, labels = next(iter(loader))
opening = time.process_time() - began
print(opening, resident() - before, data.order.n_windows[0], int(batch["input"].sum()))

def seconds(data, positions):
    began = time.process_time()
    data.__getitems__(positions)
    return time.process_time() - began

def slowest(data):
    n = data.order.n_windows[0]  # the best of ten, each of other positions
    return max(
        min(seconds(data, list(range(place + 4096 * i, place + 4096 * i + 8))) for i in range(10))
        for place in (0, n // 2, n - 8, 5 * n + 17)
    )

print(slowest(data), resident() - before)
print(slowest(WindowDataset.open(Data(path=sys.argv[2], seq_len=2048), seed=7)))
"""


def test_opening_and_reading_do_not_grow_with_the_corpus(tmp_path: Path) -> None:
    store = sparse_store(tmp_path / "store", SEQUENCES * S + 1)
    small = sparse_store(tmp_path / "small", 10_000 * S + 1)
    command = [sys.executable, "-c", MEASURE, str(store), str(small)]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    seconds, memory, windows, _, huge, memory_after, little = map(
        float, done.stdout.split()
    )
    print(
        f"opening and the first batch: {seconds:.3f} s, {memory / 2**20:.1f} MiB; any 8 positions: {huge * 1e3:.2f} ms"
    )
    assert windows == SEQUENCES
    assert seconds < 1
    assert memory < 50e6
    assert memory_after < 50e6, "nor after positions in six epochs"
    assert huge < 5 * little + 0.005


def sparse_store(folder: Path, tokens: int) -> Path:
    """A store whose shards are holes: they have their size and take no room on the disk."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(b"")
    shards = []
    for number, start in enumerate(range(0, tokens, SHARD)):
        count = min(SHARD, tokens - start)
        path = folder / f"train-00-{number:04d}-0000.npy"
        with path.open("wb") as stream:
            header = {"descr": "<u2", "fortran_order": False, "shape": (count,)}
            np.lib.format.write_array_header_1_0(stream, header)
            size = stream.tell() + 2 * count
            stream.truncate(size)
        sha256 = hashlib.sha256(path.name.encode()).hexdigest()
        shards.append(
            {
                "file": path.name,
                "tokens": count,
                "documents": 1,
                "sha256": sha256,
                "bytes": size,
            }
        )
    splits = {
        "train": {"tokens": tokens, "documents": len(shards), "shards": shards},
        "validation": {"tokens": 0, "documents": 0, "shards": []},
    }
    tokenizer = {"file": "tokenizer.model", "sha256": hashlib.sha256(b"").hexdigest()}
    manifest = {
        "format": 1,
        "dtype": "uint16",
        "vocab_size": 32000,
        "bos_id": 1,
        "tokenizer": tokenizer,
    }
    (folder / "manifest.json").write_text(
        json.dumps({**manifest, "splits": splits}), encoding="utf-8"
    )
    return folder
