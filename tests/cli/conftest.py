"""A worker to call, and ``orcd`` called in this process or as one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest

from orcd_jax.cli.main import main
from orcd_jax.errors import ExitCode
from tests.server.fake_worker import TOKEN, Served, serving

RUN = "from orcd_jax.cli import run; run()"


@dataclass(frozen=True, slots=True)
class Result:
    """How a call of ``orcd`` ended."""

    code: ExitCode
    out: str
    err: str


Orcd = Callable[..., Result]
Start = Callable[..., AbstractContextManager[subprocess.Popen[str]]]


@pytest.fixture
def served() -> Iterator[Served]:
    """A worker on a real socket."""
    with serving() as started:
        yield started


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    """The file with the worker's token."""
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n", encoding="ascii")
    return path


@pytest.fixture
def alone(token_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Orcd:
    """Calls ``orcd`` in this process, with a token and no worker."""
    monkeypatch.setenv("ORCD_TOKEN_FILE", str(token_file))
    monkeypatch.delenv("ORCD_ADDRESS", raising=False)

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
def start(token_file: Path) -> Start:
    """Starts ``orcd`` as a process of its own at a port."""

    def begin(port: int, *argv: str) -> subprocess.Popen[str]:
        environment = os.environ | {"ORCD_TOKEN_FILE": str(token_file), "ORCD_ADDRESS": f"127.0.0.1:{port}"}
        return subprocess.Popen(
            [sys.executable, "-c", RUN, *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env=environment,
        )

    return begin
