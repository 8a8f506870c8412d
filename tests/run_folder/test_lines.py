"""Records begin, in every session, with what the loaded checkpoint's seal states of them; nothing else is gone on from."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from stackgrow.errors import DamagedError
from stackgrow.run_folder.folder import StageFolder
from stackgrow.run_folder.lines import LONGEST, RecordWriter, iter_records, read_records
from stackgrow.seal.files import file_records

LOSSES = [1.0, 0.5, 1 / 3, 0.25, 0.2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return StageFolder(tmp_path).metrics_file


def written(path: Path, seal_after: int) -> dict[str, object]:
    """Five records in ``path``; returns what a checkpoint states that is sealed after step ``seal_after``."""
    writer = RecordWriter(path)
    sealed = writer.sealed()
    for step, loss in enumerate(LOSSES, start=1):
        writer.write({"step": step, "loss": loss})
        if step == seal_after:
            sealed = writer.sealed()
    writer.close()
    return sealed


def test_a_resume_drops_what_comes_after_the_checkpoint(path: Path) -> None:
    second = RecordWriter(path, written(path, seal_after=3))
    second.write({"step": 4, "loss": 0.1})
    sealed = second.sealed()
    second.close()
    assert sealed == file_records(path.parent, [path.name])[path.name]
    assert [(r["step"], r["loss"]) for r in read_records(path)] == [
        (1, 1.0),
        (2, 0.5),
        (3, 1 / 3),
        (4, 0.1),
    ]


def test_without_a_checkpoint_the_records_begin_anew(path: Path) -> None:
    written(path, seal_after=3)
    RecordWriter(path).close()
    assert path.read_bytes() == b""


def edit_a_loss(content: bytes) -> bytes:
    return content.replace(b"0.5", b"0.6")


DAMAGES = {
    "edited": (edit_a_loss, "its first [0-9]+ bytes were changed"),
    "first half lost": (
        lambda content: content[len(content) // 2 :],
        "it has [0-9]+ bytes, [0-9]+ were sealed",
    ),
    "a line lost": (lambda content: content.split(b"\n", 1)[1], "bytes were changed"),
    "200 NUL bytes inside": (
        lambda content: content[:10] + b"\0" * 200 + content[210:],
        "bytes were changed",
    ),
    "a byte 0xff": (
        lambda content: content[:10] + b"\xff" + content[11:],
        "bytes were changed",
    ),
    "empty": (lambda content: b"", "it has 0 bytes, [0-9]+ were sealed"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_records_that_are_not_what_was_sealed_are_never_gone_on_from(
    path: Path, damage: str
) -> None:
    sealed = written(path, seal_after=4)
    change, message = DAMAGES[damage]
    path.write_bytes(change(path.read_bytes()))
    before = path.read_bytes()
    with pytest.raises(
        DamagedError,
        match=rf"metrics\.jsonl is not what it was when .* {message}\. Restore it, or move ",
    ):
        RecordWriter(path, sealed)
    assert path.read_bytes() == before, "it is left as it is"


def test_a_lost_file_is_noticed_where_something_was_sealed(path: Path) -> None:
    sealed = written(path, seal_after=2)
    path.unlink()
    with pytest.raises(DamagedError, match="it is missing"):
        RecordWriter(path, sealed)
    RecordWriter(path, {"bytes": 0, "sha256": "of nothing"}).close()
    with pytest.raises(DamagedError, match="seal does not state its size"):
        RecordWriter(path, {})


def test_a_torn_last_line_is_left_out(path: Path) -> None:
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste', encoding="utf-8")
    assert read_records(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"5",
        b"[]",
        b'{"loss": 1}',
        b'{"step": "1"}',
        b'{"step": true}',
        b"\xff",
        b"\0" * 200,
        b"[" * 100_000,
    ],
)
def test_a_line_that_is_no_record_is_named(path: Path, line: bytes) -> None:
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(DamagedError, match=r"metrics\.jsonl:2.* is no record"):
        read_records(path)


def test_an_endless_line_is_not_read_whole(path: Path) -> None:
    path.write_text('{"step": 1}\n', encoding="utf-8")
    with path.open("r+b") as stream:
        stream.truncate(1 << 40)  # a hole: of zeros, and no newline
    records = iter_records(path)
    assert next(records) == {"step": 1}
    with pytest.raises(DamagedError, match=f"longer than {LONGEST} bytes"):
        next(records)


def test_text_of_any_language_is_read(path: Path) -> None:
    path.write_text(
        json.dumps({"step": 1, "data": {"größe": 1}}, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )
    assert read_records(path) == [{"step": 1, "data": {"größe": 1}}]


def test_a_pipe_in_place_of_the_records_is_told(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(DamagedError, match="it is no plain file"):
        RecordWriter(path)
    assert read_records(path) == []


def test_records_that_the_disk_does_not_give_are_named(path: Path) -> None:
    path.symlink_to("/proc/self/mem")  # a plain file; reading there is EIO
    with pytest.raises(OSError, match="Input/output error") as told:
        read_records(path)
    assert told.value.filename == str(path)
