"""Text anywhere -> documents, on datatrove: JSON lines, Parquet and plain text, on any file system that fsspec knows.

datatrove's JsonlReader only logs what it cannot read: it goes on after a bad line, and ends a file at the first that is
not UTF-8. Here what is left out is counted, and a file that cannot be read to its end is an error.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
from datatrove.data import Document
from datatrove.io import DataFolder, get_datafolder
from datatrove.pipeline.base import PipelineStep
from fsspec.utils import glob_translate
from loguru import logger

from stackgrow.seal.files import read_json, write_json

logger.disable("datatrove")  # tracebacks and tables; its log files stay

INPUTS = "inputs.json"
CODECS = {".zst": "zstd", ".gz": "gzip", ".bz2": "bz2"}
JSON_LINES = (".jsonl", ".json", ".ndjson")
# Endings of files that are no documents, whatever is in them, and what they are.
NO_DOCUMENTS = {
    **dict.fromkeys(
        (".csv", ".tsv"), "a table; write its texts as JSON lines or Parquet"
    ),
    **dict.fromkeys((".tar", ".tgz", ".zip", ".7z", ".rar"), "an archive; unpack it"),
    **dict.fromkeys(
        (".xz", ".lz4", ".lzma", ".br", ".z"),
        "compressed in another way than .zst, .gz and .bz2",
    ),
    **dict.fromkeys(
        (".arrow", ".feather", ".avro", ".orc"),
        "not a format that is read; write Parquet",
    ),
    **dict.fromkeys((".npy", ".npz", ".bin", ".pt", ".safetensors"), "binary data"),
}
# What a decompressor says, and what it means.
CAUSES = {
    "too much memory for decoding": "it was packed with zstd --long; pack it again: zstd -d --long=31 -c FILE | zstd",
    "zlib inflate failed": "it is not gzip, or something follows its end, such as padding; pack it again with gzip",
}
VERSIONS = (
    "mtime",
    "ETag",
    "etag",
    "blob_id",
    "LastModified",
    "last_modified",
    "updated",
)  # what file systems have
SKIPPED_NAMES = 20  # names kept per reason in the manifest
STDLIB_EXCLUDED = (
    "site-packages",
    "dist-packages",
    "lib2to3",
    "encodings",
    "test",
    "tests",
    "idle_test",
)


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


@dataclass(frozen=True)
class Inputs:
    """What a corpus is prepared from and how, as a file in the preparation's work folder tells it to every task."""

    fingerprint: str  # of format, options and files: equal ones are not prepared again
    corpus: int  # its number in the store, from 0
    options: dict[str, Any]
    sources: list[Source]
    files: list[File]
    tasks: list[
        tuple[int, int]
    ]  # of each the first of its files, and the one after its last
    skipped: dict[str, dict[str, Any]]  # files that were left out when they were listed
    # What is known as soon as there is a tokenizer: its file, the tokens' type, and what stands around a document.
    tokenizer: str = ""
    dtype: str = ""
    bos_id: int | None = None
    eos_id: int | None = None
    begin: list[int] | None = (
        None  # None: an earlier version began this, and BOS opens every document
    )
    end: list[int] = field(default_factory=list)

    @property
    def validation(self) -> float:
        return float(self.options["validation"])

    @property
    def document_ends(self) -> str:
        return str(self.options.get("document_ends", "bos"))

    @classmethod
    def read(cls, work: Path) -> Inputs | None:
        """Those of the preparation in a work folder; None where none has begun."""
        raw = read_json(work / INPUTS)
        if raw is None:
            return None
        raw["sources"] = [
            Source(row["root"], row["pattern"], tuple(row["exclude"]))
            for row in raw["sources"]
        ]
        raw["files"] = [File(*row) for row in raw["files"]]
        return cls(**raw)

    @classmethod
    def of(cls, work: Path) -> Inputs:
        """Those of a preparation that has begun."""
        inputs = cls.read(work)
        assert inputs is not None
        return inputs

    def write(self, work: Path) -> None:
        write_json(work / INPUTS, asdict(self))


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
        try:
            files += _list_source(number, source, seen, skipped)
        except (PrepareError, OSError):
            raise
        except Exception as error:  # each file system's client has its own
            if "://" not in source.root:
                raise
            why = " ".join(str(error).split()) or type(error).__name__
            raise PrepareError(
                f"{source.root} cannot be listed ({why}): is there a network, and the proxy or login that it needs? "
                "Where there is none, copy the files to this machine and name their folder as --input"
            ) from error
    if not files:
        where = ", ".join(f"{source.root}/{source.pattern}" for source in sources)
        raise PrepareError(f"no documents in {where}; look at --pattern and --exclude")
    return files


