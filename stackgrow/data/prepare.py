"""Text -> a token store, on datatrove: complete or not there at all, and the same bytes on any number of workers.

The list of input files alone decides their tasks. Each writes shards and then a record of them into a folder beside the
store (data/write.py); datatrove runs the tasks, here or on Slurm, and after a stop those that were not completed. When
all are done the manifest is written, last, and the store renamed into place.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from stackgrow.data.read import (
    File,
    Inputs,
    PrepareError,
    Reader,
    Skipped,
    Source,
    list_files,
    other_names,
    read_file,
)
from stackgrow.data.store import (
    DOCUMENT_ENDS,
    DTYPES,
    FORMAT,
    MANIFEST,
    SPLITS,
    Manifest,
    TokenStore,
    read_manifest,
)
from stackgrow.data.tokenizer import NONE, Tokenizer, store_tokenizer, train_tokenizer
from stackgrow.data.write import PARTS, STORE, TokenWriter, fraction, write_file
from stackgrow.process.ranks import lock
from stackgrow.recipe.write import canonical_hash
from stackgrow.seal.files import read_json, sync_folder, write_json

TASKS, TASK_BYTES = (
    1024,
    2**21,
)  # at most so many tasks, of at least so many bytes of input
TRAINING_CHARACTERS = (
    2**28
)  # text a tokenizer is trained on at most; the trainer holds it in memory
LIST_COLUMNS = ["root", "file", "bytes", *SPLITS]
PACKAGES = ("datatrove", "numpy", "pyarrow", "sentencepiece", "tokenizers")
PRESETS: dict[str, dict[str, Any]] = {
    # SlimPajama-627B as the paper has it: without its GitHub part, each document followed by EOS.
    "slimpajama": {
        "pattern": "train/chunk*/*.jsonl.zst",
        "drop": [("meta.redpajama_set_name", "RedPajamaGithub")],
        "validation": 0.0005,
        "document_ends": "eos",
    }
}


def prepare(
    sources: Sequence[Source],
    out: str | Path,
    *,
    tokenizer: int | str | Path | None,
    bos: str | None = None,
    document_ends: str | None = None,
    validation: float = 0.02,
    tokens_per_shard: int = 2**26,
    text_key: str = "text",
    drop: Sequence[tuple[str, str]] = (),
    workers: int = 1,
    append: bool = False,
    slurm: dict[str, Any] | None = None,
) -> tuple[Manifest | None, bool]:
    """Writes the token store ``out``, or adds a corpus to it. Returns its manifest (None: Slurm is at work), and False
    if equal inputs had already been prepared.

    Args:
        tokenizer: a SentencePiece model, a tokenizer.json or the folder of one, or the vocabulary size of one to train
            on the training split; None with ``append``. ``bos`` names its BOS where it does not say itself.
        document_ends: "bos" (the default): a BOS before each document; "eos": an EOS after each; or "both". What is
            added to a store with ``append`` ends as the store's own documents do.
        validation: the share of documents, chosen by their hash, in the validation split; at least one document
            unless it is 0 or there is but one.
        text_key: where JSON and Parquet hold the text; ``drop`` leaves out documents with a value under a key.
        slurm: arguments of datatrove's SlurmPipelineExecutor; at least partition and time.

    Raises:
        PrepareError: no documents, bad options, files that change or end early, or ``out`` is in the way.
        TokenizerError: the tokenizer cannot be read or trained. OSError: the store cannot be written.
    """
    _check_options(validation, tokens_per_shard)
    # What is prepared: its fingerprint covers all that decides the store's bytes.
    out = Path(out).absolute()
    work = out.with_name(f".{out.name}.partial")
    files, skipped = _list(sources)
    before = read_manifest(out) if append else None
    document_ends = _document_ends(document_ends, before)
    known = _known_tokenizer(tokenizer, bos, document_ends, before)
    options = {
        "tokenizer": _stated_tokenizer(known),
        "validation": validation,
        "tokens_per_shard": tokens_per_shard,
        "text_key": text_key,
        "drop": [list(pair) for pair in drop],
        **_options_of_documents(known, document_ends),
    }
    inputs = Inputs(
        fingerprint=canonical_hash([FORMAT, options, files]),
        corpus=len(before.raw["corpora"]) if before else 0,
        options=options,
        sources=list(sources),
        files=files,
        tasks=_tasks(files),
        skipped=skipped,
    )
    # Equal inputs are prepared once.
    existing = _existing(out, inputs, append)
    if existing:
        _remove_left_over(work, inputs)
        return existing, False
    # The tasks that are not done, here or on Slurm, and then the last step.
    with _locked(work, out):
        _begin(work, inputs, known)
        if slurm:
            _submit(work, out, len(inputs.tasks), slurm)
            return None, True
        _run_here(work, len(inputs.tasks), workers)
        finish(work, out)
    return read_manifest(out), True


def _check_options(validation: float, tokens_per_shard: int) -> None:
    if not 0 <= validation < 1:
        raise PrepareError(
            f"validation share {validation} must be at least 0 and below 1"
        )
    if not 1 <= tokens_per_shard <= 2**30:
        raise PrepareError(
            f"tokens per shard {tokens_per_shard} must be between 1 and {2**30}"
        )


def _list(sources: Sequence[Source]) -> tuple[list[File], Skipped]:
    """The files of ``sources``, and what was left out; warns of files that may have been meant."""
    skipped = Skipped()
    files = list_files(sources, skipped)
    for warning in other_names(sources, files):
        print(f"prepare_data: warning: {warning}", file=sys.stderr)
    return files, skipped


def _remove_left_over(work: Path, inputs: Inputs) -> None:
    """Removes ``work`` where a kill came between the last two steps of preparing these inputs, and its store stands."""
    left_over = Inputs.read(work)
    if left_over and left_over.fingerprint == inputs.fingerprint:
        shutil.rmtree(
            work, ignore_errors=True
        )  # its owner may be there, and do so, too


def _run_here(work: Path, tasks: int, workers: int) -> None:
    """Runs the tasks that are not done, in ``workers`` processes."""
    log = str(work / "log")
    _Local(_pipeline(work), tasks, workers, logging_dir=log).run()


def _document_ends(given: str | None, before: Manifest | None) -> str:
    if given not in (None, *DOCUMENT_ENDS):
        raise PrepareError(
            f'"{given}" is no way to end a document; give one of {", ".join(DOCUMENT_ENDS)}'
        )
    if before is None:
        return given or "bos"
    if given not in (None, before.document_ends):
        raise PrepareError(
            f"{before.folder} was prepared with --document-ends {before.document_ends}, and what is added ends as its "
            "documents do; leave the option out"
        )
    return before.document_ends


def _known_tokenizer(
    tokenizer: int | str | Path | None,
    bos: str | None,
    document_ends: str,
    before: Manifest | None,
) -> int | Tokenizer:
    """The tokenizer, or how many pieces one is to be trained with; ``before``: of the store that is added to."""
    if before is None:
        assert tokenizer is not None
        if not isinstance(tokenizer, int):
            return Tokenizer.load(tokenizer, bos=bos, document_ends=document_ends)
        if bos is not None:
            raise PrepareError(
                "a tokenizer that is trained here has a BOS of its own; leave --bos out"
            )
        return tokenizer
    known = store_tokenizer(before)
    if tokenizer is None and bos is None:
        return known
    other = PrepareError(
        f"{before.folder} has a tokenizer of its own, and what is added needs it; name no other"
    )
    if tokenizer is None or isinstance(tokenizer, int):
        raise other
    given = Tokenizer.load(tokenizer, bos=bos, document_ends=document_ends)
    if (given.sha256, _opening_id(given, document_ends)) != (
        known.sha256,
        before.bos_id,
    ):
        raise other
    return known


def _stated_tokenizer(known: int | Tokenizer) -> str:
    """What a store's manifest states of its tokenizer among the options."""
    if isinstance(known, int):
        return f"trained, {known} pieces"
    return known.sha256


