"""Text anywhere -> documents, on datatrove: JSON lines, Parquet and plain text, on any file system that fsspec knows.

datatrove's JsonlReader only logs what it cannot read: it goes on after a bad line, and ends a file at the first that is
not UTF-8. Here what is left out is counted, and a file that cannot be read to its end is an error.
"""

from __future__ import annotations

import hashlib
import io
import json
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow
from datatrove.data import Document
from datatrove.io import DataFolder, get_datafolder
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers.parquet import ParquetReader
from loguru import logger

logger.disable("datatrove")  # tracebacks and tables; its log files stay

INPUTS = "inputs.json"
CODECS = {".zst": "zstd", ".gz": "gzip", ".bz2": "bz2"}
JSON_LINES = (".jsonl", ".json", ".ndjson")
VERSIONS = ("mtime", "ETag", "etag", "blob_id", "LastModified", "last_modified", "updated")  # what file systems have
SKIPPED_NAMES = 20  # names kept per reason in the manifest
STDLIB_EXCLUDED = ("site-packages", "dist-packages", "lib2to3", "encodings", "test", "tests", "idle_test")


class PrepareError(ValueError):
    """Inputs or an output folder that cannot be used; the message says what to do."""


class Skipped(dict[str, dict[str, Any]]):
    """Why and how many documents or files were left out, with some of their names: never silently."""

    def add(self, reason: str, name: str) -> None:
        self.merge({reason: {"count": 1, "names": [name]}})

    def merge(self, other: dict[str, dict[str, Any]]) -> None:
        for reason, more in other.items():
            entry = self.setdefault(reason, {"count": 0, "names": []})
            entry["count"] += more["count"]
            entry["names"] = [*entry["names"], *more["names"]][:SKIPPED_NAMES]


@dataclass(frozen=True)
class Source:
    """Files below ``root`` (a folder, or a URL such as hf://datasets/NAME or s3://bucket/folder) that match the glob
    ``pattern``, in which ``**/`` is any number of folders, and none of ``exclude``, in which ``*`` is anything."""

    root: str
    pattern: str = "**/*"
    exclude: tuple[str, ...] = ()


class File(NamedTuple):
    """One input file: its source's number, its name below that, and what tells that it has changed."""

    source: int
    name: str
    bytes: int
    version: str


def stdlib_source() -> Source:
    """The Python standard library's own code: about 10 MB of text that every machine has."""
    exclude = []
    for folder in STDLIB_EXCLUDED:
        exclude += [f"{folder}/*", f"*/{folder}/*"]
    exclude.append("_sysconfigdata*")
    return Source(sysconfig.get_path("stdlib"), "**/*.py", tuple(exclude))


def list_files(sources: Sequence[Source], skipped: Skipped) -> list[File]:
    """Every input file, source after source, by name. Raises PrepareError where there is none."""
    files: list[File] = []
    seen: set[str] = set()
    for number, source in enumerate(sources):
        files += _list_source(number, source, seen, skipped)
    if not files:
        where = ", ".join(f"{source.root}/{source.pattern}" for source in sources)
        raise PrepareError(f"no documents in {where}; look at --pattern and --exclude")
    return files


def _list_source(number: int, source: Source, seen: set[str], skipped: Skipped) -> Iterator[File]:
    """Files of one source that are not in ``seen``, where they are added, links resolved."""
    folder = get_datafolder(source.root)
    if not folder.isdir(""):
        raise PrepareError(f"{source.root} is not a folder; give one that holds the text files")
    for name, info in sorted(folder.glob(source.pattern, detail=True).items()):
        if info["type"] == "directory" or any(fnmatchcase(name, pattern) for pattern in source.exclude):
            continue
        real = str(Path(source.root, name).resolve()) if folder.is_local() else folder.resolve_paths(name)
        if info["type"] != "file" and not folder.isfile(name):
            # Opening a pipe would wait for ever.
            skipped.add("not a regular file", name)
        elif real in seen:
            skipped.add("same file found twice", name)
        else:
            # A link's own entry is not the file's, and a listing over HTTP has no sizes.
            is_whole = info["type"] == "file" and info.get("size") is not None
            yield _file(number, name, info if is_whole else _info(folder, name))
        seen.add(real)


def _info(folder: DataFolder, name: str) -> dict[str, Any]:
    info = folder.info(name)
    if info.get("islink"):  # fsspec gives the link's own
        info = folder.fs.info(str(Path(folder.path, name).resolve()))
    return info


