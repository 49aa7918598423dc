"""The callback: to the configured URL and nowhere else, retried until its deadline."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from orcd_jax.errors import ErrorCode
from orcd_jax.worker import callback
from orcd_jax.worker.callback import CallbackUndelivered, Failure, Readiness, deliver

WAIT_S = 20.0  # only a failing test waits that long

READY = Readiness(
    worker_id="w1",
    pool_id="p1",
    model_ref="file:/models/tiny",
    handle_id="h-1",
    digest="ab" * 32,
    pinned=True,
    vram_bytes=0,
    emulated=True,
    uri="grpc://127.0.0.1:50051",
    metrics_port=9400,
    identity_public_key="cd" * 32,
    capabilities={"architectures": ["llama"]},
)


class PoolManager(ThreadingHTTPServer):
    """A loopback pool manager that answers from a script and remembers what it was sent."""

    def __init__(self) -> None:
        self.answers: list[int] = []
        self.location = ""
        self.received: list[tuple[str, dict[str, str], bytes]] = []
        super().__init__(("127.0.0.1", 0), Receiver)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/ready"


class Receiver(BaseHTTPRequestHandler):
    server: PoolManager

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append((self.path, dict(self.headers.items()), body))
        self.send_response(self.server.answers.pop(0) if self.server.answers else 200)
        if self.server.location:
            self.send_header("Location", self.server.location)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        self.server.received.append(("GET " + self.path, {}, b""))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        pass


@pytest.fixture
def pool() -> Iterator[PoolManager]:
    server = PoolManager()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


class FakeTime:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def send(url: str, message: Readiness | Failure = READY, *, deadline_s: float = 60, token: str = "") -> FakeTime:
    fake = FakeTime()
    asyncio.run(
        deliver(
            url,
            message,
            deadline_s=deadline_s,
            token=token,
            sleep=fake.sleep,
            clock=fake.clock,
            jitter=lambda: 1.0,
        )
    )
    return fake


@pytest.mark.requirement("WORKER-4023")
def test_readiness_carries_who_what_and_where(pool: PoolManager) -> None:
    send(pool.url)
    ((path, headers, body),) = pool.received
    assert path == "/ready"
    assert headers["Content-Type"] == "application/json"
    sent = json.loads(body)
    assert sent.pop("version")
    assert sent == {
        "status": "ready",
        "worker_id": "w1",
        "pool_id": "p1",
        "model_ref": "file:/models/tiny",
        "handle_id": "h-1",
        "digest": "ab" * 32,
        "pinned": True,
        "vram_bytes": 0,
        "emulated": True,
        "uri": "grpc://127.0.0.1:50051",
        "metrics_port": 9400,
        "identity_public_key": "cd" * 32,
        "capabilities": {"architectures": ["llama"]},
    }


@pytest.mark.requirement("WORKER-4023")
@pytest.mark.requirement("WORKER-4961")
def test_a_failure_carries_its_code(pool: PoolManager) -> None:
    failure = Failure(
        worker_id="w1",
        pool_id="p1",
        code="NOT_READY",
        message="too often",
        retriable=True,
        exit_code=11,
        retry_after_ms=1500,
    )
    send(pool.url, failure)
    sent = json.loads(pool.received[0][2])
    assert sent.pop("version")
    assert sent == {
        "status": "failed",
        "worker_id": "w1",
        "pool_id": "p1",
        "code": "NOT_READY",
        "message": "too often",
        "retriable": True,
        "exit_code": 11,
        "retry_after_ms": 1500,
    }


def test_a_token_is_sent_when_there_is_one_and_only_then(pool: PoolManager) -> None:
    send(pool.url)
    send(pool.url, token="s" * 32)
    assert [headers.get("Authorization") for _, headers, _ in pool.received] == [None, "Bearer " + "s" * 32]


@pytest.mark.requirement("WORKER-4023")
def test_it_is_retried_with_growing_waits_until_taken(pool: PoolManager) -> None:
    pool.answers = [500, 503, 404, 204]
    fake = send(pool.url)
    assert fake.slept == [0.5, 1.0, 2.0]
    assert len(pool.received) == 4


def test_waits_are_spread_by_jitter_over_half_their_length(pool: PoolManager) -> None:
    pool.answers = [500]
    fake = FakeTime()
    asyncio.run(deliver(pool.url, READY, deadline_s=60, sleep=fake.sleep, clock=fake.clock, jitter=lambda: 0.0))
    assert fake.slept == [callback.FIRST_WAIT_S / 2]


def test_each_retry_is_reported_with_its_reason(pool: PoolManager) -> None:
    pool.answers = [503]
    fake, told = FakeTime(), list[tuple[int, str, float]]()
    attempts = asyncio.run(
        deliver(
            pool.url,
            READY,
            deadline_s=60,
            sleep=fake.sleep,
            clock=fake.clock,
            jitter=lambda: 1.0,
            on_retry=lambda attempt, reason, wait: told.append((attempt, reason, wait)),
        )
    )
    assert attempts == 2
    assert told == [(1, "HTTP 503", 0.5)]


@pytest.mark.requirement("WORKER-4023")
def test_it_gives_up_at_the_deadline_and_says_what_to_do(pool: PoolManager) -> None:
    pool.answers = [503] * 100
    with pytest.raises(CallbackUndelivered, match=r"within 20 s \(HTTP 503\).*--callback_deadline") as caught:
        send(pool.url, deadline_s=20)
    assert caught.value.code is ErrorCode.TIMEOUT
    # waits of 0.5, 1, 2, 4, 8 s end at 15.5 s; the next one of 10 s would pass 20 s
    assert len(pool.received) == 6


@pytest.mark.requirement("WORKER-4023")
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_refused_and_never_followed(pool: PoolManager, status: int) -> None:
    pool.location = pool.url.replace("/ready", "/elsewhere")
    pool.answers = [status] * 100
    with pytest.raises(CallbackUndelivered, match="a redirect, which is refused"):
        send(pool.url, deadline_s=1)
    assert {path for path, _, _ in pool.received} == {"/ready"}


@pytest.mark.requirement("WORKER-4920")
def test_a_proxy_of_the_environment_is_not_used(pool: PoolManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    send(pool.url)
    assert len(pool.received) == 1


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/x", "file:///etc/hostname", "data:,x"])
def test_only_http_is_spoken(url: str) -> None:
    with pytest.raises(CallbackUndelivered, match="http://"):
        send(url)


def test_a_pool_manager_that_is_not_there_is_a_reason_not_a_crash() -> None:
    server = PoolManager()
    url = server.url
    server.server_close()
    with pytest.raises(CallbackUndelivered, match="refused"):
        send(url, deadline_s=1)


def test_what_the_server_answers_is_never_quoted(pool: PoolManager) -> None:
    pool.answers = [500] * 100
    with pytest.raises(CallbackUndelivered) as caught:
        send(pool.url, deadline_s=1)
    assert "Internal Server Error" not in caught.value.message


# -- another side that does nothing good -------------------------------------------------------------------------------


class Dripping(threading.Thread):
    """Takes one connection and answers a byte at a time, never to its end."""

    def __init__(self) -> None:
        super().__init__()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}/"
        self.was_cut = threading.Event()

    def run(self) -> None:
        with self._server, self._server.accept()[0] as client:
            client.sendall(b"HTTP/1.1 200 OK\r\n")
            for _ in range(int(WAIT_S / 0.01)):
                try:
                    client.sendall(b"x")
                except OSError:
                    self.was_cut.set()
                    return
                time.sleep(0.01)


@pytest.mark.requirement("WORKER-4023")
def test_an_answer_that_never_ends_is_not_waited_for_and_cut_off() -> None:
    dripping = Dripping()
    dripping.start()
    began = time.monotonic()
    with pytest.raises(CallbackUndelivered, match="no answer within"):
        asyncio.run(deliver(dripping.url, READY, deadline_s=0.5, jitter=lambda: 1.0))
    assert time.monotonic() - began < WAIT_S / 2
    assert dripping.was_cut.wait(WAIT_S)
    dripping.join()


@pytest.mark.requirement("WORKER-4023")
def test_a_message_that_was_given_up_does_not_arrive_after_the_next_one(
    pool: PoolManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A "ready" must not come after "failed"."""
    connecting, may_connect = threading.Event(), threading.Event()
    connect = http.client.HTTPConnection.connect

    def slowly(connection: http.client.HTTPConnection) -> None:
        connecting.set()
        assert may_connect.wait(WAIT_S)
        connect(connection)

    async def tell() -> None:
        telling = asyncio.create_task(deliver(pool.url, READY, deadline_s=60))
        await asyncio.to_thread(connecting.wait, WAIT_S)
        telling.cancel()
        await asyncio.wait((telling,))
        assert telling.cancelled()

    with monkeypatch.context() as patched:
        patched.setattr(http.client.HTTPConnection, "connect", slowly)
        asyncio.run(tell())
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "callback"]
        may_connect.set()
        thread.join(WAIT_S)
    send(pool.url)
    assert len(pool.received) == 1


def test_a_token_that_no_header_can_hold_is_a_reason_and_is_not_repeated(pool: PoolManager) -> None:
    with pytest.raises(CallbackUndelivered) as caught:
        send(pool.url, deadline_s=1, token="secret\r\nX-Other: 1")
    assert pool.received == []
    assert "secret" not in caught.value.message