def _opening_id(tokenizer: Tokenizer, document_ends: str) -> int:
    """The token that stands before a document: BOS, or the EOS of the document before it."""
    return tokenizer.eos_id if document_ends == "eos" else tokenizer.bos_id


def _options_of_documents(known: int | Tokenizer, document_ends: str) -> dict[str, Any]:
    """What of the documents' ends differs from what the tokenizer's file alone says; nothing in most stores."""
    options: dict[str, Any] = {}
    if document_ends != "bos":
        options["document_ends"] = document_ends
    if isinstance(known, Tokenizer):
        alone = Tokenizer.parse(known.model, known.file)
        if (known.bos_id, known.eos_id) != (alone.bos_id, alone.eos_id):
            options["special_ids"] = [known.bos_id, known.eos_id]
    return options


def _tasks(files: Sequence[File]) -> list[tuple[int, int]]:
    """Consecutive files, [first, last + 1) of each task: by their bytes alone."""
    all_bytes = sum(file.bytes for file in files)
    enough = max(TASK_BYTES, math.ceil(all_bytes / TASKS))
    tasks = []
    first = 0
    size = 0
    for number, file in enumerate(files, 1):
        size += file.bytes
        if size >= enough or number == len(files):
            tasks.append((first, number))
            first = number
            size = 0
    return tasks


