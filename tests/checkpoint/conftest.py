"""One tiny checkpoint for all tests that only read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.tiny import MemorySource, convert


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 checkpoint of a one-layer model. Copy it (``tiny.copied``) before changing it."""
    directory = tmp_path_factory.mktemp("shared") / "tiny"
    convert(MemorySource(), directory)
    return directory
