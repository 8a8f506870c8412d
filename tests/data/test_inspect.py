"""Looking into stores: every training sequence is traced to the files it came from."""

import json
import os
import shutil
import subprocess
import sys
from ast import literal_eval
from pathlib import Path

import pytest
from recipes_for_tests import edited

from stackgrow.data.inspect import pieces, verify
from stackgrow.data.order import read_order
from stackgrow.data.prepare import prepare
from stackgrow.data.read import Source
from stackgrow.data.store import StoreError, TokenStore
from stackgrow.data.tokenizer import Tokenizer
from stackgrow.recipe.load import load_recipe

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two corpora: files of one line each, and rows."""
    root = tmp_path_factory.mktemp("inspect")
    (root / "a").mkdir()
    (root / "b").mkdir()
    for i in range(40):
        (root / "a" / f"{i:02d}.txt").write_text(
            f"text number {i} " + "of many words " * (i % 5), encoding="utf-8"
        )
    (root / "b" / "rows.jsonl").write_text(
        "".join(f'{{"text": "row {i} of the file"}}\n' for i in range(50)),
        encoding="utf-8",
    )
    prepare(
        [Source(str(root / "a"))],
        root / "data" / "tiny",
        tokenizer=300,
        validation=0.1,
        tokens_per_shard=300,
    )
    prepare(
        [Source(str(root / "b"))],
        root / "data" / "tiny",
        tokenizer=None,
        validation=0.1,
        append=True,
    )
    (root / "mine.toml").write_text(
        edited(("vocab_size = 256", "vocab_size = 300")), encoding="utf-8"
    )
    return root


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_token_is_traced_to_its_file(folder: Path, split: str) -> None:
    store = TokenStore.open(folder / "data" / "tiny", split)
    tokenizer = Tokenizer.load(folder / "data" / "tiny" / "tokenizer.model")
    found = list(pieces(store, 0, store.n_tokens))
    assert [piece.document for piece in found] == list(
        range(store.manifest.splits[split].documents)
    )
    rows = 0
    for piece in found:
        text = tokenizer.decode(store.tokens(piece.start, piece.stop)[1:].tolist())
        if piece.file.endswith(".txt"):
            assert text == Path(piece.file).read_text(encoding="utf-8")
            assert piece.number == 0
        else:
            assert text.startswith("row ")
            assert piece.number == rows
            rows += 1
    middle = store.n_tokens // 2
    assert next(pieces(store, middle, middle + 1)).document == store.document(middle)


def test_tool_shows_the_sequence_that_is_trained(folder: Path) -> None:
    done = tool(folder, "inspect", "mine.toml", "--position", 5)
    recipe = load_recipe(folder / "mine.toml")
    order = read_order(
        recipe.data.__class__(path=str(folder / "data" / "tiny"), seq_len=64),
        recipe.seed,
    )
    window = order.windows([5])[0][1]
    assert f"position 5: window {window} of data/tiny, epoch 0" in done.stdout
    store = TokenStore.open(folder / "data" / "tiny")
    text = Tokenizer.load(folder / "data" / "tiny" / "tokenizer.model").decode(
        store.tokens(window * 64, window * 64 + 64).tolist()
    )
    shown = [
        literal_eval(line.strip())
        for line in done.stdout.splitlines()
        if line.startswith(("    '", '    "'))
    ]
    assert shown
    assert all(part in text for part in shown)
    assert "train: " in done.stdout
    assert f"from {folder}/b/**/*" in done.stdout


def test_nothing_of_a_strangers_manifest_steers_the_terminal(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "data" / "tiny", tmp_path / "tiny")
    raw = json.loads((tmp_path / "tiny" / "manifest.json").read_text(encoding="utf-8"))
    raw["corpora"] = [
        {
            **raw["corpora"][0],
            "skipped": {"\x1b[2J": {"count": 1, "names": ["\udcff.txt"]}},
        },
        {"list": raw["corpora"][0]["list"]},
    ]
    (tmp_path / "tiny" / "manifest.json").write_text(json.dumps(raw), encoding="utf-8")
    told = tool(tmp_path, "inspect", "tiny").stdout
    assert "left out, ?[2J: 1, such as ?.txt" in told


def test_the_tool_finds_a_damaged_byte(folder: Path, tmp_path: Path) -> None:
    assert (
        "every byte is what the manifest states"
        in tool(folder, "verify", "data/tiny").stdout
    )
    shard = sorted((folder / "data" / "tiny").glob("validation-*.npy"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[:-2] + b"\x05\x00")
    try:
        with pytest.raises(StoreError, match=f"{shard.name} is damaged"):
            verify(str(folder / "data" / "tiny"))
        done = tool(folder, "verify", "data/tiny", code=2)
        assert done.stderr.startswith("data: ")
        assert "Traceback" not in done.stderr
    finally:
        shard.write_bytes(content)


def test_a_reader_that_leaves_early_is_no_error(folder: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [
        sys.executable,
        str(REPOSITORY / "tools" / "data.py"),
        "inspect",
        "data/tiny",
    ]
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 141


def tool(
    folder: Path, *arguments: object, code: int = 0
) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(REPOSITORY / "tools" / "data.py"),
        *map(str, arguments),
    ]
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    return done