def _existing(out: Path, inputs: Inputs, append: bool) -> Manifest | None:
    """The store at ``out`` when it holds these inputs; None when nothing is in the way of preparing them."""
    if not (out / MANIFEST).exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise PrepareError(
                f"{out} exists and is not a token store; name another folder with --out"
            )
        return None
    manifest = read_manifest(out)
    corpora = manifest.raw.get("corpora", [])
    if all(corpus["fingerprint"] != inputs.fingerprint for corpus in corpora):
        if append:
            return None
        same_options = any(corpus["options"] == inputs.options for corpus in corpora)
        other = "files" if same_options else "options"
        raise PrepareError(
            f"{out} was prepared from other {other}; name another --out, delete that folder, or --append"
        )
    for name, split in manifest.splits.items():
        if split.tokens:
            TokenStore.open(out, name)  # refuses a store whose files are not all there
    return manifest


@contextlib.contextmanager
def _locked(work: Path, out: Path) -> Iterator[None]:
    """Keeps two preparations of one store on this machine apart; ``work`` stays unless it has become the store."""
    work.mkdir(parents=True, exist_ok=True)
    handle = os.open(work, os.O_RDONLY)
    try:
        lock(handle)
        if not work.exists() or not os.path.samestat(os.fstat(handle), work.stat()):
            raise BlockingIOError  # its owner has just finished, and the folder is the store now
        yield
    except BlockingIOError:
        raise PrepareError(
            f"another preparation of {out} is at work; let it finish, then run again"
        ) from None
    finally:
        os.close(handle)


def _begin(work: Path, inputs: Inputs, known: int | Tokenizer) -> None:
    """Writes the tokenizer and then the inputs, unless a stopped preparation of the same inputs has."""
    stopped = Inputs.read(work)
    if stopped:
        if stopped.fingerprint != inputs.fingerprint:
            raise PrepareError(
                f"{work} holds a stopped preparation of other files or options; finish or delete it"
            )
        return
    for folder in (STORE, PARTS):
        (work / folder).mkdir(exist_ok=True)
    tokenizer = known
    if isinstance(tokenizer, int):
        tokenizer = train_tokenizer(list(_sample(inputs)), tokenizer)
    write_file(work / STORE / tokenizer.file, tokenizer.model)
    ends = inputs.document_ends
    begun = dataclasses.replace(
        inputs,
        tokenizer=tokenizer.file,
        dtype=_dtype(tokenizer.vocab_size),
        bos_id=_opening_id(tokenizer, ends),
        eos_id=None if tokenizer.eos_id == NONE else tokenizer.eos_id,
        begin=[] if ends == "eos" else [tokenizer.bos_id],
        end=[] if ends == "bos" else [tokenizer.eos_id],
    )
    begun.write(work)


def _dtype(vocab_size: int) -> str:
    """The smallest that holds every id."""
    return next(name for name, ids in DTYPES.items() if vocab_size <= ids)


