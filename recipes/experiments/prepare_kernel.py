"""The corpus of deep_*: source and documentation of the Linux kernel, 278 MB of text, as Debian packages it.

    python recipes/experiments/prepare_kernel.py                       # -> data/kernel, in about five minutes
    python recipes/experiments/prepare_kernel.py --work /big/disk --out /big/disk/kernel

Needs dpkg and GNU tar, 139 MB of download and 1.5 GB of disk; no right to install anything. Takes the package that was
measured on, from apt where its index has it, otherwise from snapshot.debian.org, which keeps all that Debian ever had.
Of it takes *.c, *.h, *.rst and *.txt of FOLDERS, trains a tokenizer of 2,048 pieces on them, and prints a hash of the
store's tokens, which must be CONTENT: anything else is told and ends with code 1. --package takes other text, such as
what apt-get download linux-source-6.12 gives; losses will then differ.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

NAME, VERSION = "linux-source-6.1", "6.1.176-1"
FILE = f"{NAME}_{VERSION}_all.deb"
SHA256 = "9305d1a151b8e83dcb88aa11361e7b9513f0c252bdf7f5647e4542762d99c094"
CONTENT = "74be5bb1908252f67f4f3c1c3d74c04f6daf218ac4d80f1d1930eff4dd3bab04"
SNAPSHOT = "https://snapshot.debian.org/file/88a9623d7b92776fbdae70dba1510eeca618a7fa"  # by its SHA-1
FOLDERS = (
    "Documentation", "arch", "block", "certs", "crypto", "fs", "include", "init", "io_uring",
    "ipc", "kernel", "lib", "mm", "net", "security", "sound", "tools", "virt",
)  # fmt: skip
SUFFIXES = (".c", ".h", ".rst", ".txt")
VOCAB = 2048
ROOT = Path(__file__).parents[2]


def download(folder: Path) -> Path:
    """The package that was measured on; what lies in the folder already is taken."""
    package = folder / FILE
    if not package.exists() and shutil.which("apt-get"):
        wanted = f"{NAME}={VERSION}"
        subprocess.run(["apt-get", "download", wanted], cwd=folder, capture_output=True)
    if not package.exists():
        download_from_snapshot(package)

    found = hashlib.sha256(package.read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(
            f"prepare_kernel: {package} is damaged, its SHA-256 is {found} and not {SHA256}; remove it"
        )
    return package


def download_from_snapshot(package: Path) -> None:
    partial = package.with_suffix(".partial")
    print(f"{SNAPSHOT} -> {package}")
    try:
        urllib.request.urlretrieve(SNAPSHOT, partial)
    except OSError as error:
        raise SystemExit(
            f"prepare_kernel: neither apt nor {SNAPSHOT} gives {FILE} ({error}). Get it elsewhere and give"
            " --package FILE. With another version, such as apt-get download linux-source-6.12 has, losses differ"
        ) from None
    partial.rename(package)


def unpack(package: Path, folder: Path) -> Path:
    """The texts of FOLDERS below ``folder``; one that is there is complete, since it is renamed into place."""
    tree = folder / package.stem
    if tree.exists():
        return tree
    partial, unpacked = (
        folder / f".{package.stem}.partial",
        folder / f".{package.stem}.package",
    )
    partial.mkdir(exist_ok=True)
    subprocess.run(["dpkg", "-x", package.resolve(), unpacked], check=True)
    (archive,) = unpacked.glob("usr/src/*.tar.xz")
    top = archive.name.removesuffix(".tar.xz")
    wanted = [f"{top}/{name}/*{suffix}" for name in FOLDERS for suffix in SUFFIXES]
    options = ["--strip-components=1", "--wildcards", "--wildcards-match-slash"]
    # tar tells by its code that a pattern matched nothing (certs has no *.txt); what counts is the hash at the end
    subprocess.run(
        ["tar", "-xJf", archive, "-C", partial, *options, *wanted],
        stderr=subprocess.DEVNULL,
    )
    return partial.rename(tree)


def content_hash(store: Path) -> str:
    """Of the tokenizer and all tokens in their order; not of paths, times or versions, which the manifest has too."""
    manifest = json.loads((store / "manifest.json").read_bytes())
    shards = {
        split: [s["sha256"] for s in of["shards"]]
        for split, of in sorted(manifest["splits"].items())
    }
    content = json.dumps([manifest["tokenizer"]["sha256"], shards], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "data" / "kernel",
        help="the token store to write",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "data",
        help="folder for the package and its texts",
    )
    parser.add_argument(
        "--vocab",
        type=int,
        default=VOCAB,
        help=f"pieces of the tokenizer (default: {VOCAB})",
    )
    parser.add_argument(
        "--package", type=Path, help="a linux-source-*.deb, instead of apt-get download"
    )
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    package = arguments.package or download(arguments.work)
    tree = unpack(package, arguments.work)
    command = [
        sys.executable,
        ROOT / "tools" / "prepare_data.py",
        "--input",
        tree,
        "--pattern",
        "**/*",
    ]
    subprocess.run(
        [*command, "--train-tokenizer", str(arguments.vocab), "--out", arguments.out],
        check=True,
    )
    found = content_hash(arguments.out)
    print(f"{package.name}\ncontent hash {found}")
    if found == CONTENT:
        print("as measured on")
        return 0
    if arguments.package or arguments.vocab != VOCAB:
        print("another store than was measured on: losses will differ")
        return 0
    print(
        f"prepare_kernel: NOT the store that was measured on, whose hash is {CONTENT}",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
