"""Whatever ends a worker, its pool manager is told why, if the worker can still speak; and nobody waits for it long."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orcd_jax.errors import ExitCode
from tests.tiny_checkpoint import tiny_checkpoint
from tests.worker.test_callback import PoolManager, pool
from tests.worker_process import WAIT_S, Worker, free_port

__all__ = ["pool", "tiny_checkpoint"]

pytestmark = pytest.mark.slow

LONG_S = 20.0  # more than the last word may take, and a slow machine besides


def told(pool: PoolManager) -> list[dict[str, Any]]:
    return [json.loads(body) for _, _, body in pool.received]


def callback(url: str) -> str:
    return f"--readiness_callback_url={url}"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Starts a worker below ``tmp_path``: its checkpoint, then flags. None outlives the test."""
    started: list[Worker] = []

    def one(checkpoint: Path, *flags: str, prelude: str = "") -> Worker:
        started.append(Worker(checkpoint, tmp_path, *flags, prelude=prelude))
        return started[-1]

    yield one
    for worker in started:
        worker.process.kill()
        worker.end()


def ended(worker: Worker) -> int:
    """The exit code of a worker that ends by itself."""
    code = worker.process.wait(WAIT_S)
    worker.end()
    return code


# -- it cannot start ---------------------------------------------------------------------------------------------------

NO_PRIVILEGES = """
import orcd_jax.main as main
from orcd_jax.errors import ErrorCode, OrcdError
def refuse(stage):
    raise OrcdError(ErrorCode.POLICY_VIOLATION, "the system refuses to take capabilities away")
main.lock_down = refuse
"""
A_BUG = """
import orcd_jax.main as main
def fail(*_, **__):
    raise RuntimeError("pointer 0x7f00")
main.Watchdog.start = fail
"""


@pytest.mark.requirement("WORKER-4961")
@pytest.mark.parametrize(
    ("how", "exit_code", "code"),
    [
        ("no model folder", ExitCode.USAGE, "INVALID_PARAMS"),
        ("a token file that others can read", ExitCode.USAGE, "INVALID_PARAMS"),
        ("a token that is too short", ExitCode.USAGE, "INVALID_PARAMS"),
        ("a state directory that others can use", ExitCode.USAGE, "INVALID_PARAMS"),
        ("privileges that cannot be given up", ExitCode.USAGE, "POLICY_VIOLATION"),
        ("a certificate that is none", ExitCode.USAGE, "INVALID_PARAMS"),
        ("no model in the folder", ExitCode.MODEL, "MODEL_LOAD_FAILED"),
        ("a port in use", ExitCode.ADDRESS, "BUSY"),
        ("a bug", ExitCode.INTERNAL, "INTERNAL"),
    ],
)
def test_a_worker_that_cannot_start_says_so(
    tiny_checkpoint: Path,
    tmp_path: Path,
    pool: PoolManager,
    how: str,
    exit_code: ExitCode,
    code: str,
    start: Callable[..., Worker],
) -> None:
    checkpoint, flags, prelude = tiny_checkpoint, [callback(pool.url)], ""
    other = tmp_path / "other"
    other.touch(mode=0o600)
    other.write_text("short")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        match how:
            case "no model folder":
                checkpoint = tmp_path / "none"
            case "a token file that others can read":
                other.chmod(0o644)
                flags += [f"--seal_key_file={other}"]
            case "a token that is too short":
                flags += [f"--api_token_file={other}"]
            case "a state directory that others can use":
                (tmp_path / "state").mkdir()
                (tmp_path / "state").chmod(0o777)
            case "privileges that cannot be given up":
                prelude = NO_PRIVILEGES
            case "a certificate that is none":
                flags += [f"--tls_cert_file={other}", f"--tls_key_file={other}"]
            case "no model in the folder":
                checkpoint = tmp_path / "empty"
                checkpoint.mkdir()
            case "a port in use":
                flags += [f"--rpc_port={taken.getsockname()[1]}"]
            case "a bug":
                prelude = A_BUG
        assert ended(start(checkpoint, *flags, prelude=prelude)) == exit_code
    (failure,) = told(pool)
    assert (failure["status"], failure["worker_id"], failure["pool_id"]) == ("failed", "w", "p")
    assert (failure["code"], failure["exit_code"]) == (code, exit_code)
    assert failure["message"]
    assert "0x7f00" not in json.dumps(failure)


@pytest.mark.requirement("WORKER-4961")
@pytest.mark.requirement("WORKER-4963")
def test_a_start_that_the_ledger_refuses_is_told_with_when_to_come_again(
    tiny_checkpoint: Path, pool: PoolManager, start: Callable[..., Worker]
) -> None:
    flags = ("--max_restarts=1", "--await_commit", callback(pool.url))
    killed = start(tiny_checkpoint, *flags)
    killed.wait_for("startup")
    killed.process.kill()
    killed.end()
    assert told(pool) == [], "who is killed says nothing"
    assert ended(start(tiny_checkpoint, *flags)) == ExitCode.RESTARTS
    (failure,) = told(pool)
    assert (failure["code"], failure["exit_code"], failure["retriable"]) == ("NOT_READY", 11, True)
    assert 0 < failure["retry_after_ms"] <= 300_000


