"""A server over a fake worker, and the official client connected to it."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator

import pytest
import structlog

from orcd_jax.telemetry import log
from tests.server.fake_worker import Served, serving
from tests.server.peer import Peer


@pytest.fixture
def served() -> Iterator[Served]:
    """A server that is STARTING."""
    with serving() as started:
        yield started


@pytest.fixture
def peer(served: Served) -> Iterator[Peer]:
    """The official client, with a valid token."""
    with Peer(served.port) as connected:
        yield connected


@pytest.fixture
def all_log_lines() -> Iterator[Callable[[], list[dict[str, object]]]]:
    """What was logged so far, at any level. Puts the log back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    stream = io.StringIO()
    log.configure(worker_id="w1", pool_id="p1", level="debug", stream=stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    structlog.reset_defaults()
    root.handlers, root.level = handlers, level


@pytest.fixture
def log_lines(
    all_log_lines: Callable[[], list[dict[str, object]]],
) -> Callable[[], list[dict[str, object]]]:
    """What was logged so far, but for the line that every call with a token leaves."""
    return lambda: [line for line in all_log_lines() if line["event"] != "request"]