def _list_source(
    number: int, source: Source, seen: set[str], skipped: Skipped
) -> Iterator[File]:
    """Files of one source that are not in ``seen``, where they are added, links resolved."""
    folder = get_datafolder(source.root)
    if not folder.isdir(""):
        raise PrepareError(
            f"{source.root} is not a folder; give one that holds the text files"
        )
    for name, info in sorted(_matching(folder, source.pattern).items()):
        excluded = any(fnmatchcase(name, pattern) for pattern in source.exclude)
        if excluded or info["type"] == "directory":
            continue
        if folder.is_local():
            real = str(Path(source.root, name).resolve())
        else:
            real = folder.resolve_paths(name)
        reason = _why_not(folder, name, info)
        if not reason and real in seen:
            reason = "same file found twice"
        seen.add(real)
        if reason:
            skipped.add(reason, name)
            continue
        # A link's own entry is not the file's, and a listing over HTTP has no sizes.
        if info["type"] != "file" or info.get("size") is None:
            info = _info(folder, name)
        yield _file(number, name, info)


def _why_not(folder: DataFolder, name: str, info: dict[str, Any]) -> str:
    """Why what stands under this name is no document, whatever is in it; "" where it may be one."""
    if info["type"] != "file" and not folder.isfile(name):
        return "not a regular file"  # opening a pipe would wait for ever
    kind = _kind(name)
    if kind in NO_DOCUMENTS:
        return f"{kind} is {NO_DOCUMENTS[kind]}"
    return ""


def _matching(folder: DataFolder, pattern: str) -> dict[str, dict[str, Any]]:
    """What lies in the folder and matches the pattern, with what the file system says of each."""
    if not re.search(r"[*?\[]", folder.path):
        return folder.glob(pattern, detail=True)
    # fsspec would read the folder's own name as a pattern, too.
    matches = re.compile(glob_translate(pattern)).match
    everything = folder.find("", withdirs=True, detail=True)
    return {name: info for name, info in everything.items() if matches(name)}


def _kind(name: str) -> str:
    """What a file's name says that it holds: ".jsonl" of a.jsonl, A.JSONL and a.jsonl.zst."""
    path = PurePosixPath(name.lower())
    if path.suffix in CODECS:
        path = path.with_suffix("")
    return path.suffix


def other_names(sources: Sequence[Source], files: Sequence[File]) -> Iterator[str]:
    """Of every kind of file that is a document each, a warning where the first one looks like JSON lines."""
    seen = set(JSON_LINES) | {".parquet"}
    for file in files:
        kind = _kind(file.name)
        if kind in seen:
            continue
        seen.add(kind)
        root = sources[file.source].root
        reader = FileReader(root, "text", (), Skipped())
        if reader.begins(file.name).lstrip().startswith(b'{"'):
            yield (
                f'{root}/{file.name} begins with {{" and is one document all the same; if it holds one per line, give '
                "it a name that ends in .jsonl"
            )


def _info(folder: DataFolder, name: str) -> dict[str, Any]:
    info = folder.info(name)
    if info.get("islink"):  # fsspec gives the link's own
        info = folder.fs.info(str(Path(folder.path, name).resolve()))
    return info


def _file(source: int, name: str, info: dict[str, Any]) -> File:
    version = next((str(info[key]) for key in VERSIONS if info.get(key)), "")
    return File(source, name, info.get("size") or 0, version)


