"""What the code of stackgrow/ looks like, measured: ``python tests/house.py`` prints the figures that test_house.py
keeps. Tokens are Python's own, without comments and line ends, over all lines of a file."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stackgrow import seal
from stackgrow.run_folder import folder

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "stackgrow"
TESTS = REPOSITORY / "tests"
# From the top floor down: a room imports only rooms that stand after it.
ROOMS = [
    "cli",
    "audit",
    "run",
    "report",
    "evaluate",
    "titan",
    "checkpoint",
    "run_folder",
    "plan",
    "data",
    "process",
    "growth",
    "recipe",
    "seal",
    "text",
    "errors",
]
# Of rooms that may know less than what stands below them.
ONLY = {
    "growth": {"recipe", "text", "errors"},
    "recipe": {"text", "errors"},
    "seal": {"errors"},
    "process": {"seal", "text", "errors"},
}
# Names of a run's files that are no other thing's; a literal that is one of them spells it a second time.
RUN_FILES = {
    folder.PROVENANCE,
    folder.REQUIREMENTS,
    folder.LEDGER,
    folder.LOCK,
    folder.REPORT,
    folder.RECIPE,
    folder.STAGE_FILE,
    folder.FOUND,
    folder.GROWTH,
    folder.METRICS,
    folder.VALIDATION,
    folder.DONE,
    seal.MANIFEST,
}
# Words that mean other things too: they spell a run's folder where a path is put together with them.
RUN_FOLDERS = {
    folder.EVAL,
    folder.LOGS,
    folder.TENSORBOARD,
    folder.CHECKPOINT,
    folder.QUARANTINE,
}
MAY_SPELL = {
    "stackgrow/run_folder/folder.py": "the one place",
    "stackgrow/seal/files.py": "seals and quarantine, which are not of runs alone",
    "tests/e2e/test_audit.py": "what an audit prints, as a user reads it",
    "tests/seal/test_files.py": "folders of its own: a seal knows no runs",
}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
NO_TOKENS = {
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.COMMENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


@dataclass(frozen=True)
class Import:
    """``importer``, a module of the package, imports ``imported``, another one: "plan.stages", "errors"."""

    importer: str
    imported: str
    line: int

    @property
    def rooms(self) -> tuple[str, str]:
        return self.importer.split(".")[0], self.imported.split(".")[0]

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, which for a room's own page is the room's."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        found[".".join(parts)] = path
    return found


def imports(at_start_only: bool = False) -> Iterator[Import]:
    """All imports of the package from itself; ``at_start_only``: those that run when a module is imported."""
    known = modules()
    for importer, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = tree.body if at_start_only else list(ast.walk(tree))
        for node in nodes:
            if not isinstance(node, ast.ImportFrom) or not (
                node.module or ""
            ).startswith("stackgrow"):
                continue
            module = (node.module or "").removeprefix("stackgrow").removeprefix(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".removeprefix(".")
                yield Import(importer, inner if inner in known else module, node.lineno)


def upward(found: Import) -> bool:
    """Whether an import leads out of its room to one that stands higher, or that it may not know."""
    importer, imported = found.rooms
    if importer in ("", imported):
        return False
    if importer in ONLY:
        return imported not in ONLY[importer]
    return ROOMS.index(imported) < ROOMS.index(importer)


def circles() -> list[str]:
    """Modules that cannot be imported without themselves, by what runs at import."""
    needs: dict[str, set[str]] = {}
    for found in imports(at_start_only=True):
        needs.setdefault(found.importer, set()).add(found.imported)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(needs.get(start, ()))
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                waiting.extend(needs.get(module, ()))
        return seen

    return [module for module in needs if module in reached(module)]


def spelled(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines that spell the name of a run's file or folder, and the name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            name = _literal(node.right)
            if name.split("/")[0] in RUN_FOLDERS:
                yield node.lineno, name
        elif isinstance(node, ast.Constant) and node.value in RUN_FILES:
            yield node.lineno, str(node.value)


def _literal(node: ast.expr) -> str:
    """The text of a literal, of an f-string what stands between its values; "" for anything else."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    text = ""
    for part in parts:
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            text += part.value
    return text


def without_assertion() -> list[str]:
    """Tests that assert nothing, neither themselves nor in a function of tests/ that they call."""
    functions: list[tuple[Path, ast.FunctionDef]] = []
    for path in sorted(TESTS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                functions.append((path, node))

    # By name, whoever calls a function that asserts does so too; until no more are found.
    asserting = {"raises", "fail", "check_schema"}
    before = 0
    while len(asserting) > before:
        before = len(asserting)
        for _, function in functions:
            if _asserts(function, asserting):
                asserting.add(function.name)
    found = []
    for path, function in functions:
        if function.name.startswith("test_") and function.name not in asserting:
            found.append(f"{path.relative_to(REPOSITORY)}:{function.name}")
    return found


def _asserts(function: ast.FunctionDef, asserting: set[str]) -> bool:
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        # Called here, or handed to what calls it in other processes.
        name = getattr(node, "id", getattr(node, "attr", ""))
        if name in asserting or name.startswith("assert_"):
            return True
    return False


@dataclass
class Figures:
    lines: int = 0
    tokens: int = 0
    comments: int = 0
    nested_comprehensions: int = 0
    walruses: int = 0

    def per_100_lines(self, count: int) -> float:
        return 100 * count / self.lines

    @property
    def tokens_per_line(self) -> float:
        return self.tokens / self.lines


def figures() -> Figures:
    total = Figures()
    for path in modules().values():
        text = path.read_text(encoding="utf-8")
        total.lines += text.count("\n")
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                total.comments += 1
            elif token.type not in NO_TOKENS:
                total.tokens += 1
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.NamedExpr):
                total.walruses += 1
            if isinstance(node, COMPREHENSIONS):
                inner = [
                    n
                    for n in ast.walk(node)
                    if isinstance(n, COMPREHENSIONS) and n is not node
                ]
                total.nested_comprehensions += bool(inner)
    return total


def main() -> None:
    total = figures()
    print(f"lines                                {total.lines}")
    print(f"tokens per line                      {total.tokens_per_line:.2f}")
    print(
        f"nested comprehensions per 100 lines  {total.per_100_lines(total.nested_comprehensions):.2f}"
    )
    print(
        f"walruses per 100 lines               {total.per_100_lines(total.walruses):.2f}"
    )
    print(
        f"comments per 100 lines               {total.per_100_lines(total.comments):.2f}"
    )
    print(f"import circles                       {len(circles())}")
    print(
        f"upward imports                       {len([found for found in imports() if upward(found)])}"
    )


if __name__ == "__main__":
    main()
