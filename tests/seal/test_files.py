import errno
import io
import json
import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from stackgrow import seal
from stackgrow.errors import DamagedError


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint" / "step-4"
    folder.mkdir(parents=True)
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata"):
        (folder / name).write_bytes(name.encode() * 1000)
    seal.seal(folder, seal.file_records(folder, seal.contents(folder)), {"step": 4})
    return folder


def damage(folder: Path) -> list[str]:
    manifest = seal.read_seal(folder)
    assert manifest is not None
    return seal.damage(folder, manifest)


def test_whole_folder_has_no_damage_in_any_part(sealed: Path) -> None:
    assert damage(sealed) == []
    assert seal.sealed_steps(sealed.parent) == [4]


@pytest.mark.parametrize("position", [0, 500, 11_999])
@pytest.mark.parametrize("bit", [0, 7])
def test_every_flipped_bit_is_found(sealed: Path, position: int, bit: int) -> None:
    content = bytearray((sealed / "__0_0.distcp").read_bytes())
    content[position] ^= 1 << bit
    (sealed / "__0_0.distcp").write_bytes(content)
    assert damage(sealed) == ["__0_0.distcp is damaged (SHA-256 differs)"]


def test_missing_truncated_and_extra_files_are_found(sealed: Path) -> None:
    (sealed / "__0_0.distcp").unlink()
    (sealed / ".metadata").write_bytes(b"short")
    (sealed / "extra").write_bytes(b"")
    assert damage(sealed) == [
        "extra is not in the manifest",
        ".metadata has the wrong size",
        "__0_0.distcp is missing",
    ]


def test_links_and_pipes_are_not_read(sealed: Path) -> None:
    """Of a stranger's checkpoint: the manifest can say that a pipe has 0 bytes, and reading one never ends."""
    for name in ("__0_0.distcp", "__1_0.distcp"):
        (sealed / name).unlink()
    os.mkfifo(sealed / "__0_0.distcp")
    (sealed / "__1_0.distcp").symlink_to("/dev/zero")
    manifest = json.loads((sealed / seal.MANIFEST).read_text())
    for name in ("__0_0.distcp", "__1_0.distcp"):
        manifest["files"][name]["bytes"] = 0
    assert seal.damage(sealed, manifest) == [
        f"__{i}_0.distcp is no plain file" for i in (0, 1)
    ]


@pytest.mark.parametrize(
    ("number", "fails"), [(errno.EINVAL, False), (errno.EIO, True)]
)
def test_a_file_system_that_syncs_no_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, fails: bool
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="Input/output") if fails else nullcontext():
        seal.sync_folder(tmp_path)


def test_parts_share_the_files(sealed: Path) -> None:
    (sealed / "__0_0.distcp").write_bytes(b"short")
    manifest = seal.read_seal(sealed)
    assert manifest is not None
    found = [seal.damage(sealed, manifest, part, 3) for part in range(3)]
    assert sorted(map(len, found)) == [0, 0, 1]


def test_a_sample_checks_every_size_and_some_hashes(sealed: Path) -> None:
    manifest = seal.read_seal(sealed)
    assert manifest is not None
    content = bytearray((sealed / "__0_0.distcp").read_bytes())
    content[0] ^= 1
    (sealed / "__0_0.distcp").write_bytes(content)
    assert seal.damage(sealed, manifest, hashes=0) == []
    assert {bool(seal.damage(sealed, manifest, hashes=1)) for _ in range(100)} == {
        True,
        False,
    }
    assert seal.damage(sealed, manifest, hashes=3) == [
        "__0_0.distcp is damaged (SHA-256 differs)"
    ]
    (sealed / ".metadata").write_bytes(b"short")
    assert seal.damage(sealed, manifest, hashes=0) == [".metadata has the wrong size"]


