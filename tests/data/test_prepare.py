"""Preparation: deterministic, complete or absent, and nothing is lost silently."""

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stackgrow.data import prepare as prepare_module
from stackgrow.data.prepare import PrepareError, Source, prepare
from stackgrow.data.store import StoreError, TokenStore, read_manifest
from stackgrow.data.tokenizer import Tokenizer

REPOSITORY = Path(__file__).parents[2]
LETTERS = str.maketrans("0123456789", "ghijklmnop")
TOOL = [sys.executable, "tools/prepare_data.py"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    root = tmp_path / "corpus"
    for i in range(60):
        path = root / f"d{i % 3}" / f"{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        words = [hashlib.sha256(f"{i} {j}".encode()).hexdigest().translate(LETTERS) for j in range(i % 7 + 1)]
        path.write_text(f"def f{i}():\n" + "".join(f"    return {word}\n" for word in words))
    return root


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "data" / "store"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [*TOOL, *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)


def test_same_inputs_give_the_same_bytes(corpus: Path, out: Path) -> None:
    for folder in (out, out.with_name("again")):
        prepare([Source(corpus)], folder, tokenizer=400, validation=0.1, tokens_per_shard=500)
    assert contents(out) == contents(out.with_name("again"))
    assert not list(out.parent.glob(".*"))


def test_split_is_by_document_and_stable(corpus: Path, out: Path) -> None:
    def validation_documents(name: str) -> set[str]:
        folder = out.with_name(name)
        prepare([Source(corpus)], folder, tokenizer=400, validation=0.2)
        store = TokenStore.open(folder, "validation")
        tokenizer = Tokenizer.load(folder / "tokenizer.model")
        text = tokenizer.decode([t for t in store.tokens(0, store.n_tokens).tolist() if t != tokenizer.bos_id])
        return {line for line in text.splitlines() if line.startswith("def")}

    before = validation_documents("a")
    assert 3 <= len(before) <= 25
    (corpus / "new.py").write_text("x = 1\n")
    assert validation_documents("b") == before, "another document does not move these"


@pytest.mark.parametrize(
    ("files", "validation", "expected"),
    [(1, 0.5, 0), (2, 0.0001, 1), (2, 0.9999, 1), (60, 0.0001, 1), (60, 0, 0)],
)
def test_neither_split_is_empty_unless_asked(
    corpus: Path, out: Path, files: int, validation: float, expected: int
) -> None:
    for path in sorted(corpus.rglob("*.py"))[files:]:
        path.unlink()
    manifest, _ = prepare([Source(corpus)], out, tokenizer=300, validation=validation)
    assert manifest.splits["validation"].documents == expected
    assert manifest.splits["train"].documents == files - expected


def test_patterns(corpus: Path, out: Path) -> None:
    (corpus / "top.py").write_text("top = 1\n")
    (corpus / "d0" / "deep" / "test").mkdir(parents=True)
    (corpus / "d0" / "deep" / "test" / "t.py").write_text("test = 1\n")
    (corpus / "notes.txt").write_text("notes\n")

    def documents(pattern: str, *exclude: str) -> int:
        source = Source(corpus, pattern, exclude)
        return len(list(prepare_module._names(source, prepare_module.Skipped())))

    assert documents("**/*") == 63
    assert documents("**/*.py") == 62
    assert documents("*.py") == 1
    assert documents("d?/*.py") == 60
    assert documents("**/*.py", "d1/**") == 42
    assert documents("**/*.py", "**/test/**", "top.*") == 60
    assert documents("**/*.py", "test/**") == 62


def test_skipped_files_are_reported(corpus: Path, out: Path) -> None:
    (corpus / "empty.py").touch()
    (corpus / "latin.py").write_bytes("é".encode("latin-1"))
    (corpus / "dangling.py").symlink_to(corpus / "nowhere")
    (corpus / "twin.py").symlink_to(corpus / "d0" / "0.py")
    (corpus / "linked").symlink_to(corpus / "d1")
    os.mkfifo(corpus / "pipe.py")
    manifest, _ = prepare([Source(corpus)], out, tokenizer=400)
    assert manifest.raw["skipped"] == {
        "linked folder, not followed": {"files": 1, "names": ["linked"]},
        "unreadable": {"files": 1, "names": ["dangling.py"]},
        "empty": {"files": 1, "names": ["empty.py"]},
        "not UTF-8": {"files": 1, "names": ["latin.py"]},
        "not a regular file": {"files": 1, "names": ["pipe.py"]},
        "same file found twice": {"files": 1, "names": ["twin.py"]},
    }
    assert sum(split.documents for split in manifest.splits.values()) == 60


def test_second_run_changes_nothing_and_other_inputs_are_refused(corpus: Path, out: Path) -> None:
    def run(**options: float) -> bool:
        return prepare([Source(corpus)], out, tokenizer=400, **options)[1]  # type: ignore[arg-type]

    assert run()
    before = contents(out)
    assert not run()
    with pytest.raises(PrepareError, match="prepared from other options"):
        run(validation=0.3)
    (corpus / "d0" / "0.py").write_text("changed = True\n")
    with pytest.raises(PrepareError, match="prepared from other files"):
        run()
    assert contents(out) == before


def test_damaged_store_is_not_already_prepared(corpus: Path, out: Path) -> None:
    prepare([Source(corpus)], out, tokenizer=400)
    (out / "validation-00000.npy").unlink()
    with pytest.raises(StoreError, match="is missing"):
        prepare([Source(corpus)], out, tokenizer=400)


def test_something_else_in_the_way(corpus: Path, out: Path) -> None:
    out.mkdir(parents=True)
    (out / "thesis.tex").write_text("irreplaceable")
    with pytest.raises(PrepareError, match="is not a token store"):
        prepare([Source(corpus)], out, tokenizer=400)
    assert contents(out) == {"thesis.tex": b"irreplaceable"}


def test_failure_leaves_nothing(corpus: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, count = prepare_module._write, 0

    def failing(path: Path, content: bytes) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(prepare_module, "_write", failing)
    with pytest.raises(OSError, match="No space"):
        prepare([Source(corpus)], out, tokenizer=400, tokens_per_shard=500)
    assert list(out.parent.iterdir()) == []


def test_file_changed_between_the_passes(corpus: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = prepare_module.train_tokenizer

    def edit_then_train(*arguments: object) -> Tokenizer:
        made = train(*arguments)  # type: ignore[arg-type]
        (corpus / "d0" / "0.py").write_text("changed\n")
        return made

    monkeypatch.setattr(prepare_module, "train_tokenizer", edit_then_train)
    with pytest.raises(PrepareError, match=r"0\.py changed while"):
        prepare([Source(corpus)], out, tokenizer=400)
    assert not out.exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from stackgrow.data import prepare as p
calls = 0
def kill_before(function):
    def wrapped(*arguments):
        global calls
        calls += 1
        if calls == {after}:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return wrapped
p._write = kill_before(p._write)
p.write_json = kill_before(p.write_json)
Path.rename = kill_before(Path.rename)
p.prepare([p.Source(Path(sys.argv[1]))], sys.argv[2], tokenizer=400, tokens_per_shard=5000)
"""


def test_killed_at_any_write_it_never_looks_complete(corpus: Path, out: Path) -> None:
    whole = out.with_name("whole")
    manifest, _ = prepare([Source(corpus)], whole, tokenizer=400, tokens_per_shard=5000)
    shards = sum(len(split.shards) for split in manifest.splits.values())
    for after in range(1, shards + 4):  # the tokenizer, the shards, the manifest, the rename
        command = [sys.executable, "-c", KILLED.format(after=after), str(corpus), str(out)]
        assert subprocess.run(command, cwd=REPOSITORY).returncode == -signal.SIGKILL
        assert not out.exists()
    prepare([Source(corpus)], out, tokenizer=400, tokens_per_shard=5000)
    assert contents(out) == contents(whole)
    assert sorted(path.name for path in out.parent.iterdir()) == ["store", "whole"], "leftovers are gone"


def test_two_preparations_of_one_store(corpus: Path, out: Path) -> None:
    partial = out.with_name(".store.partial")
    partial.mkdir(parents=True)
    (partial / "train-00077.npy").write_text("being written")
    handle = os.open(partial, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(PrepareError, match="another preparation"):
        prepare([Source(corpus)], out, tokenizer=400)
    assert contents(partial) == {"train-00077.npy": b"being written"}
    os.close(handle)
    assert prepare([Source(corpus)], out, tokenizer=400)[1]
    assert "train-00077.npy" not in contents(out)


def test_large_vocabulary_takes_uint32(corpus: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(prepare_module.DTYPES, "uint16", 399)
    manifest, _ = prepare([Source(corpus)], out, tokenizer=400)
    assert manifest.dtype == "uint32"
    TokenStore.open(out).verify()


def test_tool(corpus: Path, out: Path) -> None:
    arguments = ["--input", corpus, "--pattern", "**/*.py", "--exclude", "d2/**", "--out", out]
    done = tool(*arguments, "--train-tokenizer", 400)
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(out)
    for split in manifest.splits.values():
        assert f"{split.documents:,} documents, {split.tokens:,} tokens, {len(split.shards)} shards" in done.stdout
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
        (["--input", "no/such/folder", "--train-tokenizer", "400"], "no/such/folder is not a folder"),
        (["--input", "tools", "--pattern", "*.zip", "--train-tokenizer", "400"], "no documents"),
        (["--input", "tools", "--tokenizer", "no.model"], "no.model"),
        (["--input", "tools", "--tokenizer", "pyproject.toml"], "not a SentencePiece model"),
        (["--input", "tools", "--train-tokenizer", "60000"], "too high"),
        (["--input", "tools", "--train-tokenizer", "-1"], "cannot train"),
        (["--input", "tools", "--train-tokenizer", "400", "--validation", "2"], "below 1"),
        (["--input", "tools", "--train-tokenizer", "400", "--tokens-per-shard", "0"], "must be between"),
        (["--train-tokenizer", "400"], "--input FOLDER, or --stdlib"),
    ],
)
def test_tool_errors(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = tool(*arguments, "--out", tmp_path / "store")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_stdlib_source_is_code_without_its_tests() -> None:
    names = list(prepare_module._names(prepare_module.stdlib_source(), prepare_module.Skipped()))
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    assert not [name for name in names if "site-packages" in name or "/test" in f"/{name}".replace("unittest", "")]


def test_manifest_names_sources_and_versions(corpus: Path, out: Path) -> None:
    prepare([Source(corpus, "**/*.py", ("d2/**",))], out, tokenizer=400)
    raw = json.loads((out / "manifest.json").read_text())
    assert raw["sources"] == [{"root": str(corpus), "pattern": "**/*.py", "exclude": ["d2/**"]}]
    assert set(raw["versions"]) == {"python", "numpy", "sentencepiece"}
