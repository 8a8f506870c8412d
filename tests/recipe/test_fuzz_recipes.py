"""Mutated recipes on the command line, in this process: each is planned or refused in one message, soon, and nothing
is written. ``make fuzz`` runs more: STACKGROW_FUZZ=10000 (or with another STACKGROW_FUZZ_SEED) pytest this file."""

from __future__ import annotations

import dataclasses
import io
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest
from recipes_for_tests import RECIPE_FILES as RECIPES

from stackgrow.recipe import keys

REPOSITORY = Path(__file__).parents[2]
CASES = int(os.environ.get("STACKGROW_FUZZ", "1500"))
SEED = int(os.environ.get("STACKGROW_FUZZ_SEED", "0"))
SHARES = 15  # tests that the cases are spread over
LIMIT_SECONDS = 10  # of one case, on a machine that is busy with others
KEY = re.compile(r"^\s*([A-Za-z_]+)\s*=\s*(.+?)\s*(#.*)?$")
VALUES = [
    "0", "-1", "1", "2", "3", "7", "64", "4096", "4097", "9223372036854775807", "9223372036854775808", "1e3", "1e308",
    "-0.0", "nan", "-inf", "0x10", "1_000", "true", "false", '""', '"auto"', '"stage"', '"0"', '"1"', '"750B"', '"1.5B"',
    '"9e9B"', '"0 steps"', '"1 steps"', '"3000 steps"', '"2Ti"', '"stack"', '"split"', '"zero"', '"random"', '"learn"',
    '"interleave"', '"wsd"', '"../x"', '"/etc/passwd"', '"~"', '"\\u0000"', '"\\u202e"', "[]", "[0]", "[0, 1, 2, 3]",
    "[1, 0]", "[[0]]", "[9]", "{}", "{ a = 1 }", "1979-05-27", "07:32:00", "'''x'''", "1" + "0" * 400, f'"{"9" * 60}"',
    "[" * 200 + "]" * 200,
]  # fmt: skip
TABLES = [
    "base.model",
    "base.train",
    "growth.train",
    "growth.learn",
    "growth.model",
    "[growth]",
    "[data.mix]",
    "parallel",
]
CLASSES = [
    c
    for c in vars(keys).values()
    if dataclasses.is_dataclass(c) and c.__module__ == keys.__name__
]
KEYS = sorted({f.name for c in CLASSES for f in dataclasses.fields(c)})
BYTES = [
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\n",
    b'"',
    b"'",
    b"[",
    b"]",
    b"=",
    b".",
    b"#",
    b"{",
    b"\\",
]


def mutated(chance: random.Random) -> bytes:
    """A shipped recipe after one to six changes of its values, lines or bytes."""
    text = chance.choice(RECIPES).read_text(encoding="utf-8")
    kinds: list[Callable[[str, random.Random], str]] = (
        [other_value] * 3 + [other_amount, one_more_key] * 2 + [lines, splice]
    )
    for _ in range(chance.choice((1, 1, 1, 1, 2, 4))):
        text = chance.choice(kinds)(text, chance)
    content = text.encode()
    return flipped(content, chance) if chance.random() < 0.15 else content


def keys_in(text: str) -> list[tuple[int, re.Match[str]]]:
    found = ((i, KEY.match(line)) for i, line in enumerate(text.splitlines()))
    return [(i, match) for i, match in found if match]


def replaced(text: str, number: int, line: str) -> str:
    rows = text.splitlines()
    rows[number] = line
    return "\n".join(rows) + "\n"


def other_value(text: str, chance: random.Random) -> str:
    """One key with a value from the list, or with that of another key."""
    if not (found := keys_in(text)):
        return text
    number, match = chance.choice(found)
    value = (
        chance.choice(VALUES) if chance.random() < 0.6 else chance.choice(found)[1][2]
    )
    return replaced(text, number, f"{match[1]} = {value}")


def other_amount(text: str, chance: random.Random) -> str:
    """One number made smaller or larger: what contradicts the rest of the recipe, if anything does."""
    if not (found := [(i, m) for i, m in keys_in(text) if re.search(r"\d", m[2])]):
        return text
    number, match = chance.choice(found)
    digits = list(re.finditer(r"\d+", match[2]))
    one = chance.choice(digits)
    amount = max(
        0,
        int(
            int(one[0]) * chance.choice((0.5, 0.999, 1.001, 2, 3, 10, 1000))
            + chance.choice((-1, 0, 1))
        ),
    )
    return replaced(
        text,
        number,
        f"{match[1]} = {match[2][: one.start()]}{amount}{match[2][one.end() :]}",
    )


def one_more_key(text: str, chance: random.Random) -> str:
    """A key that some table knows, at the head of any table or as a new one."""
    rows, name = text.splitlines(), chance.choice(KEYS)
    heads = [i for i, row in enumerate(rows) if row.startswith("[")]
    row = f"{name} = {chance.choice(VALUES)}"
    if not heads or chance.random() < 0.1:
        return text + f"\n[{chance.choice(TABLES)}]\n{row}\n"
    rows.insert(chance.choice(heads) + 1, row)
    return "\n".join(rows) + "\n"


