"""A valid GGUF file for all tests that take one apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.convert.gguf_mutants import Parts, taken_apart
from tests.checkpoint.convert.tiny_gguf import write_model


@pytest.fixture(scope="session")
def valid_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="session")
def valid(valid_file: Path) -> Parts:
    """Copy it (``gguf_mutants.again``) before changing it."""
    return taken_apart(valid_file.read_bytes())
