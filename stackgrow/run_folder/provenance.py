"""What ran, on what, from what: ``provenance.json`` of a run, one entry per session, and ``requirements.lock``.

An entry is written before the work. Its identity, the SHA-256 of all that is known at its start, stands in the seal of
every checkpoint that the session makes: an entry edited later is noticed. The stages that the session worked on and how
it ended are added as it goes (of a killed session the end is not known); the next entry names the whole by its hash.
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
from stackgrow.run_folder.folder import RunFolder
from stackgrow.run_folder.requirements import requirements

PACKAGES = (
    "stackgrow",
    "torch",
    "torchtitan",
    "torchdata",
    "numpy",
    "sentencepiece",
    "triton",
    "flash-attn",
)
REPOSITORY = Path(__file__).parents[2]
CODE = ("stackgrow", "tools")
GIT_SECONDS = 10
ADDED = ("stages", "ended")  # to an entry, after its start
CHAIN = 2  # how entries name the one before: see link()
# What changes numerics, speed or placement; nothing else of the environment is written down.
ENVIRONMENT = re.compile(
    r"(ATEN|OMP|MKL|ONEDNN|DNNL|CUDA|CUBLAS|CUDNN|NCCL|GLOO|TORCH|PYTORCH|TORCHINDUCTOR|TRITON)_[A-Z0-9_]+"
    r"|SLURM_(JOB_ID|JOB_NUM_NODES|NTASKS|CLUSTER_NAME)|LD_PRELOAD|PYTHONHASHSEED"
)
# In /proc/cpuinfo on x86. Virtual machines call many generations by one model name, such as "AMD EPYC".
CPU_FACTS = {
    "cpu": "model name",
    "cpu_family": "cpu family",
    "cpu_model": "model",
    "cpu_stepping": "stepping",
}
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH")


@contextmanager
def session(
    run: RunFolder, plan: Plan, file: str, sets: Sequence[str], order: Order
) -> Iterator[str]:
    """Enters this session into the run's provenance, yields its identity, and adds at the end how it ended."""
    record = run.provenance()
    earlier_sessions = record.get("sessions", [])
    texts = {
        "recipe_file": Path(file).read_text(encoding="utf-8", errors="replace"),
        "recipe": to_toml(plan.recipe),
        "packages": requirements(),
        "torch_build": torch_config(),
    }
    # Long texts stand in the file once, by their hashes: most do not change from one session to the next.
    text_hashes = {name: text_hash(text) for name, text in texts.items()}
    all_texts = dict(record.get("texts", {}))
    for name, text in texts.items():
        all_texts[text_hashes[name]] = text
    entry = {
        "chain": CHAIN,
        "previous": link(earlier_sessions[-1] if earlier_sessions else None, CHAIN),
        "command": sys.argv,
        "overrides": list(sets),
        "texts": text_hashes,
        **_circumstances(plan, order),
    }
    seal.write_text(run.requirements_file, texts["packages"])
    new_record = {
        "recipe_hash": entry["recipe_hash"],
        "data": entry["data"],
        "sessions": [*earlier_sessions, entry],
        "texts": all_texts,
    }
    seal.write_json(run.provenance_file, new_record)
    try:
        yield identity(entry)
    except BaseException as error:
        with suppress(
            OSError
        ):  # the disk may be full, which is then what ended the session
            _end(run, f"{type(error).__name__}: {error}")
        raise
    _end(run, "finished")


def _circumstances(plan: Plan, order: Order) -> dict[str, Any]:
    """What runs now, on what, from what."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return {
        "started": now(),
        "recipe_hash": recipe_hash(plan.recipe),
        "data": data_facts(plan, order),
        "world_size": world_size,
        "mesh": mesh(plan, world_size),
        "host": platform.node(),
        "hardware": hardware(),
        "environment": environment(os.environ),
        "python": platform.python_version(),
        "packages": versions(),
        "torch": torch_build(),
        "code": code_version(),
    }


def identity(entry: Mapping[str, Any]) -> str:
    """The SHA-256 of what a session's entry held when it was made."""
    return canonical_hash(
        {name: value for name, value in entry.items() if name not in ADDED}
    )


def link(previous: Mapping[str, Any] | None, chain: int | None) -> str | None:
    """How an entry names the one before it: by all that this one holds in the end, where each stage began and how the
    session ended included. Entries without ``chain`` named no more than its identity."""
    if previous is None:
        return None
    return canonical_hash(dict(previous)) if chain == CHAIN else identity(previous)


def maker(sessions: Sequence[Mapping[str, Any]], stage: str, step: int) -> int | None:
    """The index of the session that made a step of a stage: the last of those that began before it. The checkpoint of
    step 0, of a stage that has no steps, is of the last that began there."""
    found = None
    for index, session in enumerate(sessions):
        start = session.get("stages", {}).get(stage, {}).get("start_step")
        if start is not None and (start < step or start == step == 0):
            found = index
    return found


