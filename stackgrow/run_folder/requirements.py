"""``requirements.lock``: every installed package in its exact version, as pip installs it again."""

from __future__ import annotations

import json
import platform
import re
from email.message import Message
from email.parser import HeaderParser
from importlib import metadata

TORCH_INDEX = "https://download.pytorch.org/whl"


def requirements() -> str:
    """One line per package. What came from a local folder, as an editable stackgrow does, is a comment: there is
    nothing to fetch it from; provenance.json has its commit."""
    lines: dict[str, str] = {}
    for package in metadata.distributions():
        header = _header(package)
        name = re.sub(r"[-_.]+", "-", header["Name"] or "").lower()
        if name:
            # The first on the path is the one in use.
            lines.setdefault(name, _requirement(name, header["Version"], package))
    head = [
        f"# Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        "# pip install --no-deps -r requirements.lock; then pip install --no-deps -e . in the checkout",
    ]
    build = re.match(r"torch==[^+]+\+(\w+)", lines.get("torch", ""))  # "cpu", "cu128"
    if build:
        head.append(f"--extra-index-url {TORCH_INDEX}/{build[1]}")
    pinned = [lines[name] for name in sorted(lines)]
    return "\n".join([*head, *pinned, ""])


def _header(package: metadata.Distribution) -> Message:
    """The package's metadata without its description: ``package.metadata`` parses some READMEs of megabytes."""
    text = package.read_text("METADATA") or package.read_text("PKG-INFO") or ""
    return HeaderParser().parsestr(text.partition("\n\n")[0])


def _requirement(name: str, version: str, package: metadata.Distribution) -> str:
    origin = json.loads(package.read_text("direct_url.json") or "{}")  # PEP 610
    url = origin.get("url", "")
    version_control = origin.get("vcs_info")
    if version_control:
        return f"{name} @ {version_control['vcs']}+{url}@{version_control['commit_id']}"
    if "dir_info" in origin:
        return f"# {name}=={version} from a local folder"
    if url.startswith("https:"):
        return f"{name} @ {url}"
    return f"{name}=={version}"
