"""Preparation: the same bytes whatever stops it and however many work, complete or absent, and no silent loss."""

import fcntl
import gzip
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow
import pyarrow.parquet
import pytest
from http_for_tests import served
from test_tokenizer import byte_level

from stackgrow.data import prepare as prepare_module
from stackgrow.data import write
from stackgrow.data.inspect import pieces
from stackgrow.data.order import Order
from stackgrow.data.prepare import PRESETS, PrepareError, prepare
from stackgrow.data.read import Skipped, Source, list_files, stdlib_source
from stackgrow.data.store import Manifest, StoreError, TokenStore, read_manifest
from stackgrow.data.tokenizer import (
    Tokenizer,
    TokenizerError,
    store_tokenizer,
    train_tokenizer,
)

REPOSITORY = Path(__file__).parents[2]
LETTERS = str.maketrans("0123456789", "ghijklmnop")
TOOL = [sys.executable, "tools/prepare_data.py"]


def words(seed: object, count: int) -> str:
    return " ".join(
        hashlib.sha256(f"{seed} {i}".encode()).hexdigest().translate(LETTERS)
        for i in range(count)
    )


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    root = tmp_path / "corpus"
    for i in range(60):
        path = root / f"d{i % 3}" / f"{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f"def f{i}():\n    return {words(i, i % 7 + 1)}\n", encoding="utf-8"
        )
    return root


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "data" / "store"


@pytest.fixture
def tasks_of_100_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "TASK_BYTES", 100)


def made(corpus: Path, out: Path, **options: Any) -> Manifest:
    known = {"tokenizer": 400, "tokens_per_shard": 500}
    manifest, _ = prepare([Source(str(corpus))], out, **{**known, **options})
    assert manifest is not None
    return manifest


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def texts(folder: Path, split: str = "train") -> list[str]:
    """The documents of a split, without what opens and closes them, which must be there."""
    store = TokenStore.open(folder, split)
    store.verify()
    tokenizer = store_tokenizer(store.manifest)
    ends = store.manifest.document_ends
    documents = []
    for piece in pieces(store, 0, store.n_tokens):
        ids = store.tokens(piece.start, piece.stop).tolist()
        if ends != "eos":
            assert ids.pop(0) == tokenizer.bos_id
        if ends != "bos":
            assert ids.pop() == tokenizer.eos_id
        documents.append(tokenizer.decode(ids))
    return documents


def skipped(manifest: Manifest) -> dict[str, int]:
    return {
        why: entry["count"]
        for corpus in manifest.raw["corpora"]
        for why, entry in corpus["skipped"].items()
    }


def tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [*TOOL, *map(str, arguments)]
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )


@pytest.mark.usefixtures("tasks_of_100_bytes")
def test_any_number_of_workers_gives_the_same_bytes(corpus: Path, out: Path) -> None:
    for workers in (1, 3):
        manifest = made(
            corpus, out.with_name(f"{workers}"), validation=0.1, workers=workers
        )
        assert len(manifest.splits["train"].shards) > 30
    assert contents(out.with_name("1")) == contents(out.with_name("3"))
    assert not list(out.parent.glob(".*"))
    assert (
        len(texts(out.with_name("3"))) + len(texts(out.with_name("3"), "validation"))
        == 60
    )


def test_documents_stand_in_order_of_their_names_in_shards_of_the_stated_size(
    corpus: Path, out: Path
) -> None:
    manifest = made(corpus, out, validation=0)
    expected = [
        (corpus / file).read_text(encoding="utf-8") for _, file, *_ in listing(out)
    ]
    assert texts(out) == expected
    assert [file for _, file, *_ in listing(out)] == sorted(
        file for _, file, *_ in listing(out)
    )
    assert {shard.tokens for shard in manifest.splits["train"].shards[:-1]} == {500}


def listing(store: Path) -> list[list[Any]]:
    return json.loads((store / "sources-00.json").read_text(encoding="utf-8"))["files"]


def prepare_or_die(corpus: Path, out: Path, seed: int) -> None:
    """A preparation that kills itself at one of the steps that leave a trace on the disk."""
    chance = random.Random(seed)

    def kill_at_random(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if chance.random() < 0.06:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments, **options)
            if chance.random() < 0.06:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    for module, names in {
        write: ["write_file", "write_json"], prepare_module: ["write_file", "write_json"], os: ["fsync"],
        Path: ["rename", "replace"], shutil: ["rmtree"], prepare_module._Local: ["mark_rank_as_completed"],
    }.items():  # fmt: skip
        for name in names:
            setattr(module, name, kill_at_random(getattr(module, name)))
    made(corpus, out)


