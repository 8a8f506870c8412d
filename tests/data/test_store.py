"""Token stores: what is read is what was written, and damage is found before training starts."""

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stackgrow.data import store as store_module
from stackgrow.data.inspect import verify
from stackgrow.data.prepare import Source, prepare
from stackgrow.data.store import StoreError, TokenStore, read_manifest
from stackgrow.data.tokenizer import Tokenizer

TEXTS = {
    f"{i:02d}.txt": f"document {i}\n" + "some words of text, " * (i + 1)
    for i in range(60)
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    for name, text in TEXTS.items():
        (root / name).write_text(text, encoding="utf-8")
    out = tmp_path_factory.mktemp("out") / "store"
    prepare(
        [Source(str(root))], out, tokenizer=300, validation=0.1, tokens_per_shard=1000
    )
    return out


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "store"))


def edit(folder: Path, *keys: Any, value: Any) -> None:
    """Sets one value of the manifest."""
    raw = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    node = raw
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    (folder / "manifest.json").write_text(json.dumps(raw), encoding="utf-8")


def test_a_shard_that_the_disk_does_not_give_is_named(prepared: Path) -> None:
    store = TokenStore.open(prepared)
    store.tokens(0, 10)
    (shard,) = list(store._files)
    broken = os.open("/proc/self/mem", os.O_RDONLY)  # reading there is EIO
    os.dup2(broken, store._files[shard])
    os.close(broken)
    with pytest.raises(OSError, match="Input/output error") as told:
        store.tokens(0, 10)
    assert told.value.filename == str(prepared / store.shards[shard].file)


def test_stream_is_the_documents_in_order_each_after_bos(prepared: Path) -> None:
    tokenizer = Tokenizer.load(prepared / "tokenizer.model")
    texts = []
    for split in ("train", "validation"):
        store = TokenStore.open(prepared, split)
        tokens = store.tokens(0, store.n_tokens)
        assert tokens.dtype == np.uint16
        starts = np.flatnonzero(tokens == tokenizer.bos_id)
        assert starts[0] == 0
        part = [
            tokenizer.decode(piece[1:].tolist())
            for piece in np.split(tokens, starts[1:])
        ]
        assert part == sorted(part, key=lambda text: int(text.split()[1])), (
            "ordered by path"
        )
        texts += part
        store.verify()
    assert sorted(texts) == sorted(TEXTS.values()), "each document in exactly one split"


def test_any_range_across_shards(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "OPEN_SHARDS", 2)
    store = TokenStore.open(prepared)
    arrays = [np.load(prepared / shard.file, mmap_mode="r") for shard in store.shards]
    assert len(arrays) > 3
    assert {len(array) for array in arrays[:-1]} == {1000}
    whole = np.concatenate(arrays)
    rng = np.random.default_rng(0)
    ranges = [
        (0, 0),
        (0, len(whole)),
        (999, 1001),
        (1000, 2000),
        (len(whole), len(whole)),
    ]
    for start, stop in [
        *ranges,
        *np.sort(rng.integers(0, len(whole) + 1, (200, 2))).tolist(),
    ]:
        assert np.array_equal(store.tokens(start, stop), whole[start:stop])
        assert len(store._files) <= 2
    for start, stop in [(-1, 3), (5, 4), (0, len(whole) + 1)]:
        with pytest.raises(IndexError):
            store.tokens(start, stop)


def test_a_store_has_as_many_windows_as_fit_with_their_labels(prepared: Path) -> None:
    store = TokenStore.open(prepared)
    n = store.n_tokens
    assert [store.windows(s) for s in (n, n - 1, n // 2, 1)] == [
        0,
        1,
        2 if n % 2 else 1,
        n - 1,
    ]


def test_pickles_without_open_files(prepared: Path) -> None:
    store = TokenStore.open(prepared)
    before = store.tokens(0, store.n_tokens)
    content = pickle.dumps(store)
    assert len(content) < 10_000
    assert np.array_equal(pickle.loads(content).tokens(0, store.n_tokens), before)


def test_manifest_reads_without_numpy_or_torch(prepared: Path) -> None:
    code = (
        "import sys; from stackgrow.data.store import read_manifest; "
        f"read_manifest({str(prepared)!r}); sys.exit(bool({{'numpy', 'torch'}} & set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parents[2]
        ).returncode
        == 0
    )