def _sample(inputs: Inputs) -> Iterator[str]:
    """Training text from all over the corpus: files by the hashes of their names, of each no more than its share."""
    files = sorted(
        inputs.files, key=lambda file: hashlib.sha256(os.fsencode(file.name)).digest()
    )
    share = max(TRAINING_CHARACTERS // len(files), 2**20)
    total = 0
    for file in files:
        taken = 0
        for document in read_file(inputs, file, Skipped()):
            if fraction(document.id) >= inputs.validation:
                yield document.text[: share - taken]
                taken += len(document.text)
            if taken >= share:
                break
        total += taken
        if total >= TRAINING_CHARACTERS:
            return


def _pipeline(work: Path, validation: float | None = None) -> list[PipelineStep]:
    if validation is None:
        validation = Inputs.of(work).validation
    reader = Reader(str(work))
    return [reader, TokenWriter(str(work), reader, validation)]


class _Local(LocalPipelineExecutor):
    """datatrove's executor and its record of completed tasks, on a pool that a killed worker breaks: in
    multiprocessing's, which datatrove takes, the others would wait for it for ever."""

    def run(self) -> None:
        ranks = self.get_incomplete_ranks()
        if self.workers == 1 or len(ranks) < 2:
            for rank in ranks:
                self._run_for_rank(rank)
            return
        context = multiprocessing.get_context(
            "spawn"
        )  # a forkserver would outlive a killed preparation
        try:
            with ProcessPoolExecutor(
                min(self.workers, len(ranks)), context, _start_worker
            ) as pool:
                for _ in pool.map(self._run_for_rank, ranks):
                    pass
        except BrokenProcessPool as error:
            raise PrepareError(
                "a worker was killed, perhaps for want of memory; run again to go on"
            ) from error


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(
            1, signal.SIGKILL
        )  # PR_SET_PDEATHSIG: the workers of a killed preparation end with it
        parent = multiprocessing.parent_process()
        if (
            parent and os.getppid() != parent.pid
        ):  # killed before the request: no signal would come
            os._exit(1)


def _submit(work: Path, out: Path, tasks: int, options: dict[str, Any]) -> None:
    """Has Slurm run the tasks, and then, when all are done, the last step."""
    defaults = {
        "qos": "",
        "venv_path": f"{sys.prefix}/bin/activate",
        "job_name": f"prepare-{out.name}",
    }
    options = defaults | options
    encode = SlurmPipelineExecutor(
        _pipeline(work), tasks, logging_dir=str(work / "log"), **options
    )
    last_step = SlurmPipelineExecutor(
        [partial(finish, work, out)],
        tasks=1,
        depends=encode,
        skip_completed=False,
        logging_dir=str(out.with_name(f".{out.name}.slurm")),
        **options,
    )
    try:
        last_step.run()  # submits what it depends on first
    except subprocess.CalledProcessError as error:  # sbatch has said why
        raise PrepareError(
            "Slurm has refused the job (above); what was submitted of it waits: see squeue"
        ) from error


def finish(work: Path, out: Path, *_: Any) -> None:
    """Makes the work of all tasks the store ``out``, or a part of it; doing it again after a kill does the rest."""
    inputs = Inputs.of(work)
    parts = _with_validation(work, _records(work, len(inputs.tasks)), inputs.validation)
    skipped = Skipped(inputs.skipped)
    for part in parts:
        skipped.merge(part["skipped"])
    splits = {split: _joined(_of(split, parts)) for split in SPLITS}
    _refuse_empty(splits, skipped)

    corpus = {
        "fingerprint": inputs.fingerprint,
        "options": inputs.options,
        "sources": [asdict(source) for source in inputs.sources],
        "skipped": skipped,
        "list": _write_list(work, inputs, parts),
    }
    content = (work / STORE / inputs.tokenizer).read_bytes()
    tokenizer = Tokenizer.parse(content, inputs.tokenizer)
    versions = {package: metadata.version(package) for package in PACKAGES}
    manifest = {
        "format": FORMAT,
        "dtype": inputs.dtype,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id if inputs.bos_id is None else inputs.bos_id,
        "eos_id": inputs.eos_id,
        "document_ends": inputs.document_ends,
        "tokenizer": {"file": inputs.tokenizer, "sha256": tokenizer.sha256},
        "splits": splits,
        "corpora": [corpus],
        "versions": {"python": platform.python_version(), **versions},
    }
    _put_in_place(work, out, manifest)


def _write_list(
    work: Path, inputs: Inputs, parts: list[dict[str, Any]]
) -> dict[str, str]:
    """Writes the list of the corpus' files, by which a token is traced to its document; returns its name and hash."""
    documents: dict[
        str, list[int]
    ] = {}  # of each file, by its number: in train, in validation
    for part in parts:
        documents |= part["files"]
    rows = []
    for number, file in enumerate(inputs.files):
        root = inputs.sources[file.source].root
        in_splits = documents.get(str(number), [0, 0])
        rows.append([root, file.name, file.bytes, *in_splits])
    content = json.dumps({"columns": LIST_COLUMNS, "files": rows}).encode()
    name = f"sources-{inputs.corpus:02d}.json"
    write_file(work / STORE / name, content)
    return {"file": name, "sha256": hashlib.sha256(content).hexdigest()}


def _refuse_empty(splits: dict[str, Any], skipped: Skipped) -> None:
    if splits["train"]["documents"]:
        return
    reasons = ", ".join(
        f"{entry['count']} {reason}" for reason, entry in skipped.items()
    )
    held_out = splits["validation"]["documents"]
    raise PrepareError(
        f"no documents to train on: {held_out} held out (--validation); left out: {reasons or 'none'}"
    )


def _records(work: Path, tasks: int) -> list[dict[str, Any]]:
    records = [read_json(work / PARTS / f"{rank:05d}.json") for rank in range(tasks)]
    done = [record for record in records if record is not None]
    if len(done) < tasks:
        raise PrepareError(
            f"{tasks - len(done)} of {tasks} tasks are not done; run the same command again"
        )
    return done


def _with_validation(
    work: Path, parts: list[dict[str, Any]], share: float
) -> list[dict[str, Any]]:
    """The records; where no document of several was held out, after the task that has the one next to it is done again
    with that one held out."""
    held_out = _joined(_of("validation", parts))["documents"]
    trained = _joined(_of("train", parts))["documents"]
    if share == 0 or held_out or trained < 2:
        return parts
    lowest = [part["lowest"] for part in parts]
    rank = lowest.index(min(lowest))
    just_above = float(np.nextafter(lowest[rank], 1))
    reader, writer = _pipeline(work, validation=just_above)
    again = reader.run(None, rank, len(parts))
    writer.run(again, rank, len(parts))
    return _records(work, len(parts))


def _of(split: str, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each task's record says of a split."""
    return [part["splits"][split] for part in parts]


def _joined(splits: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One split's entries, of several tasks or corpora, as one."""
    shards = []
    for split in splits:
        shards += split["shards"]
    return {
        "tokens": sum(split["tokens"] for split in splits),
        "documents": sum(split["documents"] for split in splits),
        "shards": shards,
    }


def _put_in_place(work: Path, out: Path, manifest: dict[str, Any]) -> None:
    store = work / STORE
    named = {manifest["tokenizer"]["file"], manifest["corpora"][0]["list"]["file"]}
    for split in manifest["splits"].values():
        named.update(shard["file"] for shard in split["shards"])
    # What a killed worker left must not become part of the store.
    for path in store.iterdir():
        if path.name not in named:  # of a killed worker, or of a task done again
            path.unlink()
    if (out / MANIFEST).exists():
        _add_to(out, store, named - {manifest["tokenizer"]["file"]}, manifest)
    else:
        write_json(store / MANIFEST, manifest)
        store.rename(out)
        sync_folder(out.parent)
    shutil.rmtree(
        work, ignore_errors=True
    )  # another preparation may find it and delete it, too


def _add_to(out: Path, store: Path, names: set[str], manifest: dict[str, Any]) -> None:
    """Moves files that no manifest of ``out`` names yet into it, and then writes the manifest that names them."""
    before = read_manifest(out).raw
    for name in sorted(names):
        if (store / name).exists():  # not moved before a kill
            (store / name).replace(out / name)
    for split in SPLITS:
        manifest["splits"][split] = _joined(
            [before["splits"][split], manifest["splits"][split]]
        )
    manifest["corpora"] = [*before["corpora"], *manifest["corpora"]]
    write_json(out / MANIFEST, manifest)
