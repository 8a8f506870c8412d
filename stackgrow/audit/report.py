"""What an audit looked at, what it found and what it rests on, as plain values, as text and as a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from stackgrow.errors import DiskError, LockedError, RunError
from stackgrow.recipe.load import Problem
from stackgrow.report.page import page
from stackgrow.run_folder.provenance import now
from stackgrow.text import numbered, printable

NEVER_LOOKED_AT = (
    "report.html, TensorBoard's files and logs: they are no part of the proof"
)
CAUSE = "recipe"  # the check whose findings lead to others
MOST_SHOWN = 8  # findings of a check, as text


@dataclass(frozen=True)
class NotChecked:
    """Something that a reader might take for checked, and why it was not."""

    what: str


@dataclass(frozen=True)
class RestsOn:
    """Something that was taken as it stands."""

    what: str


# A check yields (place, what is wrong) and the two above, and returns in words what it looked at.
Look: TypeAlias = Generator[Problem | NotChecked | RestsOn, None, str]


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
    not_checked: list[str] = field(default_factory=list)
    rests_on: list[str] = field(default_factory=list)

    def look(self, check: str, steps: Look) -> None:
        """Takes what a check gives. A run folder can hold anything, so that whatever a check cannot read is a finding
        too."""
        self.checks[check] = "incomplete"
        try:
            while True:
                self._take(check, next(steps))
        except StopIteration as end:
            self.checks[check] = printable(end.value)
            count = sum(finding.check == check for finding in self.findings)
            if count:
                # What such a check says that it saw ("each as it was sealed") is then not so of all.
                failed = f"FAILED: {numbered(count, 'finding')}, below; of "
                self.checks[check] = failed + self.checks[check]
        except (LockedError, WrongRequest, PermissionError, DiskError):
            raise  # that it cannot be looked at is no fault of the run
        except Exception as error:
            what = f"cannot be checked: {type(error).__name__}: {' '.join(str(error).split())}"
            self.findings.append(Finding(check, "", printable(what)))

    def _take(self, check: str, given: Problem | NotChecked | RestsOn) -> None:
        if isinstance(given, NotChecked):
            self.not_checked.append(printable(given.what))
        elif isinstance(given, RestsOn):
            self.rests_on.append(printable(given.what))
        else:
            where, message = given
            self.findings.append(Finding(check, printable(where), printable(message)))

    @property
    def verdict(self) -> str:
        if self.findings:
            return f"FAILED: {numbered(len(self.findings), 'finding')}"
        if self.not_checked:
            return f"PASSED, BUT NOT CHECKED: {'; '.join(self.not_checked)}"
        return "PASSED"

    def to_dict(self) -> dict[str, Any]:
        values = {
            "ok": not self.findings,
            "verdict": self.verdict,
            **dataclasses.asdict(self),
        }
        return {**values, "never_looked_at": NEVER_LOOKED_AT}

    def render(self) -> str:
        lines = [f"{self.run}   {self.title}".rstrip()]
        for name, what in self.checks.items():
            lines.append(f"  {name:<13}{what}")
        lines.append(self.verdict)
        lines += self._finding_lines()
        if self.findings:
            lines += [
                f"  not checked  {what}" for what in self.not_checked
            ]  # else the verdict says it
        lines += [f"  rests on  {what}" for what in self.rests_on]
        lines.append(f"  never looked at  {NEVER_LOOKED_AT}")
        return "\n".join(lines)

    def _finding_lines(self) -> Iterator[str]:
        """The findings, of every check as many as can be read. Where the recipe is not the run's, all else is compared
        with what it never was: of that, the first of each check."""
        by_check: dict[str, list[Finding]] = {}
        for finding in self.findings:
            by_check.setdefault(finding.check, []).append(finding)
        for check, findings in by_check.items():
            follows = CAUSE in by_check and check != CAUSE
            shown = findings[: 1 if follows else MOST_SHOWN]
            for finding in shown:
                where = f"{finding.where}: " if finding.where else ""
                yield f"  {check}  {where}{finding.message}"
            left = len(findings) - len(shown)
            if left:
                why = (
                    f", as can follow from what is wrong with the {CAUSE}"
                    if follows
                    else ""
                )
                yield f"  {check}  and {left} more{why} (--json has all)"


def audit_page(audit: Audit) -> str:
    """The same as a page for people: it says when it was made, as a run can change after it."""
    values = {"audit": audit, "date": now(), "never_looked_at": NEVER_LOOKED_AT}
    return page("audit/page.html.jinja", values)
