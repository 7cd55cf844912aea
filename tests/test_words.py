"""Words and sizes of the code, by its syntax alone: one meaning a name, docstrings with content, one idea a line."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("runfolder", "clusters", "orchestrator", "trainer", "methods", "serving", "k8s")
# Names that several modules may define, and why.
SHARED_NAMES = {"main": "what a module does that is run as a process"}
# Types whose names differ by a plural alone, and why.
OF_SERVING = "one is of the engine, where words are those of a forward pass"
PLURALS = {
    "array": "many of the other one, by name",
    "base": "a model, and bases of a subspace",
    "batch": OF_SERVING,
    "column": OF_SERVING,
    "count": "an option that is at least 1, and what was counted in the data",
    "entry": "many of the other one",
    "group": OF_SERVING,
    "position": "many of the other one, by file",
    "record": "many of the other one, with their numbers",
    "row": OF_SERVING,
    "shape": OF_SERVING,
}

FEWEST_WORDS = 4  # of a docstring
MOST_NODES = 8.5  # of the syntax tree, for each line of code in a package
MOST_NODES_IN_BODY = 13  # the same, in the body of each function
MOST_COMPREHENSIONS = 26  # in a thousand lines of code of a package
LONGEST_FUNCTION = 40  # lines of code
LONGEST_FILE = 300  # lines

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


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
    for package in PACKAGES:
        for path in modules(package):
            for name in defined(parse(path).body):
                definitions[name].add(str(path.relative_to(ROOT)))
    several = {
        name: sorted(paths)
        for name, paths in sorted(definitions.items())
        if len(paths) > 1 and name not in SHARED_NAMES and not name.startswith("__")
    }
    lines = [f"{name}: {', '.join(paths)}" for name, paths in several.items()]
    assert not lines, "defined in several modules:\n" + "\n".join(lines)


def singular(name: str) -> str:
    """A name in lower case, without the ending of a plural."""
    name = name.lower()
    for ending, of_one in (("ies", "y"), ("ches", "ch"), ("s", "")):
        if name.endswith(ending) and not name.endswith(("ss", "us")):
            return name.removesuffix(ending) + of_one
    return name


def test_types_differ_by_more_than_a_plural() -> None:
    """Of `Shard` and `Shards` in two modules nobody knows which one is meant; other names differ by their use."""
    names: dict[str, dict[str, str]] = defaultdict(dict)
    for package in PACKAGES:
        for path in modules(package):
            for name in defined(parse(path).body):
                if name[0].isupper() and not name.isupper():
                    names[singular(name)][name] = str(path.relative_to(ROOT))
    doubles = {stem for stem, paths in names.items() if len(set(paths.values())) > 1}
    lines = [f"{name}: {path}" for stem in doubles - PLURALS.keys() for name, path in names[stem].items()]
    assert not lines, "\n".join(sorted(lines))
    assert PLURALS.keys() <= doubles, "no doubles any more"


def test_names_that_may_be_shared_are() -> None:
    for name in SHARED_NAMES:
        sharing = [path for package in PACKAGES for path in modules(package) if name in defined(parse(path).body)]
        assert len(sharing) > 1, name


@pytest.mark.parametrize("package", PACKAGES)
def test_docstrings_say_something(package: str) -> None:
    short = []
    for path in modules(package):
        for node in documented(path):
            docstring = ast.get_docstring(node)
            if docstring is not None and len(docstring.split()) < FEWEST_WORDS:
                short.append(f"{where(path, node)}: {docstring}")
    assert not short, "\n".join(short)


def is_kernel(node: ast.AST) -> bool:
    """Whether Triton compiles a function: places of tiles are arithmetic, which has no names to give."""
    decorators = getattr(node, "decorator_list", [])
    return any(ast.unparse(decorator) == "triton.jit" for decorator in decorators)


@pytest.mark.parametrize("package", PACKAGES)
def test_lines_hold_one_idea(package: str) -> None:
    lines = nodes = comprehensions = 0
    for path in modules(package):
        walked = list(ast.walk(parse(path)))
        kernels = [node for node in walked if is_kernel(node)]
        in_kernels = {id(part) for kernel in kernels for part in ast.walk(kernel)}
        of_kernels = {number for kernel in kernels for number in range(kernel.lineno, (kernel.end_lineno or 0) + 1)}
        lines += len(code_lines(path) - of_kernels)
        for node in walked:
            if id(node) in in_kernels:
                continue
            nodes += 1
            comprehensions += isinstance(node, COMPREHENSIONS)
    if lines:
        assert nodes / lines <= MOST_NODES, f"{nodes / lines:.2f} syntax nodes a line"
        assert 1000 * comprehensions / lines <= MOST_COMPREHENSIONS


def body_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.stmt]:
    """The statements of a function, without its docstring."""
    if ast.get_docstring(function) is None:
        return function.body
    return function.body[1:]


@pytest.mark.parametrize("package", PACKAGES)
def test_lines_of_each_function_can_be_read_aloud(package: str) -> None:
    """However short it is: two or three ideas get two or three lines, and a name for what is between them."""
    dense = []
    for path in modules(package):
        for node in documented(path):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_kernel(node):
                continue
            body = [part for statement in body_of(node) for part in ast.walk(statement)]
            begins = [part.lineno for part in body if isinstance(part, ast.stmt | ast.expr)]
            if begins:
                lines = code_lines(path).intersection(range(min(begins), (node.end_lineno or 0) + 1))
                if len(body) > MOST_NODES_IN_BODY * len(lines):
                    dense.append(f"{where(path, node)}: {len(body) / len(lines):.1f} syntax nodes a line")
    assert not dense, "\n".join(dense)


@pytest.mark.parametrize("package", PACKAGES)
def test_functions_and_files_are_short(package: str) -> None:
    long = []
    for path in modules(package):
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
    """The docstrings of all packages and the pages of docs/ but the glossary, in lower case."""
    texts = [page.read_text() for page in (ROOT / "docs").glob("*.md") if page.name != "glossary.md"]
    for package in PACKAGES:
        for path in modules(package):
            texts += [ast.get_docstring(node) or "" for node in documented(path)]
    return " ".join("\n".join(texts).lower().split())


def test_every_term_of_the_glossary_is_used() -> None:
    text = prose()
    terms = glossary()
    unused = [term for term in terms if not re.search(rf"\b{re.escape(term)}(s|es)?\b", text)]
    assert not unused, f"in docs/glossary.md alone: {', '.join(unused)}"
    assert len(terms) == len(set(terms)), "a term with two definitions"


# Words of the glossary that Kubernetes and models use in another meaning, with what makes their own meaning clear.
CLEAR = {
    "claim": r"claims the (next )?attempt|claim\.json",
    "head": r"\b(Ray|Ray's|attention) heads?|ray-head|ray\.io/node-type: head|\bhead pods?",
}


def pages() -> Iterator[Path]:
    """What is read without the glossary beside it: the pages, and all that is applied to Kubernetes."""
    yield ROOT / "README.md"
    yield from (page for page in (ROOT / "docs").glob("*.md") if page.name != "glossary.md")
    kinds = {".py", ".yaml", ""}
    yield from (path for path in (ROOT / "k8s").rglob("*") if path.is_file() and path.suffix in kinds)


# Words that the project invents for one thing, and the packages that have it.
OWN_WORDS = {
    "piece": {"methods", "trainer"},
    "site": {"runfolder", "clusters", "orchestrator"},
    "slot": {"runfolder", "clusters", "orchestrator", "trainer"},
}


@pytest.mark.parametrize("word", OWN_WORDS)
def test_words_of_one_part_mean_nothing_else_in_another(word: str) -> None:
    """In names and in prose; `opposite`, `wordpiece` or `spiece.model` are words of their own."""
    own = re.compile(rf"(?<![a-z]){word}s?(?![a-z])", re.IGNORECASE)
    used = []
    for package in PACKAGES:
        for path in modules(package):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if package not in OWN_WORDS[word] and own.search(line):
                    used.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not used, "\n".join(used)


@pytest.mark.parametrize("word", CLEAR)
def test_words_of_the_glossary_have_no_second_meaning(word: str) -> None:
    unclear = []
    for page in pages():
        text = page.read_text()
        rest = re.sub(CLEAR[word], lambda found: "." * len(found[0]), text)
        for found in re.finditer(rf"\b{word}s?\b", rest):
            line = text.count("\n", 0, found.start()) + 1
            unclear.append(f"{page.relative_to(ROOT)}:{line}")
    assert not unclear, "\n".join(unclear)