@pytest.mark.usefixtures("tasks_of_100_bytes")
def test_killed_at_random_twenty_times(
    corpus: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every kind of step that leaves a trace on the disk; what a rerun makes is what was made without a stop."""
    monkeypatch.setattr(prepare_module, "TASK_BYTES", 1000)
    whole = out.with_name("whole")
    made(corpus, whole)
    kills = seed = 0
    while kills < 20:
        process = multiprocessing.get_context("fork").Process(
            target=prepare_or_die, args=(corpus, out, seed)
        )
        process.start()
        process.join(300)
        assert process.exitcode in (0, -signal.SIGKILL)
        kills, seed = kills + (process.exitcode != 0), seed + 1
        assert seed < 60
        if (out / "manifest.json").exists():  # a store is whole whenever it can be seen
            assert contents(out) == contents(whole)
            if process.exitcode == 0:
                shutil.rmtree(out)
    made(corpus, out)
    assert contents(out) == contents(whole)
    assert sorted(path.name for path in out.parent.iterdir()) == ["store", "whole"], (
        "leftovers are gone"
    )


def test_killed_with_its_workers_and_gone_on(
    corpus: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(30):
        (corpus / f"large{i}.txt").write_text(words(i, 3000), encoding="utf-8")
    arguments = ["--input", corpus, "--train-tokenizer", 400, "--workers", 2, "--out"]
    code = "import sys, runpy; from stackgrow.data import prepare as p; p.TASK_BYTES = 10**5; "
    code += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, TOOL[1], *map(str, [*arguments, out])]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, start_new_session=True, stderr=subprocess.DEVNULL
    )
    records = out.with_name(".store.partial") / "parts"
    deadline = time.monotonic() + 300
    while not (records.is_dir() and len(list(records.glob("*.json"))) >= 3):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    os.kill(process.pid, signal.SIGKILL)  # it alone
    process.wait()
    assert not still_running([child.pid for child in children]), (
        "its workers end with it"
    )
    # Completed is what datatrove has marked: a worker may have been killed between its part and the mark.
    marked = {path.name for path in (records.parent / "log" / "completions").iterdir()}
    before = {
        path: path.stat().st_mtime_ns
        for path in records.glob("*.json")
        if path.stem in marked
    }
    assert before
    assert not out.exists()
    monkeypatch.setattr(prepare_module, "TASK_BYTES", 10**5)
    monkeypatch.setattr(
        prepare_module, "finish", lambda work, out: after.update(stamps(work))
    )
    after: dict[Path, int] = {}

    def stamps(work: Path) -> dict[Path, int]:
        return {
            path: path.stat().st_mtime_ns for path in (work / "parts").glob("*.json")
        }

    with pytest.raises(StoreError):  # for finish did nothing
        prepare([Source(str(corpus))], out, tokenizer=400)
    assert before.items() <= after.items(), "what was completed is not done again"
    assert len(after) > len(before)


def test_killed_while_a_worker_starts(corpus: Path, out: Path) -> None:
    """The worker asks for its parent's end to be its own when the parent is gone already."""
    pids, script = out.parent / "pids", out.parent / "kill.py"
    pids.mkdir(parents=True)
    script.write_text(
        "import multiprocessing, os, pathlib, sys, threading, time\nfrom stackgrow.data import prepare as p\n"
        "p.TASK_BYTES, pids, start = 100, pathlib.Path(sys.argv[3]), p._start_worker\n"
        "def start_late():\n    (pids / str(os.getpid())).touch()\n"
        "    while os.getppid() == multiprocessing.parent_process().pid:\n        time.sleep(0.01)\n    start()\n"
        "p._start_worker = start_late\n"
        "def die():\n    while not any(pids.iterdir()):\n        time.sleep(0.01)\n    os.kill(os.getpid(), 9)\n"
        "if __name__ == '__main__':\n    threading.Thread(target=die).start()\n"
        "    p.prepare([p.Source(sys.argv[1])], sys.argv[2], tokenizer=400, workers=2)\n",
        encoding="utf-8",
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    arguments = [str(corpus), str(out), str(pids)]
    done = subprocess.run(
        [sys.executable, script, *arguments],
        env=environment,
        stderr=subprocess.DEVNULL,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL
    assert not still_running([int(path.name) for path in pids.iterdir()])


def still_running(pids: list[int]) -> list[int]:
    """Which do not end within 20 seconds; one that has ended may wait for ever for the process that adopted it."""
    deadline, zombie = time.monotonic() + 20, psutil.STATUS_ZOMBIE
    while alive := [
        pid
        for pid in pids
        if psutil.pid_exists(pid) and psutil.Process(pid).status() != zombie
    ]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    return alive


def test_killed_worker_is_told_of(corpus: Path, out: Path) -> None:
    script = out.parent / "kill.py"
    out.parent.mkdir()
    script.write_text(
        "import os, sys\nfrom stackgrow.data import prepare as p\np.TASK_BYTES = 100\n"
        "def die():\n    os.kill(os.getpid(), 9)\np._start_worker = die\n"
        "if __name__ == '__main__':\n"
        "    try:\n        p.prepare([p.Source(sys.argv[1])], sys.argv[2], tokenizer=400, workers=2)\n"
        "    except p.PrepareError as error:\n        sys.exit(str(error))\n",
        encoding="utf-8",
    )
    command = [sys.executable, str(script), str(corpus), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300
    )
    assert (
        "a worker was killed, perhaps for want of memory; run again to go on"
        in done.stderr
    )
    assert not out.exists()


def test_a_full_disk_is_told_and_then_it_goes_on(corpus: Path, out: Path) -> None:
    """A file may not grow beyond a limit, which is what a quota does; then the limit is gone, and it goes on."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, resource.RLIM_INFINITY))

    arguments = [
        "--input",
        corpus,
        "--train-tokenizer",
        400,
        "--out",
        out,
        "--workers",
        1,
    ]
    command = [*TOOL, *map(str, arguments)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    full = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=limit,
    )
    assert full.returncode == 2, full.stderr
    assert "prepare_data: [Errno 27] File too large: " in full.stderr
    assert "train-00-0000-0000.npy" in full.stderr
    assert not out.exists()
    assert not list(out.parent.rglob("*.tmp"))
    assert tool(*arguments).returncode == 0
    assert len(texts(out)) + len(texts(out, "validation")) == 60


@pytest.mark.parametrize(
    ("files", "validation", "expected"),
    [(1, 0.5, 0), (2, 0.0001, 1), (60, 0.0001, 1), (60, 0, 0)],
)
@pytest.mark.usefixtures("tasks_of_100_bytes")
def test_validation_is_not_empty_unless_asked(
    corpus: Path, out: Path, files: int, validation: float, expected: int
) -> None:
    for path in sorted(corpus.rglob("*.py"))[files:]:
        path.unlink()
    manifest = made(corpus, out, validation=validation, tokenizer=300)
    assert manifest.splits["validation"].documents == expected
    assert len(texts(out)) == files - expected


def test_no_document_is_left_for_training(corpus: Path, out: Path) -> None:
    with pytest.raises(PrepareError, match=r"60 held out \(--validation\)"):
        made(corpus, out, validation=0.999999, tokenizer=model_of(corpus, out))


def model_of(corpus: Path, out: Path) -> Path:
    """A tokenizer for other preparations."""
    folder = out.with_name("tokenizer")
    made(corpus, folder)
    return folder / "tokenizer.model"


@pytest.mark.parametrize("ends", ["bos", "eos", "both"])
@pytest.mark.usefixtures("tasks_of_100_bytes")
def test_documents_end_as_asked(corpus: Path, out: Path, ends: str) -> None:
    """What opens and closes each document, in the tokens, in the counts of every shard, and in the manifest."""
    model = model_of(corpus, out)
    manifest = made(
        corpus, out, tokenizer=model, document_ends=ends, tokens_per_shard=97
    )
    assert manifest.document_ends == ends
    assert manifest.bos_id == (2 if ends == "eos" else 1), (
        "what stands before a document"
    )
    assert manifest.eos_id == 2
    opened = store_tokenizer(manifest)
    assert (opened.bos_id, opened.eos_id) == (manifest.bos_id, 2), (
        "what evaluation and export put before a text"
    )
    assert sorted(texts(out) + texts(out, "validation")) == sorted(
        path.read_text(encoding="utf-8") for path in corpus.rglob("*.py")
    )
    assert len(manifest.splits["train"].shards) > 30
    with pytest.raises(PrepareError, match="prepared from other options"):
        made(
            corpus,
            out,
            tokenizer=model,
            document_ends="eos" if ends == "bos" else "bos",
            tokens_per_shard=97,
        )


def test_a_store_remembers_the_bos_that_was_named(corpus: Path, out: Path) -> None:
    """Its tokenizer's file does not say which it is: whoever opens the store later is told by the manifest."""
    folder = corpus.parent / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(byte_level(bos="[FIRST]", template=False))
    with pytest.raises(TokenizerError, match="--bos"):
        made(corpus, out, tokenizer=folder)
    manifest = made(corpus, out, tokenizer=folder, bos="[FIRST]")
    assert store_tokenizer(manifest).bos_id == manifest.bos_id == 0
    assert len(texts(out)) + len(texts(out, "validation")) == 60
    assert made(corpus, out, tokenizer=folder, bos="[FIRST]") == manifest
    with pytest.raises(PrepareError, match="prepared from other options"):
        made(corpus, out, tokenizer=folder, bos="<|end_of_text|>")
    made(corpus / "d0", out, tokenizer=folder, bos="[FIRST]", append=True)
    with pytest.raises(PrepareError, match="has a tokenizer of its own"):
        made(corpus / "d0", out, tokenizer=folder, bos="<|end_of_text|>", append=True)


def test_what_is_added_ends_as_the_stores_documents_do(corpus: Path, out: Path) -> None:
    made(corpus, out, document_ends="eos")
    more = corpus.parent / "more"
    more.mkdir()
    (more / "a.txt").write_text("more words", encoding="utf-8")
    with pytest.raises(PrepareError, match=r"was prepared with --document-ends eos"):
        made(more, out, tokenizer=None, append=True, document_ends="bos")
    made(more, out, tokenizer=None, append=True, validation=0)
    assert "more words" in texts(out)


def test_stores_of_other_document_ends_are_not_mixed(corpus: Path, out: Path) -> None:
    model = model_of(corpus, out)
    stores = [
        made(corpus, out.with_name(ends), tokenizer=model, document_ends=ends)
        for ends in ("bos", "eos")
    ]
    assert stores[0].hash("train") != stores[1].hash("train")
    with pytest.raises(
        StoreError, match=r"eos was prepared with --document-ends eos, .*bos with bos"
    ):
        Order(stores, [1, 1], 8, 7)


def test_split_is_by_document_and_stable(corpus: Path, out: Path) -> None:
    model = model_of(corpus, out)
    made(corpus, out.with_name("a"), validation=0.2, tokenizer=model)
    before = texts(out.with_name("a"), "validation")
    assert 3 <= len(before) <= 25
    (corpus / "new.py").write_text("x = 1\n", encoding="utf-8")
    (corpus / "copy.py").write_text(before[0], encoding="utf-8")
    made(corpus, out.with_name("b"), validation=0.2, tokenizer=model)
    assert sorted({*texts(out.with_name("b"), "validation")} - {"x = 1\n"}) == sorted(
        before
    ), "others do not move it"
    assert before[0] not in texts(out.with_name("b")), (
        "a copy of what is held out is held out"
    )


def test_patterns_choose_files_and_exclusions_leave_them_out(corpus: Path) -> None:
    (corpus / "top.py").write_text("top = 1\n", encoding="utf-8")
    (corpus / "d0" / "deep" / "test").mkdir(parents=True)
    (corpus / "d0" / "deep" / "test" / "t.py").write_text(
        "test = 1\n", encoding="utf-8"
    )
    (corpus / "notes.txt").write_text("notes\n", encoding="utf-8")

    def count(pattern: str, *exclude: str) -> int:
        return len(list_files([Source(str(corpus), pattern, exclude)], Skipped()))

    assert count("**/*") == 63
    assert count("**/*.py") == 62
    assert count("*.py") == 1
    assert count("d?/*.py") == 60
    assert count("**/*.py", "d1/*") == 42
    assert count("**/*.py", "*/test/*", "top.*") == 60


def test_files_left_out_are_reported(corpus: Path, out: Path) -> None:
    (corpus / "empty.py").touch()
    (corpus / "latin.py").write_bytes("é".encode("latin-1"))
    (corpus / "dangling.py").symlink_to(corpus / "nowhere")
    (corpus / "twin.py").symlink_to(corpus / "d0" / "0.py")
    (corpus / "linked").symlink_to(corpus / "d1")
    (corpus.parent / "elsewhere.py").write_text("real = 1\n", encoding="utf-8")
    (corpus / "link.py").symlink_to(corpus.parent / "elsewhere.py")
    os.mkfifo(corpus / "pipe.py")
    manifest = made(corpus, out)
    assert skipped(manifest) == {
        "not a regular file": 3,
        "same file found twice": 1,
        "empty": 1,
        "not UTF-8": 1,
    }
    assert sum(split.documents for split in manifest.splits.values()) == 61, (
        "a link to a file is a file"
    )


ROWS = [
    {"text": words("web", 9), "meta": {"redpajama_set_name": "RedPajamaC4"}},
    {"text": words("code", 9), "meta": {"redpajama_set_name": "RedPajamaGithub"}},
    {"text": "  \n"},
    {"text": ""},
    {"content": "under another key"},
    {"text": None},
    {"text": 7},
    {"text": words("books", 9), "meta": None},
]
LINES = b"\n".join(
    [
        *(json.dumps(row).encode() for row in ROWS),
        b"",
        b"[1]",
        b'{"text": "\xff"}',
        b'{"text": "cut',
    ]
)
LINES += b'\n{"text": "\\ud800 is half of a character"}\n'


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.zst", "jsonl.gz", "parquet"])
def test_rows_are_read_or_counted(tmp_path: Path, out: Path, kind: str) -> None:
    file = tmp_path / "in" / "train" / "chunk1" / f"a.{kind}"
    file.parent.mkdir(parents=True)
    expected = {"dropped, meta.redpajama_set_name = RedPajamaGithub": 1, "empty": 2}
    if kind == "parquet":
        rows = [
            row if isinstance(row.get("text"), str) else {**row, "text": None}
            for row in ROWS
        ]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        expected['no text under the key "text"'] = 3
    else:
        codec = {"jsonl.zst": "zstd", "jsonl.gz": "gzip"}.get(kind)
        half = LINES.index(b"\n") + 1
        frames = [
            pyarrow.compress(part, codec, asbytes=True) if codec else part
            for part in (LINES[:half], LINES[half:])
        ]
        file.write_bytes(b"".join(frames))  # two frames, as a file that was appended to
        expected |= {'no text under the key "text"': 4, "not UTF-8": 2, "not JSON": 1}
    options = {**PRESETS["slimpajama"], "validation": 0}
    source = Source(str(tmp_path / "in"), f"train/chunk*/*.{kind}")
    options.pop("pattern")
    manifest, _ = prepare([source], out, tokenizer=300, **options)
    assert manifest is not None
    assert texts(out) == [ROWS[0]["text"], ROWS[-1]["text"]]
    assert skipped(manifest) == expected
    names = manifest.raw["corpora"][0]["skipped"]["empty"]["names"]
    assert len(names) == 2
    assert names[0].startswith(f"train/chunk1/a.{kind}:")


def test_json_lines_are_utf_8_or_counted(tmp_path: Path, out: Path) -> None:
    """json.loads guesses the encoding of bytes, and took UTF-16 apart line by line."""
    rows = "".join(json.dumps({"text": words(i, 5)}) + "\n" for i in range(3))
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text("\ufeff" + rows, encoding="utf-8")
    (folder / "b.jsonl").write_text(rows, encoding="utf-16")
    (folder / "c.jsonl").write_text(rows, encoding="utf-16-le")
    (folder / "d.jsonl").write_text('{"text": "gr\xf6\xdfer"}\n', encoding="latin-1")
    (folder / "UPPER.JSONL").write_text(
        json.dumps({"text": words("upper", 5)}) + "\n", encoding="utf-8"
    )
    (folder / "UPPER.JSONL.GZ").write_bytes(
        gzip.compress(json.dumps({"text": words("gz", 5)}).encode())
    )
    manifest, _ = prepare([Source(str(folder))], out, tokenizer=300, validation=0)
    assert manifest is not None
    assert texts(out) == [
        words("upper", 5),
        words("gz", 5),
        *(words(i, 5) for i in range(3)),
    ]
    left_out = skipped(manifest)
    assert left_out["not UTF-8"] == 2, (
        "UTF-16's first line, whose BOM is none of UTF-8's, and Latin-1's"
    )
    assert left_out["not JSON"] >= 5


def test_files_that_are_no_documents_are_left_out_by_name(
    corpus: Path, out: Path
) -> None:
    for name in ("a.csv", "b.tar.gz", "c.ZIP", "d.safetensors", "e.jsonl.xz"):
        (corpus / name).write_bytes(
            gzip.compress(b"1,2\n") if name.endswith("gz") else b"1,2\n"
        )
    done = tool("--input", corpus, "--train-tokenizer", 400, "--out", out)
    assert done.returncode == 0, done.stderr
    assert sum(split.documents for split in read_manifest(out).splits.values()) == 60
    assert (
        "left out, .csv is a table; write its texts as JSON lines or Parquet: 1, such as a.csv"
        in done.stdout
    )
    for kind in (
        ".tar is an archive",
        ".zip is an archive",
        ".safetensors is binary",
        ".xz is compressed in another way",
    ):
        assert f"left out, {kind}" in done.stdout


def test_json_lines_by_another_name_are_warned_of(corpus: Path, out: Path) -> None:
    for i in range(3):
        content = "".join(json.dumps({"text": words(i, 5)}) + "\n" for i in range(3))
        (corpus / f"part-0000{i}").write_text(content, encoding="utf-8")
    done = tool("--input", corpus, "--train-tokenizer", 400, "--out", out)
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert 'part-00000 begins with {" and is one document all the same' in warnings[0]
    assert "a name that ends in .jsonl" in warnings[0]


def test_a_folder_whose_name_is_a_pattern(corpus: Path, out: Path) -> None:
    folder = corpus.parent / "corpus [2024] *" / "more?"
    shutil.copytree(corpus, folder)
    store = out.parent / "store [1]"
    for pattern, count in (("**/*", 60), ("d1/*.py", 20), ("*.py", 0)):
        files = list_files(
            [Source(str(folder), pattern), Source(str(corpus / "d0"))], Skipped()
        )
        assert len(files) == count + 20
    manifest, _ = prepare(
        [Source(str(folder), "**/*.py")], store, tokenizer=400, workers=2
    )
    assert manifest is not None
    assert sum(split.documents for split in manifest.splits.values()) == 60
    assert not prepare([Source(str(folder), "**/*.py")], store, tokenizer=400)[1]


@pytest.mark.parametrize(
    "type_",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.binary(),
        pyarrow.large_binary(),
    ],
)
def test_rows_of_parquet_whose_bytes_are_not_utf_8_are_counted(
    tmp_path: Path, out: Path, type_: Any
) -> None:
    """In a column of text too, for Parquet does not look; and what nobody asked for is not even read."""
    values = [words(0, 5).encode(), b"gr\xf6\xdfer", words(1, 5).encode(), b"", None]
    binary = pyarrow.array(
        values, pyarrow.large_binary() if "large" in str(type_) else pyarrow.binary()
    )
    column = binary.view(type_)
    damaged = pyarrow.array([b"\xff"] * 5, pyarrow.binary()).view(pyarrow.string())
    (tmp_path / "in").mkdir()
    pyarrow.parquet.write_table(
        pyarrow.table({"url": damaged, "text": column}), tmp_path / "in" / "a.parquet"
    )
    manifest, _ = prepare(
        [Source(str(tmp_path / "in"))], out, tokenizer=300, validation=0
    )
    assert manifest is not None
    assert texts(out) == [words(0, 5), words(1, 5)]
    assert skipped(manifest) == {
        "not UTF-8": 1,
        "empty": 1,
        'no text under the key "text"': 1,
    }
    names = manifest.raw["corpora"][0]["skipped"]["not UTF-8"]["names"]
    assert names == ["a.parquet:1"]


def test_parquet_without_the_column_of_text(tmp_path: Path, out: Path) -> None:
    (tmp_path / "in").mkdir()
    pyarrow.parquet.write_table(
        pyarrow.table({"body": ["a", "b"]}), tmp_path / "in" / "a.parquet"
    )
    with pytest.raises(PrepareError, match=r'left out: 2 no text under the key "text"'):
        prepare(
            [Source(str(tmp_path / "in"))],
            out,
            tokenizer=train_tokenizer_file(tmp_path),
        )
    prepare(
        [Source(str(tmp_path / "in"))],
        out.with_name("b"),
        tokenizer=tmp_path / "t.model",
        text_key="body",
    )


def train_tokenizer_file(folder: Path) -> Path:
    (folder / "t.model").write_bytes(train_tokenizer([words("any", 500)], 300).model)
    return folder / "t.model"


def test_why_a_compressed_file_cannot_be_read_is_told(corpus: Path, out: Path) -> None:
    model = train_tokenizer_file(corpus.parent)
    padded = corpus / "padded.txt.gz"
    padded.write_bytes(gzip.compress(b"words") + b"\0" * 512)
    with pytest.raises(
        PrepareError,
        match=r"padded\.txt\.gz: .*something follows its end, such as padding",
    ):
        made(corpus, out, tokenizer=model)
    shutil.rmtree(out.with_name(".store.partial"))
    padded.unlink()
    # A frame that asks for a window of 2 GiB, as zstd --long=31 makes it: magic, descriptor, window, one raw block.
    content = (
        b"\x28\xb5\x2f\xfd"
        + bytes([0, (31 - 10) << 3])
        + ((5 << 3) | 1).to_bytes(3, "little")
        + b"words"
    )
    (corpus / "long.txt.zst").write_bytes(content)
    with pytest.raises(
        PrepareError,
        match=r"long\.txt\.zst: .*packed with zstd --long; pack it again: zstd -d --long=31",
    ):
        made(corpus, out, tokenizer=model)


@pytest.mark.parametrize("kind", ["jsonl.zst", "jsonl.gz", "parquet", "txt.zst"])
def test_a_file_that_ends_early_is_an_error_and_can_be_mended(
    corpus: Path, out: Path, kind: str
) -> None:
    rows = [{"text": words(i, 30)} for i in range(200)]
    file = corpus / f"z.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        plain = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        file.write_bytes(
            gzip.compress(plain)
            if kind.endswith("gz")
            else pyarrow.compress(plain, "zstd", asbytes=True)
        )
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    model = model_of(corpus / "d0", out)
    with pytest.raises(
        PrepareError,
        match=rf"z\.{kind}: .*fetch it again, or leave it out with --exclude",
    ):
        made(corpus, out, tokenizer=model)
    assert not out.exists()
    file.write_bytes(whole)
    with pytest.raises(
        PrepareError, match="holds a stopped preparation of other files or options"
    ):
        made(corpus, out, tokenizer=model)
    shutil.rmtree(out.with_name(".store.partial"))
    manifest = made(corpus, out, tokenizer=model)
    assert sum(split.documents for split in manifest.splits.values()) == 60 + (
        1 if kind == "txt.zst" else 200
    )


def test_a_long_document_is_encoded_in_parts_that_are_the_whole(
    corpus: Path, out: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("stackgrow.data.tokenizer.LONG", 1000)
    (corpus / "long.txt").write_text(words("long", 2000), encoding="utf-8")
    made(corpus, out, validation=0)
    assert (corpus / "long.txt").read_text(encoding="utf-8") in texts(out)
    monkeypatch.setattr("stackgrow.data.tokenizer.LONG", 2**20)
    made(corpus, out.with_name("whole"), validation=0)
    assert contents(out) == contents(out.with_name("whole"))


def test_files_are_read_from_other_file_systems(out: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe(
        {"/bucket/a/1.jsonl": LINES, "/bucket/2.txt": words("memory", 20).encode()}
    )
    manifest, _ = prepare([Source("memory://bucket")], out, tokenizer=300, validation=0)
    assert manifest is not None
    assert texts(out) == [
        words("memory", 20),
        ROWS[0]["text"],
        ROWS[1]["text"],
        ROWS[-1]["text"],
    ]


def test_files_are_read_over_http(corpus: Path, out: Path) -> None:
    with served(corpus) as address:
        source = Source(f"{address}/d0", "*.py")
        prepare([source], out, tokenizer=300, validation=0)
    assert (
        texts(out)
        == [path.read_text(encoding="utf-8") for path in sorted(corpus.glob("d0/*.py"))]
        != []
    )


def test_a_corpus_without_documents_is_refused_with_the_reasons(
    corpus: Path, out: Path
) -> None:
    model = model_of(corpus, out)
    folder = corpus.parent / "rows"
    folder.mkdir()
    (folder / "a.jsonl").write_text(
        '{"content": "x"}\n{"content": "y"}\n', encoding="utf-8"
    )
    with pytest.raises(
        PrepareError,
        match=r'no documents to train on.*left out: 2 no text under the key "text"',
    ):
        made(folder, out, tokenizer=model)
    made(
        folder,
        out.with_name("right"),
        tokenizer=model,
        text_key="content",
        validation=0,
    )
    assert texts(out.with_name("right")) == ["x", "y"]


def test_second_run_changes_nothing_and_other_inputs_are_refused(
    corpus: Path, out: Path
) -> None:
    def run(**options: Any) -> bool:
        return prepare([Source(str(corpus))], out, **{"tokenizer": 400, **options})[1]

    assert run()
    before = contents(out)
    assert not run()
    with pytest.raises(PrepareError, match="prepared from other options"):
        run(validation=0.3)
    (corpus / "d0" / "0.py").write_text("changed = True\n", encoding="utf-8")
    with pytest.raises(PrepareError, match="prepared from other files"):
        run()
    assert contents(out) == before


def test_a_corpus_is_added_to_a_store(
    corpus: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(corpus, out, validation=0.1)
    before, old = read_manifest(out), contents(out)
    more = corpus.parent / "more"
    more.mkdir()
    for i in range(20):
        (more / f"{i}.txt").write_text(words(f"more {i}", 5), encoding="utf-8")
    with pytest.raises(PrepareError, match="or --append"):
        made(more, out, tokenizer=out / "tokenizer.model")
    with pytest.raises(PrepareError, match="has a tokenizer of its own"):
        made(more, out, append=True)
    work = out.with_name(".store.partial")
    with monkeypatch.context() as patched:
        patched.setattr(prepare_module, "write_json", fails_on("manifest.json"))
        with pytest.raises(OSError, match="No space"):
            made(more, out, append=True, tokenizer=None, validation=0.1)
    assert read_manifest(out) == before, (
        "files that no manifest names are not a part of the store"
    )
    assert work.exists()
    manifest = made(more, out, append=True, tokenizer=None, validation=0.1)
    assert {
        name: content
        for name, content in contents(out).items()
        if name in old and name != "manifest.json"
    } == {name: content for name, content in old.items() if name != "manifest.json"}
    assert (
        manifest.splits["train"].documents + manifest.splits["validation"].documents
        == 80
    )
    assert (
        manifest.splits["train"].shards[: len(before.splits["train"].shards)]
        == before.splits["train"].shards
    )
    assert {words(f"more {i}", 5) for i in range(20)} <= {
        *texts(out),
        *texts(out, "validation"),
    }
    assert manifest.hash("train") != before.hash("train")
    again = contents(out)
    made(more, out, append=True, tokenizer=None, validation=0.1)
    assert contents(out) == again, "it is in there"
    assert not work.exists()
    (out / "tokenizer.model").write_bytes(
        train_tokenizer([words("other", 500)], 300).model
    )
    with pytest.raises(StoreError, match=r"tokenizer\.model is missing or damaged"):
        made(corpus, out, append=True, tokenizer=None)


def fails_on(name: str) -> Callable[..., None]:
    from stackgrow.seal.files import write_json

    def failing(path: Path, value: Any) -> None:
        if path.name == name:
            raise OSError(28, "No space left on device")
        write_json(path, value)

    return failing


def test_damaged_store_is_not_already_prepared(corpus: Path, out: Path) -> None:
    made(corpus, out)
    next(out.glob("validation-*.npy")).unlink()
    with pytest.raises(StoreError, match="is missing"):
        made(corpus, out)


def test_something_else_in_the_way(corpus: Path, out: Path) -> None:
    out.mkdir(parents=True)
    (out / "thesis.tex").write_text("irreplaceable", encoding="utf-8")
    with pytest.raises(PrepareError, match="is not a token store"):
        made(corpus, out)
    assert contents(out) == {"thesis.tex": b"irreplaceable"}


def test_file_changed_after_it_was_listed(
    corpus: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = prepare_module.train_tokenizer

    def edit_then_train(*arguments: Any) -> Tokenizer:
        trained = train(*arguments)
        (corpus / "d0" / "0.py").write_text("changed\n", encoding="utf-8")
        return trained

    monkeypatch.setattr(prepare_module, "train_tokenizer", edit_then_train)
    with pytest.raises(PrepareError, match=r"0\.py changed while"):
        made(corpus, out)
    assert not out.exists()


def test_two_preparations_of_one_store(corpus: Path, out: Path) -> None:
    work = out.with_name(".store.partial")
    work.mkdir(parents=True)
    handle = os.open(work, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with pytest.raises(PrepareError, match="another preparation"):
        made(corpus, out)
    os.close(handle)
    made(corpus, out)


def test_large_vocabulary_takes_uint32(
    corpus: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(prepare_module.DTYPES, "uint16", 399)
    assert made(corpus, out).dtype == "uint32"
    TokenStore.open(out).verify()


def test_the_tool_prepares_once_and_says_what(corpus: Path, out: Path) -> None:
    arguments = [
        "--input",
        corpus,
        "--pattern",
        "**/*.py",
        "--exclude",
        "d2/*",
        "--out",
        out,
    ]
    done = tool(*arguments, "--train-tokenizer", 400)
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(out)
    for split in manifest.splits.values():
        assert (
            f"{split.documents:,} documents, {split.tokens:,} tokens, {len(split.shards)} shards"
            in done.stdout
        )
    assert sum(split.documents for split in manifest.splits.values()) == 40
    again = tool(*arguments, "--train-tokenizer", 400)
    assert again.returncode == 0
    assert "already prepared" in again.stdout
    other = out.with_name("other")
    same = tool(*arguments[:-1], other, "--tokenizer", out / "tokenizer.model")
    assert same.returncode == 0
    assert read_manifest(other).hash("train") == manifest.hash("train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--input", "no/such/folder", "--train-tokenizer", "400"],
            "no/such/folder is not a folder",
        ),
        (
            ["--input", "tools", "--pattern", "*.zip", "--train-tokenizer", "400"],
            "no documents",
        ),
        (["--input", "tools", "--tokenizer", "no.model"], "no.model"),
        (
            ["--input", "tools", "--tokenizer", "pyproject.toml"],
            "not a SentencePiece model",
        ),
        (["--input", "tools", "--train-tokenizer", "60000"], "too high"),
        (["--input", "tools", "--train-tokenizer", "-1"], "cannot train"),
        (
            ["--input", "tools", "--train-tokenizer", "400", "--validation", "2"],
            "below 1",
        ),
        (
            ["--input", "tools", "--train-tokenizer", "400", "--tokens-per-shard", "0"],
            "must be between",
        ),
        (
            ["--input", "tools", "--train-tokenizer", "400", "--drop", "language"],
            "language must be KEY=VALUE",
        ),
        (["--input", "tools", "--append"], "is not a token store"),
        (["--input", "tools"], "name the tokenizer"),
        (
            ["--input", "tools", "--tokenizer", "tools"],
            "tools has neither tokenizer.json nor tokenizer.model",
        ),
        (
            ["--input", "tools", "--train-tokenizer", "400", "--bos", "<s>"],
            "leave --bos out",
        ),
        (["--train-tokenizer", "400"], "--input FOLDER, or --stdlib"),
    ],
)
def test_the_tool_refuses_in_a_line_and_writes_nothing(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = tool(*arguments, "--out", tmp_path / "store")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "store").exists()


def test_a_corpus_that_no_network_leads_to_is_refused_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever error its client has for that, as httpx's of Hugging Face."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
    source = "hf://datasets/cerebras/SlimPajama-627B"
    done = tool(
        "--input", source, "--train-tokenizer", 400, "--out", tmp_path / "store"
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"{source} cannot be listed" in done.stderr
    assert "copy the files to this machine" in done.stderr


def test_stdlib_source_is_code_without_its_tests() -> None:
    names = [file.name for file in list_files([stdlib_source()], Skipped())]
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    assert not [
        name
        for name in names
        if "site-packages" in name or "/test" in f"/{name}".replace("unittest", "")
    ]


def test_manifest_names_sources_and_versions(corpus: Path, out: Path) -> None:
    prepare([Source(str(corpus), "**/*.py", ("d2/*",))], out, tokenizer=400)
    raw = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert raw["corpora"][0]["sources"] == [
        {"root": str(corpus), "pattern": "**/*.py", "exclude": ["d2/*"]}
    ]
    assert set(raw["versions"]) == {
        "python",
        "numpy",
        "sentencepiece",
        "datatrove",
        "pyarrow",
        "tokenizers",
    }
    assert sum(train + held for *_, train, held in listing(out)) == 40