def test_hash_depends_on_content_order_and_split_only(copy: Path) -> None:
    hashes = [read_manifest(copy).hash(split) for split in ("train", "validation")]
    assert hashes[0] != hashes[1]
    edit(copy, "sources", value=[])
    edit(copy, "versions", value={})
    assert read_manifest(copy).hash("train") == hashes[0]
    shards = read_manifest(copy).raw["splits"]["train"]["shards"]
    edit(copy, "splits", "train", "shards", value=[shards[1], shards[0], *shards[2:]])
    assert read_manifest(copy).hash("train") != hashes[0]


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (
            ("splits", "train", "shards", 0, "file"),
            "../train-00-0000-0000.npy",
            "not a plain file name",
        ),
        (
            ("splits", "train", "shards", 0, "file"),
            "/etc/passwd",
            "not a plain file name",
        ),
        (("splits", "train", "shards", 0, "file"), "..", "not a plain file name"),
        (("splits", "train", "shards", 0, "file"), "a\\b.npy", "not a plain file name"),
        (("tokenizer", "file"), "../tokenizer.model", "not a plain file name"),
        (
            ("splits", "validation", "shards", 0, "file"),
            "train-00-0000-0001.npy",
            "names train-00-0000-0001.npy twice",
        ),
        (("format",), 2, "not a token store of format 1"),
        (("dtype",), "float32", "disagree"),
        (("dtype",), "object", "disagree"),
        (("vocab_size",), 2**17, "disagree"),
        (("bos_id",), 300, "disagree"),
        (("splits", "train", "tokens"), 7, "claims 7 tokens"),
        (("splits", "train", "shards", 0, "tokens"), -1, "not a count"),
        (("splits", "train", "shards", 0, "bytes"), "1", "not a count"),
        (("splits",), {}, "lacks 'train'"),
        (("splits",), [], "malformed"),
        (("tokenizer",), "tokenizer.model", "malformed"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    copy: Path, keys: tuple[Any, ...], value: Any, message: str
) -> None:
    edit(copy, *keys, value=value)
    with pytest.raises(StoreError, match=message) as caught:
        TokenStore.open(copy)
    assert str(copy / "manifest.json") in str(caught.value)


def test_a_folder_without_a_whole_manifest_is_no_store(
    tmp_path: Path, copy: Path
) -> None:
    for path in (tmp_path, tmp_path / "absent", copy / "manifest.json"):
        with pytest.raises(StoreError, match="is not a token store"):
            read_manifest(path)
    (copy / "manifest.json").write_text(
        (copy / "manifest.json").read_text(encoding="utf-8")[:-20], encoding="utf-8"
    )
    with pytest.raises(StoreError, match="cannot be read"):
        read_manifest(copy)


@pytest.mark.parametrize(
    "name",
    ["manifest.json", "tokenizer.model", "sources-00.json", "train-00-0000-0001.npy"],
)
def test_a_pipe_in_the_place_of_a_file_is_told(copy: Path, name: str) -> None:
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(StoreError, match=name.replace(".", r"\.")):
        verify(str(copy))


def test_a_token_beyond_the_vocabulary_is_told_when_it_is_read(copy: Path) -> None:
    """The manifest agrees with the file: whoever wrote them, an embedding must not be indexed with it."""
    path = copy / "train-00-0000-0001.npy"
    content = bytearray(path.read_bytes())
    content[-6:-4] = (300).to_bytes(2, "little")  # of a vocabulary of 300
    path.write_bytes(content)
    edit(
        copy,
        "splits",
        "train",
        "shards",
        1,
        "sha256",
        value=hashlib.sha256(content).hexdigest(),
    )
    store = TokenStore.open(copy)
    told = r"train-00-0000-0001\.npy holds token id 300 at 997, beyond the vocabulary of 300; prepare the store again"
    with pytest.raises(StoreError, match=told):
        store.tokens(1900, 2100)
    store.tokens(0, 1997)
    with pytest.raises(StoreError, match=told):
        store.verify()


@pytest.mark.parametrize(
    ("vocabulary", "model", "fits"),
    [
        (32000, 32000, True),
        (50257, 50304, True),  # GPT-2's, to a multiple of 128
        (151669, 151936, True),  # Qwen's
        (200019, 201088, True),  # gpt-oss's
        (300, 320, True),
        (32000, 31999, False),
        (32000, 32001, False),  # no multiple of 64
        (32000, 31936, False),
        (32000, 64000, False),  # another tokenizer's
        (300, 512, False),
    ],
)
def test_a_vocabulary_may_be_padded(
    prepared: Path, vocabulary: int, model: int, fits: bool
) -> None:
    manifest = dataclasses.replace(read_manifest(prepared), vocab_size=vocabulary)
    assert manifest.fits(model) == fits


def test_shard_of_another_size_or_absent(copy: Path) -> None:
    shard = copy / "train-00-0000-0001.npy"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(
        StoreError,
        match=r"train-00-0000-0001\.npy has 2126 bytes, the manifest states 2128",
    ):
        TokenStore.open(copy)
    shard.unlink()
    with pytest.raises(StoreError, match=r"train-00-0000-0001\.npy is missing"):
        TokenStore.open(copy)


def test_flipped_bit_is_found_by_verify(copy: Path) -> None:
    for name in ("train-00-0000-0002.npy", "tokenizer.model", "sources-00.json"):
        path = copy / name
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(StoreError, match=f"{name} is damaged"):
            TokenStore.open(copy).verify()
        path.write_bytes(content)
    TokenStore.open(copy).verify()


def test_shard_that_is_not_what_it_claims(copy: Path) -> None:
    """Sizes agree, contents do not: a pickled array is refused, and so is another dtype."""
    path = copy / "train-00-0000-0000.npy"
    size = path.stat().st_size
    for dtype in (object, np.int16):
        with path.open("wb") as stream:
            np.save(stream, np.zeros(1000, dtype))
        path.write_bytes(path.read_bytes().ljust(size, b"\0")[:size])
        store = TokenStore.open(copy)
        for _ in range(2):
            with pytest.raises(StoreError, match=r"train-00-0000-0000\.npy"):
                store.tokens(0, 5)
