#!/usr/bin/env python3
"""Which tests show which requirement: reads docs/spec and the tests' marks, and writes a section into each document.

    tools/traceability.py            write the section at the end of each document, and list what is wrong
    tools/traceability.py --check    write nothing; fail also when a section is not what the tests say

A requirement is a row of a table, ``| WORKER-4121 | MUST | text |``; a test shows it when it carries
``@pytest.mark.requirement("WORKER-4121")``. The tests are read, not run; nothing but Python is needed.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SPEC = Path("docs/spec")
TESTS = Path("tests")

BEGIN = "<!-- traceability: written by tools/traceability.py from the tests' marks; do not edit -->"
END = "<!-- traceability: end -->"
MAX_FILES = 4
"""Files that are named for one requirement; of the others there is a number."""
MAX_TESTS = 3
"""Tests that are named of one file."""

_ID = r"WORKER-[0-9]{4}"
_CLAIM = re.compile(r"\|\s*WORKER-")
_ROW = re.compile(rf"\| ({_ID}) \| (MUST|SHOULD|MAY) \| (?:[^|\\]|\\.)*[^|\\\s] \|")
_SECTION = re.compile(rf"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Requirement:
    """A row of a document.

    Attributes:
      place: ``docs/spec/00_worker.md:120``.
    """

    id: str
    level: str
    place: str


@dataclass(frozen=True, slots=True)
class Document:
    """A document of the specification, as it is and without its generated section.

    Attributes:
      name: path below the root.
    """

    path: Path
    name: str
    text: str
    requirements: tuple[Requirement, ...]


@dataclass(frozen=True, slots=True)
class Mark:
    """One requirement that one test says it shows.

    Attributes:
      test: name within the file, such as ``TestSeal::test_it_holds``.
      place: of the mark, ``tests/test_x.py:12``.
    """

    id: str
    file: str
    test: str
    place: str


# -- the documents -----------------------------------------------------------------------------------------------------


def read_documents(root: Path, problems: list[str]) -> list[Document]:
    """Every document of the specification, in order of name."""
    documents = [_document(root, path, problems) for path in sorted((root / SPEC).glob("*.md"))]
    if not documents:
        problems.append(f"{SPEC}: there is no document: write one with rows | WORKER-0000 | MUST | text |")
    return documents


def _document(root: Path, path: Path, problems: list[str]) -> Document:
    name, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
    own = _SECTION.sub(lambda found: "\n" * found.group().count("\n"), text)  # the lines keep their numbers
    if BEGIN in own or END in own:
        problems.append(f"{name}: a comment that begins or ends the section has no partner: remove it")
    requirements = []
    for number, line in enumerate(own.splitlines(), 1):
        if _CLAIM.match(line):
            row = _ROW.fullmatch(line)
            if row is None:
                problems.append(f"{name}:{number}: write the row as | WORKER-0000 | MUST, SHOULD or MAY | text |")
            else:
                requirements.append(Requirement(row[1], row[2], f"{name}:{number}"))
    return Document(path, name, text, tuple(requirements))


def with_section(document: Document, marks: Sequence[Mark]) -> str:
    """The document's text with the section that it should have: in the place of the old one, else at the end."""
    section = "\n".join((BEGIN, *_section_lines(document, marks), END))
    if _SECTION.search(document.text):
        return _SECTION.sub(lambda _: section, document.text)
    return f"{document.text.rstrip()}\n\n{section}\n"


def _section_lines(document: Document, marks: Sequence[Mark]) -> Iterator[str]:
    yield from ("## Traceability", "", "| ID | level | tests | shown by |", "|---|---|---|---|")
    for requirement in sorted(document.requirements, key=lambda one: one.id):
        by_file: dict[str, list[str]] = {}
        for file, test in sorted({(mark.file, mark.test) for mark in marks if mark.id == requirement.id}):
            by_file.setdefault(file, []).append(test)
        count = sum(map(len, by_file.values()))
        yield f"| {requirement.id} | {requirement.level} | {count} | {_shown(by_file) or '–'} |"


def _shown(by_file: Mapping[str, Sequence[str]]) -> str:
    """``tests/a.py`` with its tests, a line for each file."""
    lines = []
    for file, tests in list(by_file.items())[:MAX_FILES]:
        named = ", ".join(f"`::{test}`" for test in tests[:MAX_TESTS])
        lines.append(f"`{file}` {named}" + (f" and {len(tests) - MAX_TESTS} more" if len(tests) > MAX_TESTS else ""))
    if len(by_file) > MAX_FILES:
        lines.append(f"and tests in {len(by_file) - MAX_FILES} more files")
    return "<br>".join(lines)


# -- the tests ---------------------------------------------------------------------------------------------------------


def read_marks(root: Path, problems: list[str]) -> list[Mark]:
    """Every requirement mark of every test."""
    marks: list[Mark] = []
    for path in sorted((root / TESTS).rglob("test_*.py")):
        name = path.relative_to(root).as_posix()
        try:
            module = ast.parse(path.read_text(encoding="utf-8"))
        except SyntaxError as error:
            problems.append(f"{name}:{error.lineno}: this is no Python ({error.msg}): mend it")
        else:
            marks += _TestFile(name, module, problems).marks()
    return marks