@pytest.mark.requirement("WORKER-4961")
def test_a_second_process_of_one_name_does_not_speak_for_the_first(
    tiny_checkpoint: Path, pool: PoolManager, start: Callable[..., Worker]
) -> None:
    first = start(tiny_checkpoint, "--await_commit", callback(pool.url))
    first.wait_for("startup")
    assert ended(start(tiny_checkpoint, "--await_commit", callback(pool.url))) == ExitCode.USAGE
    assert told(pool) == []
    assert first.end() == ExitCode.OK
    assert told(pool) == [], "nor does one that ends in good order"


# -- it cannot go on ---------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4961")
def test_a_worker_that_nobody_watches_any_more_says_so(
    tiny_checkpoint: Path, pool: PoolManager, start: Callable[..., Worker]
) -> None:
    worker = start(tiny_checkpoint, "--await_commit", callback(pool.url))
    worker.wait_for("startup")
    pid = worker.process.pid
    (watchdog,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(watchdog), signal.SIGKILL)
    assert ended(worker) == ExitCode.INTERNAL
    (failure,) = told(pool)
    assert (failure["code"], failure["exit_code"]) == ("INTERNAL", ExitCode.INTERNAL)


@pytest.mark.requirement("WORKER-4961")
@pytest.mark.requirement("WORKER-4163")
def test_a_worker_whose_audit_cannot_be_written_says_so(
    tiny_checkpoint: Path, pool: PoolManager, start: Callable[..., Worker]
) -> None:
    full = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    full += "resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))"
    flags = ("--audit_on_failure=stop", callback(pool.url))
    assert ended(start(tiny_checkpoint, *flags, prelude=full)) == ExitCode.AUDIT
    assert [(said["status"], said.get("exit_code")) for said in told(pool)][-1] == ("failed", ExitCode.AUDIT)


# -- and nobody listens ------------------------------------------------------------------------------------------------


class Deaf:
    """A pool manager that takes connections and then does one of several useless things."""

    def __init__(self, drips: bytes) -> None:
        self.heard, self._end = threading.Event(), threading.Event()
        self._server = socket.create_server(("127.0.0.1", 0))
        self._drips = drips
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.getsockname()[1]}/"

    def _run(self) -> None:
        held: list[socket.socket] = []
        self._server.settimeout(0.05)
        while not self._end.is_set():
            try:
                held.append(self._server.accept()[0])
                self.heard.set()
            except TimeoutError:
                pass
            for sock in held:
                try:
                    sock.send(self._drips)
                except OSError:
                    continue
        for sock in held:
            sock.close()

    def close(self) -> None:
        self._end.set()
        self._thread.join()
        self._server.close()


@pytest.fixture(params=[b"", b"x"], ids=["silent", "dripping"])
def deaf(request: pytest.FixtureRequest) -> Iterator[Deaf]:
    made = Deaf(request.param)
    yield made
    made.close()


@pytest.mark.requirement("WORKER-4961")
def test_a_pool_manager_that_does_not_answer_holds_the_end_up_for_a_moment(
    tmp_path: Path, deaf: Deaf, start: Callable[..., Worker]
) -> None:
    worker = start(tmp_path / "none", callback(deaf.url))
    assert deaf.heard.wait(WAIT_S)
    began = time.monotonic()
    assert ended(worker) == ExitCode.USAGE
    assert time.monotonic() - began < LONG_S
    assert "was not told why this worker ends" in json.loads(worker.lines[-1])["human"]


@pytest.mark.requirement("WORKER-4961")
def test_a_pool_manager_that_is_down_does_so_too(tmp_path: Path, start: Callable[..., Worker]) -> None:
    worker = start(tmp_path / "none", "--log_level=error", callback(f"http://127.0.0.1:{free_port()}/"))
    assert worker.process.stderr is not None
    worker.process.stderr.readline()  # what is wrong
    began = time.monotonic()
    assert ended(worker) == ExitCode.USAGE
    assert time.monotonic() - began < LONG_S


@pytest.mark.requirement("WORKER-4961")
@pytest.mark.requirement("WORKER-4963")
def test_a_sigterm_while_it_tells_ends_it_with_the_code_it_has(
    tiny_checkpoint: Path, start: Callable[..., Worker]
) -> None:
    killed = start(tiny_checkpoint, "--max_restarts=1", "--await_commit")
    killed.wait_for("startup")
    killed.process.kill()
    killed.end()
    deaf = Deaf(b"")
    try:
        refused = start(tiny_checkpoint, "--max_restarts=1", "--await_commit", callback(deaf.url))
        assert deaf.heard.wait(WAIT_S)
        asked = time.monotonic()
        assert refused.end() == ExitCode.RESTARTS
        assert time.monotonic() - asked < LONG_S / 4
    finally:
        deaf.close()