@pytest.mark.parametrize(
    "manifest",
    [
        '{"step": 4}',
        '{"files": []}',
        '{"files": {"a": 1}}',
        '{"files": {}, "tensors": 3}',
    ],
)
def test_a_manifest_of_another_form_is_told(sealed: Path, manifest: str) -> None:
    (sealed / seal.MANIFEST).write_text(manifest)
    with pytest.raises(DamagedError, match=r"MANIFEST\.json is damaged: it has no"):
        seal.read_seal(sealed)


def test_space_is_asked_for_before_it_is_used(tmp_path: Path) -> None:
    assert seal.lack_of_space(tmp_path, 1) is None
    lack = seal.lack_of_space(tmp_path, 10**18)
    assert lack is not None
    assert lack.startswith("needs 1e+09 GB, ")
    assert lack.endswith(f"GB are free in {tmp_path}")


def test_only_exact_sealed_step_folders_count(sealed: Path) -> None:
    for name in ("step-9", "old-step-99", "step-50.tmp"):
        (sealed.parent / name).mkdir()
    (sealed.parent / "old-step-99" / seal.MANIFEST).write_text("{}")
    assert seal.sealed_steps(sealed.parent) == [4]
    moved = seal.quarantine_unsealed(sealed.parent)
    assert sorted(p.name for p in moved) == [
        "old-step-99.0",
        "step-50.tmp.0",
        "step-9.0",
    ]
    assert [p.name for p in sealed.parent.iterdir()] == ["step-4"]


def test_quarantine_never_overwrites(sealed: Path) -> None:
    for number in (0, 1):
        torn = sealed.parent / "step-8"
        torn.mkdir()
        assert seal.quarantine_unsealed(sealed.parent)[0].name == f"step-8.{number}"


def test_link_in_place_of_a_checkpoint_is_refused(sealed: Path, tmp_path: Path) -> None:
    (sealed.parent / "step-8").symlink_to(tmp_path)
    with pytest.raises(DamagedError, match="symbolic link"):
        seal.quarantine_unsealed(sealed.parent)


def test_purge_keeps_the_newest_and_the_boundary(sealed: Path) -> None:
    for step in (8, 12, 16, 20):
        folder = sealed.parent / f"step-{step}"
        folder.mkdir()
        seal.seal(folder, {}, {"step": step})
    seal.purge(sealed.parent, keep=2, always=(8,))
    assert seal.sealed_steps(sealed.parent) == [8, 16, 20]


def test_purge_does_not_count_what_is_damaged(sealed: Path) -> None:
    """The newest that are whole by size stay, whatever came after them."""
    for step in (8, 12):
        folder = sealed.parent / f"step-{step}"
        folder.mkdir()
        (folder / "data").write_bytes(b"x" * 100)
        seal.seal(folder, seal.file_records(folder, ["data"]), {"step": step})
    (sealed.parent / "step-12" / "data").write_bytes(b"")
    seal.purge(sealed.parent, keep=1)
    assert seal.sealed_steps(sealed.parent) == [8, 12]


def test_json_is_replaced_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "facts.json"
    seal.write_json(path, {"a": 1})

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(seal.files.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        seal.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_damaged_json_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "DONE").write_text(text)
    with pytest.raises(DamagedError, match="DONE is damaged"):
        seal.read_json(tmp_path / "DONE")
    assert seal.read_json(tmp_path / "absent") is None


def test_a_pipe_in_place_of_a_file_is_told(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "DONE")
    with pytest.raises(DamagedError, match="DONE is no plain file"):
        seal.read_json(tmp_path / "DONE")


def test_a_file_that_the_disk_does_not_give_is_damaged_and_named(
    sealed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EIO, after which the checkpoint before it is used."""
    original = Path.open

    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def opened(path: Path, *arguments: str, **keywords: str) -> object:
        return (
            Broken()
            if path.name == "__0_0.distcp"
            else original(path, *arguments, **keywords)
        )

    monkeypatch.setattr(Path, "open", opened)
    assert damage(sealed) == ["__0_0.distcp cannot be read (Input/output error)"]
    with pytest.raises(OSError, match="Input/output error") as told:
        seal.sha256(sealed / "__0_0.distcp")
    assert told.value.filename == str(sealed / "__0_0.distcp")
