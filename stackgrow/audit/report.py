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
                self.findings.append(Finding(check, *map(printable, next(steps))))
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
        found = [f"  {f.check}  {f.where}{': ' if f.where else ''}{f.message}" for f in self.findings]
        verdict = f"{len(found)} finding{'s' if len(found) > 1 else ''}" if found else "nothing found"
        checked = [f"  {name:<13}{what}" for name, what in self.checks.items()]
        return "\n".join([f"{self.run}   {self.title}".rstrip(), *checked, verdict, *found])
