"""The tool that keeps the specification and the tests together: what it reads, what it writes, what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tools import traceability as tool

ROW = "| WORKER-4121 | MUST | The proof is fresh. |"
MARKED = """
import pytest

@pytest.mark.requirement("WORKER-4121")
def test_it_is_fresh():
    pass
"""

Tree = Callable[..., Path]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Makes a project of some documents and test files, given by name."""

    def make(documents: dict[str, str], **tests: str) -> Path:
        for name, text in documents.items():
            path = tmp_path / "docs" / "spec" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"# A document\n\n| ID | level | text |\n|---|---|---|\n{text}\n", encoding="utf-8")
        for name, text in tests.items():
            path = tmp_path / "tests" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return tmp_path

    return make


def problems(root: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What ``--check`` says once the sections are written; none when it passes."""
    tool.main([], root)
    capsys.readouterr()
    code = tool.main(["--check"], root)
    lines = capsys.readouterr().err.splitlines()
    assert code == (1 if lines else 0)
    return lines


def section(root: Path, name: str = "00.md") -> list[str]:
    """The rows of a document's generated table."""
    tool.main([], root)
    text = (root / "docs" / "spec" / name).read_text(encoding="utf-8")
    return [line for line in text.partition(tool.BEGIN)[2].splitlines() if line.startswith("| WORKER-")]


def test_this_repository_s_own_documents_and_tests_agree(capsys: pytest.CaptureFixture[str]) -> None:
    code = tool.main(["--check"])
    assert code == 0, capsys.readouterr().err


# -- what is written ---------------------------------------------------------------------------------------------------


def test_each_requirement_is_listed_with_the_tests_that_show_it(tree: Tree) -> None:
    root = tree({"00.md": f"| WORKER-4200 | SHOULD | It is nice. |\n{ROW}"}, test_proof=MARKED)
    assert section(root) == [
        "| WORKER-4121 | MUST | 1 | `tests/test_proof.py` `::test_it_is_fresh` |",
        "| WORKER-4200 | SHOULD | 0 | – |",
    ]


def test_a_document_lists_its_own_requirements_only(tree: Tree) -> None:
    root = tree({"00.md": "| WORKER-4200 | MAY | Planned. |", "01.md": ROW}, test_proof=MARKED)
    assert [row.split()[1] for row in section(root, "00.md")] == ["WORKER-4200"]
    assert [row.split()[1] for row in section(root, "01.md")] == ["WORKER-4121"]


def test_many_tests_are_named_up_to_a_readable_number_and_counted(tree: Tree) -> None:
    body = "".join(f'@pytest.mark.requirement("WORKER-4121")\ndef test_{n}(): pass\n' for n in range(5))
    root = tree({"00.md": ROW}, **{f"test_{name}": f"import pytest\n{body}" for name in "abcdef"})
    (row,) = section(root)
    shown = "`tests/test_a.py` `::test_0`, `::test_1`, `::test_2` and 2 more<br>"
    assert row.startswith(f"| WORKER-4121 | MUST | 30 | {shown}")
    assert row.endswith("<br>and tests in 2 more files |")


def test_what_a_person_wrote_around_the_section_stays(tree: Tree) -> None:
    root = tree({"00.md": ROW}, test_proof=MARKED)
    path = root / "docs" / "spec" / "00.md"
    before = path.read_text(encoding="utf-8")
    tool.main([], root)
    written = path.read_text(encoding="utf-8")
    assert written.startswith(before.rstrip())
    path.write_text(written.replace("| 1 |", "| 7 |") + "\nAfterwards.\n", encoding="utf-8")
    tool.main([], root)
    assert path.read_text(encoding="utf-8") == written + "\nAfterwards.\n"


def test_a_section_that_is_missing_or_stale_fails_the_check_and_is_left_alone(
    tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tree({"00.md": ROW}, test_proof=MARKED)
    path = root / "docs" / "spec" / "00.md"
    said = "docs/spec/00.md: its section is not what the tests say: run tools/traceability.py\n"
    bare = path.read_text(encoding="utf-8")
    assert tool.main(["--check"], root) == 1
    assert (capsys.readouterr().err, path.read_text(encoding="utf-8")) == (said, bare)
    assert tool.main([], root) == 0
    assert tool.main(["--check"], root) == 0
    (root / "tests" / "test_proof.py").write_text(MARKED.replace("fresh", "young"), encoding="utf-8")
    assert tool.main(["--check"], root) == 1
    assert capsys.readouterr().err == said


# -- where marks may stand ---------------------------------------------------------------------------------------------

PLACES = {
    "a function": MARKED,
    "a coroutine": MARKED.replace("def test", "async def test"),
    "the module": 'import pytest\npytestmark = pytest.mark.requirement("WORKER-4121")\ndef test_it_is_fresh(): pass\n',
    "a list of the module": (
        "import pytest\npytestmark: list = [pytest.mark.slow]\n"
        'pytestmark += [pytest.mark.requirement("WORKER-4121")]\ndef test_it_is_fresh(): pass\n'
    ),
    "a parameter": (
        'import pytest\n@pytest.mark.parametrize("x", [1, pytest.param(2, '
        'marks=[pytest.mark.requirement("WORKER-4121")])])\ndef test_it_is_fresh(x): pass\n'
    ),
    "a parameter of a list with a name": (
        'import pytest\nCASES = [1]\nCASES += [pytest.param(2, marks=pytest.mark.requirement("WORKER-4121"))]\n'
        '@pytest.mark.parametrize("x", CASES)\ndef test_it_is_fresh(x): pass\n'
    ),
    "a name": (
        'from pytest import mark\nfresh = mark.requirement("WORKER-4121")\n@fresh\ndef test_it_is_fresh(): pass\n'
    ),
    "a condition": (
        "import pytest, sys\nif sys.platform:\n"
        '    @pytest.mark.requirement("WORKER-4121")\n    def test_it_is_fresh(): pass\n'
    ),
}


@pytest.mark.parametrize("text", PLACES.values(), ids=PLACES)
def test_a_mark_counts_wherever_pytest_takes_it_from(tree: Tree, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = tree({"00.md": ROW}, test_proof=text)
    assert problems(root, capsys) == []
    assert section(root) == ["| WORKER-4121 | MUST | 1 | `tests/test_proof.py` `::test_it_is_fresh` |"]


def test_a_mark_of_a_class_is_that_of_its_tests(tree: Tree) -> None:
    text = (
        'import pytest\n@pytest.mark.requirement("WORKER-4121")\nclass TestProof:\n'
        '    pytestmark = pytest.mark.requirement("WORKER-4122")\n'
        "    def test_a(self): pass\n    def helper(self): pass\n    class TestMore:\n        def test_b(self): pass\n"
    )
    root = tree({"00.md": f"{ROW}\n{ROW.replace('4121', '4122')}"}, test_proof=text)
    named = "`tests/test_proof.py` `::TestProof::TestMore::test_b`, `::TestProof::test_a`"
    assert section(root) == [f"| WORKER-{n} | MUST | 2 | {named} |" for n in (4121, 4122)]


@pytest.mark.parametrize(
    "text",
    [
        MARKED.replace("def test_", "def helper_"),
        MARKED.replace("def test_it_is_fresh():", "class Helper:\n    def test_it_is_fresh(self):").replace(
            "    pass", "        pass"
        ),
        'import pytest\nunused = pytest.mark.requirement("WORKER-4121")\n',
        'import pytest\ndef test_it(request):\n    request.node.add_marker(pytest.mark.requirement("WORKER-4121"))\n',
        "import pytest\n@pytest.mark.requirement\ndef test_it(): pass\n",
    ],
    ids=["a helper", "a class without tests", "a name that nobody uses", "inside of a test", "a mark without an ID"],
)
def test_a_mark_on_no_test_shows_nothing(tree: Tree, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = tree({"00.md": ROW.replace("MUST", "MAY")}, test_proof=text)
    (problem,) = problems(root, capsys)
    line = 1 + text[: text.index("pytest.mark")].count("\n")
    assert problem == (
        f"tests/test_proof.py:{line}: this mark is on no test, so it shows nothing: put it on one, or remove it"
    )


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_must_without_a_test_fails_and_a_should_or_may_does_not(
    tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tree({"00.md": f"{ROW}\n| WORKER-4200 | SHOULD | Nice. |\n| WORKER-4201 | MAY | Planned. |"})
    (problem,) = problems(root, capsys)
    assert problem.startswith("docs/spec/00.md:5: WORKER-4121 is a MUST without a test: mark one")
    assert '@pytest.mark.requirement("WORKER-4121")' in problem


def test_a_mark_with_an_unknown_id_fails_at_its_line(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    root = tree({"00.md": ROW}, test_proof=MARKED + MARKED.replace("4121", "9999"))
    (problem,) = problems(root, capsys)
    assert problem.startswith("tests/test_proof.py:10: 'WORKER-9999' is in no document of docs/spec")


@pytest.mark.parametrize("other", ["00.md", "01.md"], ids=["one document", "two documents"])
def test_an_id_that_occurs_twice_fails_with_both_places(
    tree: Tree, other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = ROW if other == "01.md" else f"{ROW}\n{ROW}"
    root = tree({"00.md": text, other: text}, test_proof=MARKED)
    (problem,) = problems(root, capsys)
    second = "docs/spec/01.md:5" if other == "01.md" else "docs/spec/00.md:6"
    assert problem == f"{second}: WORKER-4121 is at docs/spec/00.md:5 already: give one of them another ID"


@pytest.mark.parametrize(
    "row",
    [
        "| WORKER-4121 | must | The proof is fresh. |",
        "| WORKER-4121 | WILL | The proof is fresh. |",
        "| WORKER-412 | MUST | The proof is fresh. |",
        "| WORKER-4121 | MUST | |",
        "| WORKER-4121 | MUST | The proof is fresh.",
        "| WORKER-4121 | MUST | The proof | is fresh. |",
        "|WORKER-4121|MUST|The proof is fresh.|",
    ],
)
def test_a_row_of_another_form_is_refused_and_not_passed_over(
    tree: Tree, row: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert problems(tree({"00.md": row}), capsys) == [
        "docs/spec/00.md:5: write the row as | WORKER-0000 | MUST, SHOULD or MAY | text |"
    ]


def test_a_row_behind_the_section_is_named_by_its_own_line(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    root = tree({"00.md": ROW}, test_proof=MARKED)
    tool.main([], root)
    path = root / "docs" / "spec" / "00.md"
    text = path.read_text(encoding="utf-8") + ROW.replace("MUST", "must")
    path.write_text(text, encoding="utf-8")
    assert problems(root, capsys)[0].startswith(f"docs/spec/00.md:{len(text.splitlines())}: write the row as")


def test_a_bar_in_the_text_is_written_as_markdown_wants_it(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    assert problems(tree({"00.md": r"| WORKER-4121 | MAY | `success\|error` |"}), capsys) == []


@pytest.mark.parametrize("given", ["", '"WORKER-4121", "WORKER-4122"', "NAME", 'f"WORKER-{1}"', "4121", "id='x'"])
def test_a_mark_takes_one_literal_id(tree: Tree, given: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"import pytest\n@pytest.mark.requirement({given})\ndef test_a(): pass\n"
    assert problems(tree({"00.md": ROW.replace("MUST", "MAY")}, test_proof=text), capsys) == [
        "tests/test_proof.py:2: the mark takes one ID, as a literal: one mark for each ID"
    ]


def test_a_test_file_that_is_no_python_is_named(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    (problem,) = problems(tree({"00.md": ROW.replace("MUST", "MAY")}, test_proof="def test_(:\n"), capsys)
    assert problem.startswith("tests/test_proof.py:1: this is no Python")


def test_half_a_section_is_refused(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    (problem,) = problems(tree({"00.md": f"{tool.END}\n{ROW}"}, test_proof=MARKED), capsys)
    assert problem == "docs/spec/00.md: a comment that begins or ends the section has no partner: remove it"


def test_a_project_without_documents_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (problem,) = problems(tmp_path, capsys)
    assert problem.startswith("docs/spec: there is no document")
