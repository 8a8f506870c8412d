"""The corpus of deep_*: source and documentation of the Linux kernel, 278 MB of text, as Debian packages it.

    python recipes/experiments/prepare_kernel.py                       # -> data/kernel, in about five minutes
    python recipes/experiments/prepare_kernel.py --work /big/disk --out /big/disk/kernel

Needs Debian with apt-get, dpkg and GNU tar, 139 MB of download and 1.5 GB of disk;
no right to install anything. Takes *.c, *.h, *.rst and *.txt of FOLDERS, trains a tokenizer of 2,048 pieces on it and
prints a hash of the store's tokens. With a package of KNOWN the hash must be the one written there: other text, or
another tokenizer, is told and ends with code 1. A package that Debian has dropped from its index is on
snapshot.debian.org; give the file with --package.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

SOURCES = (
    "linux-source-6.12",
    "linux-source-6.1",
)  # Debian 13 has the first, Debian 12 the second
FOLDERS = (
    "Documentation", "arch", "block", "certs", "crypto", "fs", "include", "init", "io_uring",
    "ipc", "kernel", "lib", "mm", "net", "security", "sound", "tools", "virt",
)  # fmt: skip
SUFFIXES = (".c", ".h", ".rst", ".txt")
VOCAB = 2048
KNOWN = {
    "linux-source-6.1_6.1.176-1_all.deb": "74be5bb1908252f67f4f3c1c3d74c04f6daf218ac4d80f1d1930eff4dd3bab04",
}
ROOT = Path(__file__).parents[2]


def download(folder: Path) -> Path:
    """The newest package of SOURCES that this machine's index has; what lies in the folder already is taken."""
    for name in SOURCES:
        if not (found := sorted(folder.glob(f"{name}_*.deb"))):
            if subprocess.run(
                ["apt-get", "download", name], cwd=folder, capture_output=True
            ).returncode:
                continue
            found = sorted(folder.glob(f"{name}_*.deb"))
        return found[-1]
    raise SystemExit(
        f"prepare_kernel: no {' or '.join(SOURCES)} in apt's index; apt-get update, or give --package"
    )


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
    found, known = content_hash(arguments.out), KNOWN.get(package.name)
    print(f"{package.name}\ncontent hash {found}")
    if known and found != known:
        print(
            f"prepare_kernel: NOT the store that was measured on, whose hash is {known}",
            file=sys.stderr,
        )
        return 1
    print(
        "as measured on"
        if known
        else "a package whose hash is not known here: losses will differ in their digits"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