def _file(source: int, name: str, info: dict[str, Any]) -> File:
    version = next((str(info[key]) for key in VERSIONS if info.get(key)), "")
    return File(source, name, info.get("size") or 0, version)


class FileReader(ParquetReader):
    """Documents of single files, each identified by the SHA-256 of its text; ``skipped`` counts what is left out.

    ``drop`` leaves out documents with a value: ("meta.redpajama_set_name", "RedPajamaGithub").
    """

    def __init__(self, root: str, text_key: str, drop: Sequence[Sequence[str]], skipped: Skipped):
        super().__init__(root, text_key=text_key)
        self.drop = drop
        self.skipped = skipped

    def read_file(self, filepath: str) -> Iterator[Document]:
        """Raises PrepareError, naming the file, if it cannot be read to its end."""
        path = PurePosixPath(filepath)
        suffix = path.with_suffix("").suffix if path.suffix in CODECS else path.suffix
        try:
            if suffix == ".parquet":
                yield from super().read_file(filepath)
            elif suffix in JSON_LINES:
                yield from self._lines(filepath)
            else:
                yield from self._whole(filepath)
        except Exception as error:
            where = self.data_folder.resolve_paths(filepath)
            raise PrepareError(f"{where}: {error}; fetch it again, or leave it out with --exclude") from error

    def get_document_from_dict(self, data: dict, source_file: str, id_in_file: int | str) -> Document | None:
        text = data.get(self.text_key)
        fault = self._fault(data, text)
        encoded = b""
        if not fault:
            try:
                encoded = str(text).encode()
            except UnicodeEncodeError:  # a lone surrogate, which JSON can spell
                fault = "not UTF-8"
        if fault:
            self.skipped.add(fault, f"{source_file}:{id_in_file}")
            return None
        return Document(text, hashlib.sha256(encoded).hexdigest())

    def _fault(self, data: dict, text: Any) -> str:
        """Why a row is left out; "" where it is not."""
        for key, value in reversed(self.drop):
            if str(_nested(data, key)) == value:
                return f"dropped, {key} = {value}"
        if not isinstance(text, str):
            return f'no text under the key "{self.text_key}"'
        if not text or text.isspace():
            return "empty"
        return ""

    def _open(self, path: str) -> io.BufferedReader:
        stream = self.data_folder.open(path, "rb")
        codec = CODECS.get(PurePosixPath(path).suffix)
        if codec:
            # Arrow's stream goes on over the frames of a file and fails where one is cut off; zstandard's just ends.
            stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, "r"), codec)
        return io.BufferedReader(stream, 2**20)

    def _lines(self, path: str) -> Iterator[Document]:
        with self._open(path) as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except UnicodeDecodeError:
                    self.skipped.add("not UTF-8", f"{path}:{number}")
                    continue
                except (ValueError, RecursionError):
                    self.skipped.add("not JSON", f"{path}:{number}")
                    continue
                document = self.get_document_from_dict(row if isinstance(row, dict) else {}, path, number)
                if document:
                    yield document

    def _whole(self, path: str) -> Iterator[Document]:
        with self._open(path) as stream:
            content = stream.read()
        try:
            text = content.decode()
        except UnicodeDecodeError:
            self.skipped.add("not UTF-8", path)
            return
        document = self.get_document_from_dict({self.text_key: text}, path, 1)
        if document:
            yield document


def _nested(data: Any, key: str) -> Any:
    for part in key.split("."):
        data = data.get(part) if isinstance(data, dict) else None
    return data


class Reader(PipelineStep):
    """The documents of a task's files, which the folder ``work`` lists; each says its file's number."""

    type = "READER"
    name = "stackgrow"

    def __init__(self, work: str):
        super().__init__()
        self.work = work
        self.skipped = Skipped()

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Raises PrepareError for a file that has changed since it was listed, or cannot be read."""
        inputs = json.loads((Path(self.work) / INPUTS).read_bytes())
        self.skipped = Skipped()
        first, end = inputs["tasks"][rank]
        for number in range(first, end):
            file = File(*inputs["files"][number])
            for document in read_file(inputs, file, self.skipped):
                document.metadata["file"] = number
                yield document


def read_file(inputs: dict[str, Any], file: File, skipped: Skipped) -> Iterator[Document]:
    root = inputs["sources"][file.source]["root"]
    options = inputs["options"]
    reader = FileReader(root, options["text_key"], options["drop"], skipped)
    if _file(file.source, file.name, _info(reader.data_folder, file.name)) != file:
        raise PrepareError(f"{root}/{file.name} changed while it was being prepared; run again")
    yield from reader.read_file(file.name)
