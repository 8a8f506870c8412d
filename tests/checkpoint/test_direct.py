"""Files written past the page cache hold what was written, in whatever portions, and where there is no O_DIRECT."""

import fcntl
import os
from pathlib import Path

import pytest

from stackgrow.checkpoint import direct
from stackgrow.checkpoint.direct import DirectFile


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    "sizes", [[], [1], [4096], [8192, 8192], [5, 70000, 0, 3], [20000] * 7]
)
def test_any_portions_are_the_bytes_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int], cached: bool
) -> None:
    monkeypatch.setattr(direct, "BLOCK", 16384)
    if cached:
        monkeypatch.setattr(direct, "DIRECT", 0)
    portions = [os.urandom(size) for size in sizes]
    (tmp_path / "file").write_bytes(bytes(100_000))  # of an earlier attempt
    with DirectFile(tmp_path / "file") as stream:
        for portion in portions:
            assert stream.write(portion) == len(portion)
        stream.finish()
        assert stream.position == sum(sizes)
    assert (tmp_path / "file").read_bytes() == b"".join(portions)


def test_a_file_system_without_direct_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = fcntl.fcntl

    def refusing(handle: int, command: int, flags: int = 0) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return changed(handle, command, flags)

    monkeypatch.setattr(fcntl, "fcntl", refusing)
    with DirectFile(tmp_path / "file") as stream:
        stream.write(b"content")
        stream.finish()
    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.parametrize("blocks", [0.5, 3])
def test_a_full_disk_is_told_though_another_thread_meets_it(
    monkeypatch: pytest.MonkeyPatch, blocks: float
) -> None:
    monkeypatch.setattr(direct, "BLOCK", 16384)

    def fill() -> None:
        with DirectFile(Path("/dev/full")) as stream:
            stream.write(bytes(int(blocks * 16384)))
            stream.finish()

    with pytest.raises(OSError, match="No space left on device"):
        fill()
