"""The runs in a folder: how far each has come, what it takes on disk, and what of that can go.

stackgrow runs                                  the runs in runs/
stackgrow runs runs/sweep --json
stackgrow runs runs/quickstart --prune          what could be deleted: older checkpoints of finished stages, and
                                                what was set aside as damaged; --delete deletes it
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from stackgrow.cli.options import parser_of, quiet_at_closed_pipe
from stackgrow.errors import RunError
from stackgrow.run_folder.state import (
    RunState,
    bytes_in,
    delete,
    runs_in,
    spare,
    state_of,
)
from stackgrow.text import aligned, human, short

HEAD = ("run", "state", "stage", "step", "tokens", "of", "loss", "disk", "")


@quiet_at_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=Path("runs"),
        help="a folder of runs, or a run",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--prune", action="store_true", help="list what nothing needs any more"
    )
    parser.add_argument("--delete", action="store_true", help="with --prune: delete it")
    arguments = parser.parse_args(argv)
    if arguments.delete and not arguments.prune:
        parser.error("--delete has a meaning with --prune only")
    folders = runs_in(arguments.folder)
    if not folders:
        print(
            f"runs: {arguments.folder} is no run and holds none; name another folder",
            file=sys.stderr,
        )
        return 2
    try:
        if arguments.prune:
            prune(folders, delete_them=arguments.delete)
            return 0
    except RunError as error:
        print(f"runs: {error}", file=sys.stderr)
        return error.exit_code
    states = [state_of(folder) for folder in folders]
    if arguments.json:
        rows = [
            {**dataclasses.asdict(state), "folder": str(state.folder)}
            for state in states
        ]
        print(json.dumps(rows, indent=1))
    else:
        print(table(states))
    return 0


def table(states: Sequence[RunState]) -> str:
    """One line for each run."""
    rows: list[tuple[str, ...]] = [HEAD]
    for state in states:
        loss = "" if state.loss is None else f"{state.loss:.4f}"
        step = f"{state.step}/{state.steps}" if state.stage else ""
        rows.append(
            (
                state.folder.name,
                state.state,
                state.stage,
                step,
                human(state.tokens),
                human(state.budget_tokens),
                loss,
                f"{human(state.disk_bytes)}B",
                state.why[:60],
            )
        )
    return "\n".join(aligned(rows))


def prune(folders: Sequence[Path], *, delete_them: bool) -> None:
    """Lists, or deletes, what nothing needs any more in each run."""
    total = 0
    for folder in folders:
        for path in list(spare(folder)):
            size = bytes_in(path)
            total += size
            print(f"{'deleted ' if delete_them else ''}{short(path)}  {human(size)}B")
            if delete_them:
                delete(path)
    print(
        f"{human(total)}B {'are free now' if delete_them else 'could be freed: add --delete'}"
    )


if __name__ == "__main__":
    sys.exit(main())
