"""``requirements.lock``: every installed package in its exact version, as pip installs it again."""

from __future__ import annotations

import json
import platform
import re
from importlib import metadata

TORCH_INDEX = "https://download.pytorch.org/whl"


def requirements() -> str:
    """One line per package. What came from a local folder, as an editable stackgrow does, is a comment: there is
    nothing to fetch it from; provenance.json has its commit."""
    lines: dict[str, str] = {}
    for package in metadata.distributions():
        name = re.sub(r"[-_.]+", "-", package.metadata["Name"] or "").lower()
        if name:
            lines.setdefault(
                name, _requirement(name, package)
            )  # the first on the path is the one in use
    header = [
        f"# Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        "# pip install --no-deps -r requirements.lock; then pip install --no-deps -e . in the checkout",
    ]
    build = re.match(r"torch==[^+]+\+(\w+)", lines.get("torch", ""))  # "cpu", "cu128"
    if build:
        header.append(f"--extra-index-url {TORCH_INDEX}/{build[1]}")
    pinned = [lines[name] for name in sorted(lines)]
    return "\n".join([*header, *pinned, ""])


def _requirement(name: str, package: metadata.Distribution) -> str:
    origin = json.loads(package.read_text("direct_url.json") or "{}")  # PEP 610
    url = origin.get("url", "")
    version_control = origin.get("vcs_info")
    if version_control:
        return f"{name} @ {version_control['vcs']}+{url}@{version_control['commit_id']}"
    if "dir_info" in origin:
        return f"# {name}=={package.version} from a local folder"
    if url.startswith("https:"):
        return f"{name} @ {url}"
    return f"{name}=={package.version}"
