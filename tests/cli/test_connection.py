"""Every way in which no worker can be at the address, or cease to be."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from grpclib.server import Server

from orcd_jax.api.orcd.worker import v1
from orcd_jax.cli import connection
from orcd_jax.errors import ExitCode
from tests.cli.conftest import Orcd, Result
from tests.server.fake_worker import STARTED, WAIT_S, Served, hang_after

PING = 6
SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
EXECUTE = ("execute", "--max_tokens=8", "hello")


@contextlib.contextmanager
def peer(talk: Callable[[socket.socket], None]) -> Iterator[int]:
    """Something that is no worker at a port: takes one connection, does as ``talk`` does, and waits for its end."""

    def serve() -> None:
        taken, _ = listener.accept()
        with taken:
            taken.settimeout(WAIT_S)
            try:
                talk(taken)
            except TimeoutError:
                left_waiting.set()
            except OSError:  # the caller is gone
                pass

    left_waiting = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()
    assert not left_waiting.is_set(), "the caller did not give up by itself"


def read_all(taken: socket.socket) -> None:
    while taken.recv(65536):
        pass


def silent(taken: socket.socket) -> None:
    read_all(taken)


def polite_then_silent(taken: socket.socket) -> None:
    taken.sendall(SETTINGS)
    read_all(taken)


def answers_four_pings_then_silent(taken: socket.socket) -> None:
    taken.sendall(SETTINGS)
    with taken.makefile("rb") as source:
        source.read(24)  # the client's preface
        pings = 0
        while head := source.read(9):
            payload = source.read(int.from_bytes(head[:3]))
            if head[3] == PING and pings < 4:
                taken.sendall(bytes((0, 0, 8, PING, 1, 0, 0, 0, 0)) + payload)
                pings += 1


def hangs_up(taken: socket.socket) -> None:
    taken.recv(1)


def web_server(taken: socket.socket) -> None:
    taken.recv(65536)
    taken.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
    read_all(taken)


def ssh_server(taken: socket.socket) -> None:
    taken.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
    read_all(taken)


def broken_http2(taken: socket.socket) -> None:
    taken.sendall(SETTINGS + bytes((0, 0, 1, 6, 0, 0, 0, 0, 0, 0)))  # a PING has eight bytes, not one
    read_all(taken)


def assert_unreachable(shown: Result, *said: str) -> None:
    assert (shown.code, shown.out) == (ExitCode.UNREACHABLE, "")
    assert shown.err.startswith("error: UNREACHABLE: no worker answers at ")
    assert shown.err.count("\n") == 1
    for wanted in ("check --address", *said):
        assert wanted in shown.err


@pytest.mark.parametrize("command", [EXECUTE, ("ready",), ("status",)], ids=lambda command: command[0])
def test_nothing_listens(alone: Orcd, command: tuple[str, ...]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    assert_unreachable(alone(*command, f"--address=127.0.0.1:{port}"), "nothing listens there", f"127.0.0.1:{port}")


def test_there_is_no_such_host(alone: Orcd) -> None:
    assert_unreachable(alone("ready", "--address=no-such-host.invalid:1"), "no-such-host.invalid:1")


def test_the_connection_is_taken_and_nothing_said(alone: Orcd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT_S", 0.2)
    with peer(silent) as port:
        assert_unreachable(alone(*EXECUTE, f"--address=127.0.0.1:{port}"), "there is no answer within 0.2 s")


def test_a_peer_that_takes_no_more_does_not_keep_the_caller(alone: Orcd) -> None:
    """The prompt fills every buffer on the way, so that the connection cannot be closed in peace."""
    done = threading.Event()

    def reads_nothing(taken: socket.socket) -> None:
        wide = bytes((0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 4, 127, 255, 255, 255))  # a stream may send 2 GiB
        taken.sendall(wide + bytes((0, 0, 4, 8, 0, 0, 0, 0, 0, 127, 0, 0, 0)))  # and so may all together
        assert done.wait(WAIT_S)

    with peer(reads_nothing) as port:
        shown = alone("execute", "--timeout=0.3", "long " * 800_000, f"--address=127.0.0.1:{port}")
        done.set()
    assert (shown.code, shown.out) == (ExitCode.FAILED, "")
    assert shown.err.startswith("error: TIMEOUT: ")


def test_an_attempt_to_connect_takes_at_most_five_seconds() -> None:
    assert connection.CONNECT_TIMEOUT_S == 5.0


@pytest.mark.parametrize("talk", [hangs_up, web_server, ssh_server], ids=lambda talk: talk.__name__)
def test_something_else_listens(alone: Orcd, talk: Callable[[socket.socket], None]) -> None:
    with peer(talk) as port:
        assert_unreachable(alone("ready", f"--address=127.0.0.1:{port}"), "does not speak gRPC")


def test_http2_that_breaks_its_own_rules(alone: Orcd) -> None:
    with peer(broken_http2) as port:
        shown = alone("ready", f"--address=127.0.0.1:{port}")
    assert_unreachable(shown)
    assert "there is no answer" not in shown.err  # of a second connection, which nobody takes


@pytest.mark.parametrize(("command", "limit"), [("ready", "ANSWER_TIMEOUT_S"), ("attest", "PROOF_TIMEOUT_S")])
def test_a_question_is_not_waited_for_for_ever(
    alone: Orcd, monkeypatch: pytest.MonkeyPatch, command: str, limit: str
) -> None:
    monkeypatch.setattr(connection, limit, 0.2)
    with peer(polite_then_silent) as port:
        assert_unreachable(alone(command, f"--address=127.0.0.1:{port}"), "there is no answer within 0.2 s")


@pytest.mark.parametrize("talk", [polite_then_silent, answers_four_pings_then_silent], ids=lambda talk: talk.__name__)
def test_a_job_whose_worker_answers_no_ping_is_given_up(
    alone: Orcd, monkeypatch: pytest.MonkeyPatch, talk: Callable[[socket.socket], None]
) -> None:
    monkeypatch.setattr(connection, "PING_EVERY_S", 0.1)
    monkeypatch.setattr(connection, "PING_TIMEOUT_S", 0.1)
    with peer(talk) as port:
        assert_unreachable(alone(*EXECUTE, f"--address=127.0.0.1:{port}"), "the connection broke off")


def test_a_job_that_is_silent_for_long_goes_on_while_its_worker_answers_pings(
    orcd: Orcd, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "PING_EVERY_S", 0.02)
    monkeypatch.setattr(connection, "PING_TIMEOUT_S", 1.0)
    served.worker.script = hang_after(STARTED)
    assert "TIMEOUT" in orcd(*EXECUTE, "--timeout=1.5").err


def test_no_worker_is_told_as_json_too(alone: Orcd) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    shown = alone(*EXECUTE, f"--address=127.0.0.1:{port}", "--json")
    assert shown.code is ExitCode.UNREACHABLE
    assert shown.out.count("\n") == 1
    error = json.loads(shown.out)
    assert (error["event"], error["code"], error["retriable"]) == ("error", "UNREACHABLE", True)


# -- servers of gRPC that are no worker of ours, or an odd one ---------------------------------------------------------


STARTS = v1.ExecuteEvent(started=v1.JobStarted(job_id="j", model="m"))
SAYS_A = v1.ExecuteEvent(token=v1.TokenEvent(text="a", token_ids=[1]))


class Odd(v1.WorkerBase):
    """A worker with its own mind."""

    def __init__(self, *events: v1.ExecuteEvent, status: Status = Status.UNIMPLEMENTED) -> None:
        self._events = events
        self._status = status

    async def ready(self, message: v1.ReadyRequest) -> v1.ReadyResponse:
        raise GRPCError(self._status, "as it is")

    async def execute(self, message: v1.ExecuteRequest) -> AsyncIterator[v1.ExecuteEvent]:
        for event in self._events:
            yield event

    async def get_status(self, message: v1.GetStatusRequest) -> v1.GetStatusResponse:
        return v1.GetStatusResponse(status=v1.WorkerStatus(99), state=v1.WorkerState.READY)


@contextlib.contextmanager
def plain_server(*services: v1.WorkerBase) -> Iterator[int]:
    """A server of gRPC without our details of errors."""
    up, stop = threading.Event(), asyncio.Event()
    found: list[tuple[int, asyncio.AbstractEventLoop]] = []

    async def serve() -> None:
        server = Server(list(services))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            await server.start(sock=listener)
            found.append((listener.getsockname()[1], asyncio.get_running_loop()))
            up.set()
            await stop.wait()
            server.close()
            await server.wait_closed()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert up.wait(WAIT_S)
    ((port, loop),) = found
    try:
        yield port
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(WAIT_S)


@pytest.mark.parametrize("command", [EXECUTE, ("ready",), ("status",)], ids=lambda command: command[0])
def test_another_service_of_grpc(alone: Orcd, command: tuple[str, ...]) -> None:
    with plain_server() as port:
        assert_unreachable(alone(*command, f"--address=127.0.0.1:{port}"), "what answers there is no orcd worker")


@pytest.mark.parametrize(
    ("status", "code", "word"),
    [
        (Status.UNAUTHENTICATED, ExitCode.UNAUTHENTICATED, "AUTH_FAILED"),
        (Status.UNAVAILABLE, ExitCode.UNREACHABLE, "UNREACHABLE"),
        (Status.PERMISSION_DENIED, ExitCode.FAILED, "PERMISSION_DENIED"),
    ],
)
def test_an_error_without_details_is_told_by_its_status(alone: Orcd, status: Status, code: ExitCode, word: str) -> None:
    with plain_server(Odd(status=status)) as port:
        shown = alone("ready", f"--address=127.0.0.1:{port}")
    assert shown.code is code
    assert shown.err.startswith(f"error: {word}: ")
    assert "as it is" in shown.err


def test_a_job_without_an_end_is_a_failure(alone: Orcd) -> None:
    with plain_server(Odd(STARTS, SAYS_A)) as port:
        shown = alone(*EXECUTE, f"--address=127.0.0.1:{port}")
    assert (shown.code, shown.out) == (ExitCode.FAILED, "a\n")
    assert "without an end" in shown.err


def test_an_error_event_is_a_failure_even_when_the_status_is_ok(alone: Orcd) -> None:
    error = v1.ErrorDetail(code=v1.ErrorCode.BUSY, message="not now", retriable=True, retry_after_ms=1500)
    with plain_server(Odd(STARTS, v1.ExecuteEvent(error=error))) as port:
        shown = alone(*EXECUTE, f"--address=127.0.0.1:{port}")
    assert (shown.code, shown.err) == (ExitCode.FAILED, "error: BUSY: not now (try again in 1.5 s)\n")


def test_an_event_of_a_newer_worker_is_passed_over(alone: Orcd) -> None:
    end = v1.ExecuteEvent(end=v1.JobEnd(finish_reason=v1.FinishReason(99), tokens_out=1))
    with plain_server(Odd(STARTS, v1.ExecuteEvent(), SAYS_A, end)) as port:
        shown = alone(*EXECUTE, f"--address=127.0.0.1:{port}")
    assert (shown.code, shown.out) == (ExitCode.OK, "a\n")
    assert "finish: unspecified" in shown.err


def test_a_word_of_a_newer_worker_is_unspecified(alone: Orcd) -> None:
    with plain_server(Odd()) as port:
        told = json.loads(alone("status", f"--address=127.0.0.1:{port}", "--json").out)
    assert (told["status"], told["state"]) == ("unspecified", "ready")


def test_a_worker_that_goes_away_ends_the_job(orcd: Orcd, served: Served) -> None:
    served.worker.script = hang_after(STARTED)

    def leave() -> None:
        assert served.worker.running.wait(WAIT_S)
        served.on_loop(served.server.close)

    thread = threading.Thread(target=leave)
    thread.start()
    shown = orcd(*EXECUTE)
    thread.join(WAIT_S)
    assert_unreachable(shown, "the connection broke off")
