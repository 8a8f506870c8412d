from pathlib import Path

from stackgrow.run_folder.lines import RecordWriter, read_records
from stackgrow.seal.files import file_records


def test_resume_drops_what_comes_after_the_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = RecordWriter(path, 0)
    for step in range(1, 6):
        first.write({"step": step, "loss": 1.0 / step})
    second = RecordWriter(path, 3)
    second.write({"step": 4, "loss": 0.1})
    sealed = second.sealed()
    second.close()
    assert sealed == file_records(tmp_path, ["metrics.jsonl"])["metrics.jsonl"]
    assert [(r["step"], r["loss"]) for r in read_records(path)] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.1)]


def test_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_records(path) == [{"step": 1}, {"step": 2}]
    RecordWriter(path, 9).close()
    assert path.read_text(encoding="utf-8") == '{"step": 1}\n{"step": 2}\n'


def test_an_endless_line_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    with path.open("r+b") as stream:
        stream.truncate(1 << 40)  # a hole: of zeros, and no newline
    assert read_records(path) == [{"step": 1}]