class FileReader:
    """Documents of single files, each identified by the SHA-256 of its text; ``skipped`` counts what is left out.

    ``drop`` leaves out documents with a value: ("meta.redpajama_set_name", "RedPajamaGithub").
    """

    def __init__(
        self, root: str, text_key: str, drop: Sequence[Sequence[str]], skipped: Skipped
    ):
        self.folder = get_datafolder(root)
        self.text_key = text_key
        self.drop = drop
        self.skipped = skipped

    def read_file(self, name: str) -> Iterator[Document]:
        """Raises PrepareError, naming the file, if it cannot be read to its end."""
        kind = _kind(name)
        try:
            if kind == ".parquet":
                rows = self._parquet_rows(name)
            elif kind in JSON_LINES:
                rows = self._json_rows(name)
            else:
                rows = self._whole_file(name)
            for number, row in rows:
                document = self._document(row, f"{name}:{number}")
                if document:
                    yield document
        except Exception as error:
            where = self.folder.resolve_paths(name)
            for message, cause in CAUSES.items():
                if message in str(error):
                    raise PrepareError(
                        f"{where}: {error}: {cause}, or leave it out with --exclude"
                    ) from error
            raise PrepareError(
                f"{where}: {error}; fetch it again, or leave it out with --exclude"
            ) from error

    def begins(self, name: str) -> bytes:
        """The first bytes of a file; none where it cannot be read."""
        try:
            with self._open(name) as stream:
                return stream.read(64)
        except Exception:
            return b""

    def _document(self, row: dict[str, Any], where: str) -> Document | None:
        """The document in a row; None, and one more that is left out, where there is none."""
        text = row.get(self.text_key)
        fault = self._fault(row, text)
        encoded = b""
        if not fault:
            try:
                # A binary column of Parquet gives bytes.
                encoded = text if isinstance(text, bytes) else str(text).encode()
                text = encoded.decode()
            except (
                UnicodeError
            ):  # a lone surrogate, which JSON can spell, or another encoding
                fault = "not UTF-8"
        if fault:
            self.skipped.add(fault, where)
            return None
        return Document(str(text), hashlib.sha256(encoded).hexdigest())

    def _fault(self, row: dict[str, Any], text: Any) -> str:
        """Why a row is left out; "" where it is not."""
        for key, value in reversed(self.drop):
            if str(_nested(row, key)) == value:
                return f"dropped, {key} = {value}"
        if not isinstance(text, (str, bytes)):
            return f'no text under the key "{self.text_key}"'
        if not text or text.isspace():
            return "empty"
        return ""

    def _open(self, name: str) -> io.BufferedReader:
        stream = self.folder.open(name, "rb")
        codec = CODECS.get(PurePosixPath(name).suffix.lower())
        if codec:
            # Arrow's stream goes on over the frames of a file and fails where one is cut off; zstandard's just ends.
            stream = pyarrow.CompressedInputStream(
                pyarrow.PythonFile(stream, "r"), codec
            )
        return io.BufferedReader(stream, 2**20)

    def _json_rows(self, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """The objects of a file of JSON lines, each with its line's number, from 1."""
        with self._open(name) as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                # json.loads would guess the encoding of bytes, and find text in what is none.
                encoding = "utf-8-sig" if number == 1 else "utf-8"
                try:
                    row = json.loads(line.decode(encoding))
                except UnicodeDecodeError:
                    self.skipped.add("not UTF-8", f"{name}:{number}")
                    continue
                except (ValueError, RecursionError):
                    self.skipped.add("not JSON", f"{name}:{number}")
                    continue
                yield number, row if isinstance(row, dict) else {}

    def _parquet_rows(self, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows of a Parquet file, each with its number, from 0; of its columns only those that are asked for."""
        keys = [self.text_key]
        for key, _ in self.drop:
            keys.append(key)
        number = 0
        with (
            self.folder.open(name, "rb") as stream,
            pyarrow.parquet.ParquetFile(stream) as file,
        ):
            for batch in file.iter_batches(1000, columns=keys):
                for index in range(batch.num_rows):
                    row = _parquet_row(batch.slice(index, 1))
                    if row is None:
                        self.skipped.add("not UTF-8", f"{name}:{number}")
                    else:
                        yield number, row
                    number += 1

    def _whole_file(self, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """The file as one row."""
        with self._open(name) as stream:
            content = stream.read()
        try:
            yield 1, {self.text_key: content.decode()}
        except UnicodeDecodeError:
            self.skipped.add("not UTF-8", name)


def _parquet_row(row: pyarrow.RecordBatch) -> dict[str, Any] | None:
    """A batch of one row as plain values; None where a text in it is not UTF-8, which Parquet does not check."""
    try:
        [values] = row.to_pylist() or [{}]
    except UnicodeDecodeError:
        return None
    return values


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

    def run(
        self, data: Any = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        """Raises PrepareError for a file that has changed since it was listed, or cannot be read."""
        inputs = Inputs.of(Path(self.work))
        self.skipped = Skipped()
        first, end = inputs.tasks[rank]
        for number in range(first, end):
            for document in read_file(inputs, inputs.files[number], self.skipped):
                document.metadata["file"] = number
                yield document


def read_file(inputs: Inputs, file: File, skipped: Skipped) -> Iterator[Document]:
    """The documents of one file. Raises PrepareError where it has changed since it was listed, or cannot be read."""
    root = inputs.sources[file.source].root
    reader = FileReader(
        root, inputs.options["text_key"], inputs.options["drop"], skipped
    )
    now = _file(file.source, file.name, _info(reader.folder, file.name))
    if now != file:
        raise PrepareError(
            f"{root}/{file.name} changed while it was being prepared; run again"
        )
    yield from reader.read_file(file.name)
