"""The tiny model's fixture, and a worker that serves it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny_checkpoint import tiny_checkpoint
from tests.worker.running import Running, config_of

__all__ = ["tiny_checkpoint"]


@pytest.fixture(scope="module")
def running(tiny_checkpoint: Path) -> Iterator[Running]:
    """A worker that serves, shared by a file's tests."""
    started = Running(config_of(tiny_checkpoint))
    started.run(started.worker.start())
    yield started
    started.close()


@pytest.fixture
def fresh(tiny_checkpoint: Path) -> Iterator[Running]:
    """A worker that serves, for a test that ends it."""
    started = Running(config_of(tiny_checkpoint))
    started.run(started.worker.start())
    yield started
    if started.loop.is_running():
        started.close()