class _TestFile:
    """The marks of one file. Follows names that the file gives to marks or to lists of parameters."""

    def __init__(self, name: str, module: ast.Module, problems: list[str]) -> None:
        self._name, self._module, self._problems = name, module, problems
        self._values: dict[str, list[ast.expr]] = {}
        for target, value in _assignments(module.body):
            if target != "pytestmark":
                self._values.setdefault(target, []).append(value)
        self._seen: set[ast.expr] = set()

    def marks(self) -> list[Mark]:
        """All of them; what is wrong with others joins the problems."""
        found = list(self._tests(self._module.body, "", ()))
        for node in ast.walk(self._module):
            if _is_mark(node) and node not in self._seen:
                self._wrong(node, "this mark is on no test, so it shows nothing: put it on one, or remove it")
        return found

    def _tests(self, body: Sequence[ast.stmt], within: str, inherited: Sequence[ast.expr]) -> Iterator[Mark]:
        """The marks of the tests among some statements, with those that they inherit."""
        inherited = [*inherited, *(value for target, value in _assignments(body) if target == "pytestmark")]
        for node in _flat(body):
            if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
                yield from self._tests(node.body, f"{within}{node.name}::", [*inherited, *node.decorator_list])
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test"):
                for mark in self._marks_of([*inherited, *node.decorator_list]):
                    yield Mark(mark[0], self._name, f"{within}{node.name}", f"{self._name}:{mark[1]}")

    def _marks_of(self, expressions: Sequence[ast.expr]) -> Iterator[tuple[str, int]]:
        """ID and line of each mark in some expressions, and in what the names in them stand for."""
        names: set[str] = set()
        waiting: list[ast.AST] = list(expressions)
        while waiting:
            node = waiting.pop(0)
            waiting += ast.iter_child_nodes(node)
            if isinstance(node, ast.Name) and node.id in self._values and node.id not in names:
                names.add(node.id)
                waiting += self._values[node.id]
            elif isinstance(node, ast.Call) and _is_mark(node.func):
                first = node.func not in self._seen
                self._seen.add(node.func)
                match node.args, node.keywords:
                    case [ast.Constant(value=str(text))], []:
                        yield text, node.lineno
                    case _ if first:
                        self._wrong(node, "the mark takes one ID, as a literal: one mark for each ID")

    def _wrong(self, node: ast.AST, problem: str) -> None:
        self._problems.append(f"{self._name}:{getattr(node, 'lineno', 0)}: {problem}")


def _is_mark(node: ast.AST) -> bool:
    """``pytest.mark.requirement``, or ``mark.requirement``."""
    match node:
        case ast.Attribute(attr="requirement", value=ast.Attribute(attr="mark") | ast.Name(id="mark")):
            return True
    return False


def _assignments(body: Sequence[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    for node in _flat(body):
        match node:
            case ast.Assign(targets=targets, value=value):
                yield from ((target.id, value) for target in targets if isinstance(target, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                yield name, value
            case ast.AugAssign(target=ast.Name(id=name), value=value):
                yield name, value


def _flat(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements, with those inside of conditions: what a module or a class defines."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            yield from _flat([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)])
            yield from _flat([step for one in getattr(node, "handlers", ()) for step in one.body])


# -- both --------------------------------------------------------------------------------------------------------------


def judge(documents: Sequence[Document], marks: Sequence[Mark]) -> Iterator[str]:
    """What is wrong between requirements and tests, and what to do about it."""
    known: dict[str, Requirement] = {}
    for requirement in (one for document in documents for one in document.requirements):
        if (first := known.setdefault(requirement.id, requirement)) is not requirement:
            yield f"{requirement.place}: {requirement.id} is at {first.place} already: give one of them another ID"
    for place, name in dict.fromkeys((mark.place, mark.id) for mark in marks if mark.id not in known):
        yield f"{place}: {name!a} is in no document of {SPEC}: correct the mark, or write the requirement"
    shown = {mark.id for mark in marks}
    for requirement in known.values():
        if requirement.level == "MUST" and requirement.id not in shown:
            yield (
                f"{requirement.place}: {requirement.id} is a MUST without a test: mark one that shows it with "
                f'@pytest.mark.requirement("{requirement.id}"), or write SHOULD or MAY'
            )


def main(arguments: Sequence[str], root: Path = ROOT) -> int:
    """Writes or checks the sections; the exit code, 1 when anything is wrong."""
    parser = argparse.ArgumentParser(prog="traceability.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a section would change")
    check = parser.parse_args(arguments).check
    problems: list[str] = []
    documents, marks = read_documents(root, problems), read_marks(root, problems)
    problems += judge(documents, marks)
    for document in documents:
        wanted = with_section(document, marks)
        if wanted == document.text:
            continue
        if check:
            problems.append(f"{document.name}: its section is not what the tests say: run tools/traceability.py")
        else:
            document.path.write_text(wanted, encoding="utf-8")
            print(f"{document.name}: written")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