def text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def add(run: RunFolder, stage: str, **facts: Any) -> None:
    """Adds facts about a stage to the entry of the session that runs, if it runs in a run folder."""

    def with_facts(entry: dict[str, Any]) -> None:
        stages = entry.setdefault("stages", {})
        stages.setdefault(stage, {}).update(facts)

    _update(run, with_facts)


def _end(run: RunFolder, how: str) -> None:
    _update(run, lambda entry: entry.update(ended={"at": now(), "how": how[:2000]}))


def _update(run: RunFolder, change: Callable[[dict[str, Any]], None]) -> None:
    record = seal.read_json(run.provenance_file)
    if record is not None:
        change(record["sessions"][-1])
        seal.write_json(run.provenance_file, record)


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def data_facts(plan: Plan, order: Order) -> dict[str, Any]:
    """Where the data are, and the hashes of all tokens trained and validated on and of the tokenizer."""
    facts: dict[str, Any] = {
        "path": plan.recipe.data.path,
        "manifest_hash": order.data_hash,
        "validation_hash": validation_hash(plan, order),
        "tokenizer_sha256": order.manifests[0].tokenizer_sha256,
    }
    if plan.recipe.data.mix:
        facts["mix"] = []
        for manifest, share, manifest_hash in zip(
            order.manifests, order.shares, order.hashes, strict=True
        ):
            store = {
                "path": str(manifest.folder),
                "share": share / BLOCK,
                "manifest_hash": manifest_hash,
            }
            facts["mix"].append(store)
    return facts


def validation_hash(plan: Plan, order: Order) -> str:
    """Of all held-out tokens of all stores."""
    hashes = [manifest.hash("validation") for manifest in order.manifests]
    return canonical_hash(hashes) if plan.recipe.data.mix else hashes[0]


def mesh(plan: Plan, world_size: int) -> dict[str, dict[str, int]]:
    """The degrees of parallelism of every train stage on this many ranks."""
    meshes = {}
    for stage in plan.train_stages:
        degrees = layout(stage.parallel, world_size)
        meshes[stage.name] = {
            "replicate": degrees.replicate,
            "shard": degrees.shard,
            "tensor": degrees.tensor,
        }
    return meshes


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that matter; never one that could hold a secret."""
    kept = {}
    for name, value in sorted(variables.items()):
        if ENVIRONMENT.fullmatch(name) and not SECRET.search(name):
            kept[name] = value
    return kept


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
    return {
        "version": torch.__version__,
        "commit": torch.version.git_version,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def torch_config() -> str:
    """How torch was built, in its own words; "" where it is not loaded."""
    torch = sys.modules.get("torch")
    return "" if torch is None else str(torch.__config__.show())


def code_version() -> dict[str, str]:
    """The git commit of this code, and a hash of what differs from it, new files included; empty outside a checkout."""
    if not (
        REPOSITORY / "pyproject.toml"
    ).is_file():  # installed, perhaps inside another project's checkout
        return {}
    try:
        commit = _git("rev-parse", "HEAD").strip()
        changes = _git("diff", "--no-ext-diff", "--no-textconv", "HEAD", "--", *CODE)
        new_files = _git(
            "ls-files", "--others", "--exclude-standard", "-z", "--", *CODE
        ).split("\0")
    except (OSError, subprocess.TimeoutExpired):
        return {}
    if not commit:
        return {}
    for name in sorted(filter(None, new_files)):
        changes += f"{name} {seal.sha256(REPOSITORY / name)}\n"
    code = {"commit": commit}
    if changes:
        code["dirty_sha256"] = text_hash(changes)
    return code


def _git(*arguments: str) -> str:
    """What git prints of this repository; "" where it fails. It may be another user's, as on a cluster: whoever runs
    its code trusts it already. Nothing that its configuration names is run."""
    command = [
        "git",
        "-c",
        f"safe.directory={REPOSITORY}",
        "-c",
        "core.fsmonitor=false",
        *arguments,
    ]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=GIT_SECONDS
    )
    return done.stdout if done.returncode == 0 else ""


def hardware() -> dict[str, Any]:
    """Processor and memory of rank 0's machine; where torch is loaded, the instructions that its CPU kernels are for,
    and accelerators if it sees any."""
    facts: dict[str, Any] = {"machine": platform.machine(), "cpus": os.cpu_count()}
    with suppress(OSError):
        facts["cpu"] = platform.processor()
        cpus = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        for fact, name in CPU_FACTS.items():
            first = re.search(rf"^{name}\s*:\s*(.+)$", cpus, re.MULTILINE)
            if first is not None:
                facts[fact] = first[1]
        facts["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    torch = sys.modules.get("torch")
    if torch is None:
        return facts
    # Kernels for AVX512 sum in another order than those for AVX2: losses differ by 1e-7, and later by more.
    facts["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        facts["gpus"] = [torch.cuda.get_device_name(index) for index in range(count)]
    return facts
