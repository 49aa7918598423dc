"""One tiny checkpoint for all tests that only read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from orcd_jax.checkpoint.manifest import Manifest, read_manifest
from tests.checkpoint.tiny import MemorySource, convert, copied


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 checkpoint of a one-layer model. Copy it (``tiny.copied``) before changing it."""
    directory = tmp_path_factory.mktemp("shared") / "tiny"
    convert(MemorySource(), directory)
    return directory


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of it, to damage."""
    return copied(checkpoint, tmp_path)


@pytest.fixture(scope="session")
def manifest(checkpoint: Path) -> Manifest:
    """Its manifest."""
    return read_manifest(checkpoint)
