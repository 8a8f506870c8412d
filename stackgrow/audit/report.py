"""What an audit looked at and what it found, as plain values and as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from stackgrow.errors import LockedError, RunError
from stackgrow.recipe.load import Problem
from stackgrow.text import printable

Look: TypeAlias = Generator[Problem, None, str]  # yields (place, what is wrong), returns what was looked at


class WrongRequest(RunError):
    """What the audit was asked for cannot be done with this run."""

    exit_code = 2


@dataclass(frozen=True)
class Finding:
    check: str
    where: str  # a path in the run folder, or a key
    message: str


@dataclass
class Audit:
    """``checks`` {check: what was looked at, in words}; a check with a finding can be incomplete."""

    run: str
    title: str = ""
    checks: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def look(self, check: str, steps: Look) -> None:
        """Takes a check's findings. A run folder can hold anything, so that whatever a check cannot read is a finding
        too."""
        self.checks[check] = "incomplete"
        try:
            while True:
                where, message = next(steps)
                self.findings.append(Finding(check, printable(where), printable(message)))
        except StopIteration as end:
            self.checks[check] = printable(end.value)
        except (LockedError, WrongRequest):
            raise  # nothing is wrong with the run
        except Exception as error:
            what = f"cannot be checked: {type(error).__name__}: {' '.join(str(error).split())}"
            self.findings.append(Finding(check, "", printable(what)))

    def to_dict(self) -> dict[str, Any]:
        return {"ok": not self.findings, **dataclasses.asdict(self)}

    def render(self) -> str:
        lines = [f"{self.run}   {self.title}".rstrip()]
        for name, what in self.checks.items():
            lines.append(f"  {name:<13}{what}")
        count = len(self.findings)
        if count == 0:
            lines.append("nothing found")
        else:
            lines.append("1 finding" if count == 1 else f"{count} findings")
        for finding in self.findings:
            where = f"{finding.where}: " if finding.where else ""
            lines.append(f"  {finding.check}  {where}{finding.message}")
        return "\n".join(lines)
