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
            lines.setdefault(name, _requirement(name, package))  # the first on the path is the one in use
    builds = {match[1] for line in lines.values() if (match := re.match(r"torch==[^+]+\+(\w+)", line))}
    return "\n".join(
        [
            f"# Python {platform.python_version()}, {platform.system()} {platform.machine()}",
            "# pip install --no-deps -r requirements.lock; then pip install --no-deps -e . in the checkout",
            *(f"--extra-index-url {TORCH_INDEX}/{build}" for build in sorted(builds)),
            *(lines[name] for name in sorted(lines)),
            "",
        ]
    )


def _requirement(name: str, package: metadata.Distribution) -> str:
    origin = json.loads(package.read_text("direct_url.json") or "{}")  # PEP 610
    url = origin.get("url", "")
    if version_control := origin.get("vcs_info"):
        return f"{name} @ {version_control['vcs']}+{url}@{version_control['commit_id']}"
    if "dir_info" in origin:
        return f"# {name}=={package.version} from a local folder"
    return f"{name} @ {url}" if url.startswith("https:") else f"{name}=={package.version}"
