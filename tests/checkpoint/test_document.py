"""docs/checkpoint.md names every limit there is, with its number, and every way a directory is refused."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import orcd_jax.checkpoint
from orcd_jax.checkpoint.manifest import Manifest
from orcd_jax.checkpoint.verify import read_verified, verify_files
from orcd_jax.errors import OrcdError
from tests.checkpoint.damages import flip_bit, make_link, replaced

DOCUMENT = (Path(__file__).parents[2] / "docs" / "checkpoint.md").read_text(encoding="utf-8")
BOUNDS = ("maxLength", "maxItems", "maximum", "exclusiveMaximum")


def stated() -> dict[str, int]:
    """The number that the document gives each limit, by what sets it."""
    rows = re.findall(r"^\| [^|]+ \| ([\d ]+) \| `([\w.]+)` \|$", DOCUMENT, re.MULTILINE)
    assert len(rows) == len({name for _, name in rows}), "a limit stands there twice"
    return {name: int(number.replace(" ", "")) for number, name in rows}


def constants() -> Iterator[tuple[str, int]]:
    """Every limit that a module of the package sets."""
    package = orcd_jax.checkpoint
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        content = vars(importlib.import_module(module.name))
        source = Path(content["__file__"]).read_text(encoding="utf-8")
        for name in re.findall(r"^(MAX_\w+|ALIGNMENTS) = ", source, re.MULTILINE):
            value = content[name]
            yield f"{module.name.rpartition('.')[2]}.{name}", max(value) if isinstance(value, tuple) else value


def bounds_of_fields() -> Iterator[tuple[str, int]]:
    """Every bound of a field of the manifest, where no constant has a name for it."""
    described = Manifest.model_json_schema()["$defs"]
    sizes = [schema for schema in described["LlamaConfig"]["properties"].values() if schema.get("type") == "integer"]
    (most,) = {schema["maximum"] for schema in sizes}
    yield "LlamaConfig.maximum", most
    for record in ("TensorEntry", "FileEntry", "SourceFile", "TokenizerEntry"):
        for field, content in described[record]["properties"].items():
            for path, schema in ((field, content), (f"{field}.items", content.get("items", {}))):
                yield from ((f"{record}.{path}.{bound}", schema[bound]) for bound in BOUNDS if bound in schema)


@pytest.mark.requirement("WORKER-4310")
def test_every_limit_is_stated_with_its_number() -> None:
    assert stated() == dict(constants()) | dict(bounds_of_fields())


# -- what is refused ---------------------------------------------------------------------------------------------------

TOKENIZER = "tokenizer.json"
REFUSED: dict[str, Callable[[Path], object]] = {
    "is missing": lambda model: (model / TOKENIZER).unlink(),
    "is not listed in manifest.json": lambda model: (model / "more").mkdir(),
    "is a link or a special file": lambda model: make_link(model / TOKENIZER),
    "has 2 names (hard links), and may have one": lambda model: os.link(model / TOKENIZER, model.parent / "outside"),
    "has 3 bytes instead of 17": lambda model: (model / TOKENIZER).write_bytes(b"new"),
    "has another SHA-256": lambda model: flip_bit(model / TOKENIZER, 9),
}


@pytest.mark.parametrize("told", REFUSED)
def test_what_the_document_says_of_a_file_is_what_the_error_says(copy: Path, manifest: Manifest, told: str) -> None:
    assert f" | {told} |" in DOCUMENT
    REFUSED[told](copy)
    with pytest.raises(OrcdError, match=re.escape(told)):
        verify_files(copy, manifest, lambda _: None)


def test_what_it_says_of_a_file_that_claims_too_much(copy: Path, manifest: Manifest) -> None:
    assert " | makes them … bytes |" in DOCUMENT
    files = (manifest.files[0].model_copy(update={"size_bytes": 2**52}), *manifest.files[1:])
    with pytest.raises(OrcdError, match=r"makes them \d+ bytes"):
        verify_files(copy, manifest.model_copy(update={"files": files}), lambda _: None)


@pytest.mark.parametrize(
    ("told", "change"),
    [
        ("cannot be read", replaced(os.mkfifo)),
        ("was changed while the model was loaded", lambda path: shutil.copyfile("/dev/null", path)),
    ],
)
def test_what_it_says_of_a_file_that_was_exchanged(
    copy: Path, manifest: Manifest, told: str, change: Callable[[Path], object]
) -> None:
    assert f" | {told} |" in DOCUMENT
    change(copy / TOKENIZER)
    with pytest.raises(OrcdError, match=told):
        read_verified(copy, manifest, TOKENIZER, 100)