def lines(text: str, chance: random.Random) -> str:
    """Lines dropped, doubled, moved or exchanged."""
    rows = text.splitlines()
    if len(rows) < 2:
        return text
    a, b = chance.randrange(len(rows)), chance.randrange(len(rows))
    kind = chance.randrange(4)
    if kind == 0:
        del rows[a]
    elif kind == 1:
        rows.insert(b, rows[a])
    elif kind == 2:
        rows.insert(b, rows.pop(a))
    else:
        rows[a], rows[b] = rows[b], rows[a]
    return "\n".join(rows) + "\n"


def splice(text: str, chance: random.Random) -> str:
    """A piece of another recipe in the place of a piece of this one, cut at tables or anywhere."""
    other = chance.choice(RECIPES).read_text(encoding="utf-8")
    if chance.random() < 0.5:
        mine, theirs = text.split("\n["), other.split("\n[")
        mine[chance.randrange(len(mine))] = chance.choice(theirs)
        return "\n[".join(mine)
    start, length = chance.randrange(len(text) + 1), chance.randrange(200)
    return (
        text[:start]
        + other[chance.randrange(len(other)) :][:length]
        + text[start + length :]
    )


def flipped(content: bytes, chance: random.Random) -> bytes:
    """Bytes changed, inserted or cut off."""
    for _ in range(chance.choice((1, 1, 4, 32))):
        place, kind = chance.randrange(len(content) + 1), chance.randrange(4)
        if kind == 0:
            content = (
                content[:place] + bytes([chance.randrange(256)]) + content[place + 1 :]
            )
        elif kind == 1:
            content = (
                content[:place]
                + chance.choice(BYTES) * chance.choice((1, 1, 3, 3000))
                + content[place:]
            )
        elif kind == 2:
            content = content[:place] + content[place + chance.randrange(50) :]
        else:
            content = content[: max(place, len(content) // 2)]
    return content


def overrides(chance: random.Random) -> list[str]:
    """Now and then, a mutated ``--set``."""
    if chance.random() < 0.8:
        return []
    where = chance.choice(
        (
            "model.dim",
            "growth[0].factor",
            "growth[9].noise",
            "train",
            "base.train.eps",
            "seed",
            "a..b",
            "",
        )
    )
    value = chance.choice(VALUES)
    assignment = f"{where}={value}"
    return [
        "--set",
        assignment
        if chance.random() < 0.9
        else assignment[: chance.randrange(len(assignment) + 1)],
    ]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = util.spec_from_file_location(
        "run_recipe", REPOSITORY / "tools" / "run_recipe.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Watch:
    """What the process changes on disk, from Python's own audit events; a hook cannot be taken away again."""

    WRITES = (
        "os.mkdir",
        "os.rename",
        "os.remove",
        "os.rmdir",
        "os.link",
        "os.symlink",
        "os.truncate",
        "subprocess.Popen",
        "os.system",
    )

    def __init__(self) -> None:
        self.on, self.seen = False, list[str]()
        sys.addaudithook(self.event)

    def event(self, name: str, arguments: tuple) -> None:
        if not self.on:
            return
        opened = name == "open" and (
            set(str(arguments[1])) & set("wax+")
            or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        )
        if opened or name in self.WRITES:
            self.seen.append(f"{name} {arguments}"[:300])


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(
    tool: ModuleType,
    watch: Watch,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[int, str, str]:
    """Exit code, output and errors of the tool; every exception but the parser's exit passes."""
    monkeypatch.setattr(sys, "argv", ["run_recipe.py", *arguments])
    output, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(output), redirect_stderr(errors), at_most(LIMIT_SECONDS):
        watch.on = True
        try:
            code = tool.main()
        except SystemExit as error:
            code = int(error.code or 0)
        finally:
            watch.on = False
    return code, output.getvalue(), errors.getvalue()


@pytest.mark.parametrize("share", range(SHARES))
def test_a_mutated_recipe_is_planned_or_refused(
    tool: ModuleType,
    watch: Watch,
    share: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # which is a write
    # This process goes on with other tests, whose children would ignore a closed terminal as those of a run do.
    monkeypatch.setattr("stackgrow.process.signals.watch", lambda: None)
    file, codes, slowest = tmp_path / "mine.toml", Counter[str](), 0.0
    for case in range(share, CASES, SHARES):
        chance = random.Random(f"{SEED}-{case}")
        content = mutated(chance)
        file.write_bytes(content)
        # What plans is also started, up to the token store, which is not there.
        mode = chance.choice([["--plan"], ["--plan"], ["--plan", "--json"], []])
        started = time.perf_counter()
        try:
            code, output, errors = outcome(
                tool, watch, ["mine.toml", *mode, *overrides(chance)], monkeypatch
            )
            assert (code == 0 and output and not errors) or (
                code == 2 and errors and not output
            ), errors
            assert code == 0 or errors.startswith(("mine.toml: ", "usage: ")), errors
            assert not watch.seen
            assert list(tmp_path.iterdir()) == [file]
        except BaseException as error:
            error.add_note(f"case {case} of seed {SEED}:\n{content!r}") if hasattr(
                error, "add_note"
            ) else None
            raise
        slowest = max(slowest, time.perf_counter() - started)
        codes["planned" if code == 0 else "refused"] += 1
    print(f"share {share}: {dict(codes)}, slowest {slowest:.2f} s")
    assert codes["planned"]
    assert codes["refused"]
