"""What ran, on what, from what: ``provenance.json`` of a run, one entry per session, and ``requirements.lock``.

An entry is written before the work, and names the entry before it. Its identity, the SHA-256 of all that is known at
its start, stands in the seal of every checkpoint that the session makes: an entry edited later is noticed. The stages
that the session worked on and how it ended are added as it goes; of a killed session the end is not known.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from stackgrow import seal
from stackgrow.data.order import BLOCK, Order
from stackgrow.plan.memory import layout
from stackgrow.plan.stages import Plan
from stackgrow.recipe.write import canonical_hash, recipe_hash, to_toml
from stackgrow.run_folder.folder import PROVENANCE, REQUIREMENTS
from stackgrow.run_folder.requirements import requirements

PACKAGES = ("stackgrow", "torch", "torchtitan", "torchdata", "numpy", "sentencepiece", "triton", "flash-attn")
REPOSITORY = Path(__file__).parents[2]
ADDED = ("stages", "ended")  # to an entry, after its start
# What changes numerics, speed or placement; nothing else of the environment is written down.
ENVIRONMENT = re.compile(
    r"(OMP|MKL|CUDA|CUBLAS|CUDNN|NCCL|GLOO|TORCH|PYTORCH|TORCHINDUCTOR|TRITON)_[A-Z0-9_]+"
    r"|SLURM_(JOB_ID|JOB_NUM_NODES|NTASKS|CLUSTER_NAME)|LD_PRELOAD|PYTHONHASHSEED"
)
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH")


@contextmanager
def session(run: Path, plan: Plan, file: str, sets: Sequence[str], order: Order) -> Iterator[str]:
    """Enters this session into the run's provenance, yields its identity, and adds at the end how it ended."""
    record = seal.read_json(run / PROVENANCE) or {}
    before, texts = record.get("sessions", []), record.get("texts", {})
    lock = requirements()
    written = {"recipe_file": Path(file).read_text(errors="replace"), "recipe": to_toml(plan.recipe), "packages": lock}
    build = torch_build()
    written["torch_build"] = build.pop("config", "")
    named = {name: text_hash(text) for name, text in written.items()}
    entry = {
        "previous": identity(before[-1]) if before else None,
        "started": now(),
        "command": sys.argv,
        "overrides": list(sets),
        "recipe_hash": recipe_hash(plan.recipe),
        "texts": named,
        "data": data_facts(plan, order),
        "world_size": (world_size := int(os.environ.get("WORLD_SIZE", "1"))),
        "mesh": mesh(plan, world_size),
        "host": platform.node(),
        "hardware": hardware(),
        "environment": environment(os.environ),
        "python": platform.python_version(),
        "packages": versions(),
        "torch": build,
        "code": code_version(),
    }
    texts = {**texts, **{named[name]: text for name, text in written.items()}}
    seal.write_text(run / REQUIREMENTS, lock)
    facts = {"recipe_hash": entry["recipe_hash"], "data": entry["data"]}
    seal.write_json(run / PROVENANCE, {**facts, "sessions": [*before, entry], "texts": texts})
    try:
        yield identity(entry)
    except BaseException as error:
        with suppress(OSError):  # the disk may be full, which is then what ended the session
            _end(run, f"{type(error).__name__}: {error}")
        raise
    _end(run, "finished")


def identity(entry: Mapping[str, Any]) -> str:
    """The SHA-256 of what a session's entry held when it was made."""
    return canonical_hash({name: value for name, value in entry.items() if name not in ADDED})


def text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def add(run: Path, stage: str, **facts: Any) -> None:
    """Adds facts about a stage to the entry of the session that runs, if it runs in a run folder."""
    _update(run, lambda entry: entry.setdefault("stages", {}).setdefault(stage, {}).update(facts))


def _end(run: Path, how: str) -> None:
    _update(run, lambda entry: entry.update(ended={"at": now(), "how": how[:2000]}))


def _update(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    if (record := seal.read_json(run / PROVENANCE)) is not None:
        change(record["sessions"][-1])
        seal.write_json(run / PROVENANCE, record)


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def data_facts(plan: Plan, order: Order) -> dict[str, Any]:
    """Where the data are, and the hashes of all tokens trained and validated on and of the tokenizer."""
    held_out = [manifest.hash("validation") for manifest in order.manifests]
    facts: dict[str, Any] = {
        "path": plan.recipe.data.path,
        "manifest_hash": order.data_hash,
        "validation_hash": canonical_hash(held_out) if plan.recipe.data.mix else held_out[0],
        "tokenizer_sha256": order.manifests[0].tokenizer_sha256,
    }
    if plan.recipe.data.mix:
        stores = zip(order.manifests, order.shares, order.hashes, strict=True)
        facts["mix"] = [{"path": str(m.folder), "share": s / BLOCK, "manifest_hash": h} for m, s, h in stores]
    return facts


def mesh(plan: Plan, world_size: int) -> dict[str, dict[str, int]]:
    """The degrees of parallelism of every train stage on this many ranks."""
    found = {stage.name: layout(stage.parallel, world_size) for stage in plan.train_stages}
    return {name: {"replicate": at.replicate, "shard": at.shard, "tensor": at.tensor} for name, at in found.items()}


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that matter; never one that could hold a secret."""
    return {k: v for k, v in sorted(variables.items()) if ENVIRONMENT.fullmatch(k) and not SECRET.search(k)}


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide numerics or formats."""
    found = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def torch_build() -> dict[str, Any]:
    """What torch was built from and with; empty where it is not loaded."""
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    facts = {"version": torch.__version__, "commit": torch.version.git_version, "config": torch.__config__.show()}
    return {**facts, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}


def code_version() -> dict[str, str]:
    """The git commit of this code and a hash of what differs from it; empty outside a checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=10)
        return done.stdout if done.returncode == 0 else ""

    if not (REPOSITORY / "pyproject.toml").is_file():  # installed, perhaps inside another project's checkout
        return {}
    try:
        commit, changes = git("rev-parse", "HEAD").strip(), git("diff", "HEAD", "--", "stackgrow", "tools")
    except (OSError, subprocess.TimeoutExpired):
        return {}
    dirty = {"dirty_sha256": hashlib.sha256(changes.encode()).hexdigest()} if changes else {}
    return {"commit": commit, **dirty} if commit else {}


def hardware() -> dict[str, Any]:
    """Processor and memory of rank 0's machine, and accelerators where torch is loaded and sees any."""
    facts: dict[str, Any] = {"machine": platform.machine(), "cpus": os.cpu_count()}
    with suppress(OSError):
        models = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        facts["cpu"] = models[0] if models else platform.processor()
        facts["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts
