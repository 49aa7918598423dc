"""A worker to call, and ``orcd`` called in this process or as one of its own."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest
import structlog

from orcd_jax.cli.main import main
from orcd_jax.errors import ExitCode
from tests.server.fake_worker import CONTROL_TOKEN, TOKEN, Served, serving

RUN = "from orcd_jax.cli import run; run()"


@dataclass(frozen=True, slots=True)
class Result:
    """How a call of ``orcd`` ended."""

    code: ExitCode
    out: str
    err: str


def table(text: str) -> dict[str, str]:
    """Rows, as a person reads them: names are set apart by two blanks or more; none is empty."""
    rows = {name: value.strip() for name, _, value in (line.partition("  ") for line in text.splitlines())}
    assert all(rows.values())
    return rows


Orcd = Callable[..., Result]
Start = Callable[..., AbstractContextManager[subprocess.Popen[str]]]


@pytest.fixture
def served() -> Iterator[Served]:
    """A worker on a real socket; what it logs goes nowhere."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        with serving() as started:
            yield started
    finally:
        structlog.reset_defaults()


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    """The file with the worker's token."""
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n", encoding="ascii")
    return path


@pytest.fixture
def control_file(tmp_path: Path) -> Path:
    """The file with the worker's control token."""
    path = tmp_path / "control"
    path.write_text(f"{CONTROL_TOKEN}\n", encoding="ascii")
    return path


@pytest.fixture
def tokens(token_file: Path, control_file: Path) -> dict[str, str]:
    """The environment that names both."""
    return {"ORCD_TOKEN_FILE": str(token_file), "ORCD_CONTROL_TOKEN_FILE": str(control_file)}


@pytest.fixture
def alone(tokens: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Orcd:
    """Calls ``orcd`` in this process, with its tokens and no worker."""
    for name in ("ORCD_ADDRESS", "ORCD_TLS_CA_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in tokens.items():
        monkeypatch.setenv(name, value)

    def call(*argv: str) -> Result:
        code = main(argv)
        shown = capsys.readouterr()
        return Result(code, shown.out, shown.err)

    return call


@pytest.fixture
def orcd(alone: Orcd, served: Served, monkeypatch: pytest.MonkeyPatch) -> Orcd:
    """Calls ``orcd`` in this process, at the worker, whose limit of --max_tokens is 64."""
    monkeypatch.setenv("ORCD_ADDRESS", f"127.0.0.1:{served.port}")
    return alone


@pytest.fixture
def start(tokens: dict[str, str]) -> Start:
    """Starts ``orcd`` as a process of its own at a port."""

    def begin(port: int, *argv: str) -> subprocess.Popen[str]:
        environment = os.environ | tokens | {"ORCD_ADDRESS": f"127.0.0.1:{port}"}
        return subprocess.Popen(
            [sys.executable, "-c", RUN, *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env=environment,
        )

    return begin


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Sets what ``orcd`` reads from stdin."""

    def give(data: bytes) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))

    return give
