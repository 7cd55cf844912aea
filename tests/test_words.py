"""Words and sizes of the code, by its syntax alone: one meaning a name, docstrings with content, one idea a line."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("runfolder", "clusters", "orchestrator", "trainer", "methods", "serving", "k8s")
# Names that several modules may define, and why.
SHARED_NAMES = {"main": "what a module does that is run as a process"}

FEWEST_WORDS = 4  # of a docstring
MOST_NODES = 8.5  # of the syntax tree, for each line of code in a room
MOST_COMPREHENSIONS = 26  # in a thousand lines of code of a room
LONGEST_FUNCTION = 40  # lines of code
LONGEST_FILE = 300  # lines

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def documented(path: Path) -> Iterator[Documented]:
    """The module of a file, and the classes and functions in it."""
    for node in ast.walk(parse(path)):
        if isinstance(node, Documented):
            yield node


def where(path: Path, node: ast.AST) -> str:
    name = getattr(node, "name", "the module")
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)} {name}"


@cache
def code_lines(path: Path) -> frozenset[int]:
    """The numbers of the lines of a file that hold code: no blank ones, comments or docstrings."""
    in_docstrings: set[int] = set()
    for node in documented(path):
        if ast.get_docstring(node) is not None:
            docstring = node.body[0]
            in_docstrings.update(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
    lines = enumerate(path.read_text().splitlines(), 1)
    code = {number for number, line in lines if line.strip() and not line.strip().startswith("#")}
    return frozenset(code - in_docstrings)


def defined(body: list[ast.stmt]) -> Iterator[str]:
    """The names that statements at the level of a module define; those that they import are defined elsewhere."""
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
            case ast.Assign():
                stored = (name for target in node.targets for name in ast.walk(target))
                yield from (name.id for name in stored if isinstance(name, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.If():
                yield from defined(node.body)
                yield from defined(node.orelse)
            case ast.Try():
                yield from defined(node.body)


def test_each_name_has_one_meaning() -> None:
    definitions: dict[str, set[str]] = defaultdict(set)
    for room in ROOMS:
        for path in modules(room):
            for name in defined(parse(path).body):
                definitions[name].add(str(path.relative_to(ROOT)))
    several = {
        name: sorted(paths)
        for name, paths in sorted(definitions.items())
        if len(paths) > 1 and name not in SHARED_NAMES and not name.startswith("__")
    }
    lines = [f"{name}: {', '.join(paths)}" for name, paths in several.items()]
    assert not lines, "defined in several modules:\n" + "\n".join(lines)


def test_names_that_may_be_shared_are() -> None:
    for name in SHARED_NAMES:
        sharing = [path for room in ROOMS for path in modules(room) if name in defined(parse(path).body)]
        assert len(sharing) > 1, name


@pytest.mark.parametrize("room", ROOMS)
def test_docstrings_say_something(room: str) -> None:
    short = []
    for path in modules(room):
        for node in documented(path):
            docstring = ast.get_docstring(node)
            if docstring is not None and len(docstring.split()) < FEWEST_WORDS:
                short.append(f"{where(path, node)}: {docstring}")
    assert not short, "\n".join(short)


@pytest.mark.parametrize("room", ROOMS)
def test_lines_hold_one_idea(room: str) -> None:
    lines = nodes = comprehensions = 0
    for path in modules(room):
        lines += len(code_lines(path))
        for node in ast.walk(parse(path)):
            nodes += 1
            comprehensions += isinstance(node, COMPREHENSIONS)
    if lines:
        assert nodes / lines <= MOST_NODES, f"{nodes / lines:.2f} syntax nodes a line"
        assert 1000 * comprehensions / lines <= MOST_COMPREHENSIONS


@pytest.mark.parametrize("room", ROOMS)
def test_functions_and_files_are_short(room: str) -> None:
    long = []
    for path in modules(room):
        file_lines = len(path.read_text().splitlines())
        if file_lines > LONGEST_FILE:
            long.append(f"{path.relative_to(ROOT)}: {file_lines} lines")
        for node in documented(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                span = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                code = code_lines(path).intersection(span)
                if len(code) > LONGEST_FUNCTION:
                    long.append(f"{where(path, node)}: {len(code)} lines of code")
    assert not long, "\n".join(long)


def glossary() -> list[str]:
    """The terms of docs/glossary.md, each on a line of its own with its definition below."""
    text = (ROOT / "docs" / "glossary.md").read_text()
    terms = re.findall(r"^\*\*(.+)\*\*\n: +\S", text, re.MULTILINE)
    assert len(terms) == text.count("\n**"), "a term without a definition"
    return terms


def prose() -> str:
    """The docstrings of all rooms and the pages of docs/ but the glossary, in lower case."""
    texts = [page.read_text() for page in (ROOT / "docs").glob("*.md") if page.name != "glossary.md"]
    for room in ROOMS:
        for path in modules(room):
            texts += [ast.get_docstring(node) or "" for node in documented(path)]
    return " ".join("\n".join(texts).lower().split())


def test_every_term_of_the_glossary_is_used() -> None:
    text = prose()
    terms = glossary()
    unused = [term for term in terms if not re.search(rf"\b{re.escape(term)}(s|es)?\b", text)]
    assert not unused, f"in docs/glossary.md alone: {', '.join(unused)}"
    assert len(terms) == len(set(terms)), "a term with two definitions"
