"""Metrics and health over HTTP: right answers, and nothing that a client sends or leaves undone matters to others."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.server import http_status
from orcd_jax.server.http_status import MAX_CONNECTIONS, MAX_REQUEST_BYTES, HealthSnapshot, start_http_status
from orcd_jax.telemetry.metrics import CONTENT_TYPE, WorkerMetrics

WAIT_S = 10.0  # for what happens at once; only a failing test waits that long
PATHS = ("/metrics", "/livez", "/readyz", "/healthz")
READY = HealthSnapshot(state="READY", ready=True, model="tiny", seal_age_s=1.25)


class Broken(Exception):
    """What a bug raises."""


@dataclass
class Told:
    """What the listener under test tells; it may also raise."""

    loop: asyncio.AbstractEventLoop
    health: HealthSnapshot | Exception = READY
    body: bytes | Exception = b"up 1\n"
    now_s: float = 0.0
    rendered: int = 0
    port: int = 0
    close: Callable[[], None] = lambda: None

    def snapshot(self) -> HealthSnapshot:
        if isinstance(self.health, Exception):
            raise self.health
        return self.health

    def exposition(self) -> bytes:
        self.rendered += 1
        if isinstance(self.body, Exception):
            raise self.body
        return self.body


@contextlib.contextmanager
def listening() -> Iterator[Told]:
    """A listener in a thread of its own."""
    told = Told(asyncio.new_event_loop())
    unexpected: list[dict[str, object]] = []
    told.loop.set_exception_handler(lambda _, context: unexpected.append(context))
    thread = threading.Thread(target=told.loop.run_forever)
    thread.start()
    starting = start_http_status(told, told.snapshot, clock=lambda: told.now_s)
    server = asyncio.run_coroutine_threadsafe(starting, told.loop).result(WAIT_S)
    told.port = server.port

    def close() -> None:
        async def closing() -> None:
            server.close()
            await server.wait_closed()

        asyncio.run_coroutine_threadsafe(closing(), told.loop).result(WAIT_S)

    told.close = close
    try:
        yield told
    finally:
        close()
        told.loop.call_soon_threadsafe(told.loop.stop)
        thread.join(WAIT_S)
        told.loop.close()
    assert not unexpected


@pytest.fixture
def told() -> Iterator[Told]:
    with listening() as started:
        yield started


def request(told: Told, path: str, method: str = "GET") -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", told.port, timeout=WAIT_S)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read(), dict(response.getheaders())
    finally:
        connection.close()


def connect(told: Told) -> socket.socket:
    return socket.create_connection(("127.0.0.1", told.port), timeout=WAIT_S)


def rest(client: socket.socket) -> bytes:
    """Everything until the connection ends, in order or cut."""
    received = bytearray()
    with contextlib.suppress(ConnectionError):
        while part := client.recv(65_536):
            received += part
    return bytes(received)


def exchange(told: Told, sent: bytes) -> bytes:
    with connect(told) as client:
        client.sendall(sent)
        return rest(client)


@pytest.mark.requirement("WORKER-4810")
def test_metrics_are_what_prometheus_reads() -> None:
    with listening() as told:
        told.body = WorkerMetrics(platform="cpu").exposition()
        status, body, headers = request(told, "/metrics")
    assert (status, headers["Content-Type"]) == (200, CONTENT_TYPE)
    assert "worker_uptime_seconds" in {family.name for family in text_string_to_metric_families(body.decode())}


@pytest.mark.requirement("WORKER-4810")
def test_scrapes_within_a_quarter_second_share_one_rendering(told: Told) -> None:
    assert [request(told, "/metrics")[1] for _ in range(5)] == [b"up 1\n"] * 5
    assert told.rendered == 1
    told.now_s, told.body = 0.25, b"up 2\n"
    assert request(told, "/metrics")[1] == b"up 2\n"


def test_a_process_that_answers_is_alive_whatever_its_state(told: Told) -> None:
    told.health = HealthSnapshot(state="STOPPED", ready=False, model="", seal_age_s=None)
    assert request(told, "/livez")[:2] == (200, b"ok\n")


@pytest.mark.parametrize(
    ("state", "ready", "status"), [("READY", True, 200), ("EXECUTING", True, 200), ("DRAINING", False, 503)]
)
def test_ready_is_who_takes_jobs(told: Told, state: str, ready: bool, status: int) -> None:
    told.health = HealthSnapshot(state=state, ready=ready, model="tiny", seal_age_s=0.0)
    assert request(told, "/readyz")[:2] == (status, f"{state}\n".encode())


@pytest.mark.parametrize("seal_age_s", [1.25, None])
def test_health_is_json(told: Told, seal_age_s: float | None) -> None:
    told.health = HealthSnapshot(state="LOADING", ready=False, model='a "name"\r\n', seal_age_s=seal_age_s)
    status, body, headers = request(told, "/healthz")
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert json.loads(body) == {"state": "LOADING", "ready": False, "model": 'a "name"\r\n', "seal_age_s": seal_age_s}


@pytest.mark.parametrize("path", PATHS)
def test_head_is_get_without_the_body(told: Told, path: str) -> None:
    with connect(told) as client:
        client.sendall(f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        head, _, body = rest(client).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert f"Content-Length: {len(request(told, path)[1])}".encode() in head.split(b"\r\n")
    assert body == b""


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT"])
@pytest.mark.parametrize("path", ["/metrics", "/else"])
def test_other_methods_are_refused(told: Told, method: str, path: str) -> None:
    status, _, headers = request(told, path, method)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    "path", ["/", "/metrics/", "/metrics?x=1", "/livez/../metrics", "/%6detrics", "/METRICS", "//metrics"]
)
def test_there_is_no_other_path(told: Told, path: str) -> None:
    assert request(told, path)[0] == 404


@pytest.mark.parametrize(
    "sent",
    [
        b"GET http://127.0.0.1/metrics HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/2.0\r\n\r\n",
        b"GET /metrics\r\n\r\n",
        b"get /metrics HTTP/1.1\r\n\r\n",
        b"GET  /metrics HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/1.1\nHost: x\r\n\r\n",
        b"GET /" + b"m" * 300 + b" HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
        b"\r\n\r\n",
    ],
)
def test_what_is_no_request_is_refused(told: Told, sent: bytes) -> None:
    assert exchange(told, sent).startswith(b"HTTP/1.1 400 Bad Request\r\n")


def test_a_request_that_comes_byte_by_byte_is_answered(told: Told) -> None:
    with connect(told) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n":
            client.sendall(bytes([byte]))
        assert rest(client).endswith(b"\r\n\r\nok\n")


def test_a_connection_carries_one_request_whatever_it_asks_for(told: Told) -> None:
    both = b"GET /livez HTTP/1.1\r\nConnection: keep-alive\r\nContent-Length: 9\r\n\r\n" * 2
    received = exchange(told, both)
    assert received.count(b"HTTP/1.1 ") == 1
    assert b"\r\nConnection: close\r\n" in received


def test_what_comes_after_the_answer_is_not_answered(told: Told) -> None:
    with connect(told) as client:
        client.sendall(b"GET /livez HTTP/1.1\r\n\r\n")
        assert rest(client).endswith(b"ok\n")
        client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        client.shutdown(socket.SHUT_WR)
        assert rest(client) == b""
    assert told.rendered == 0


def test_a_client_that_closes_its_side_first_is_answered(told: Told) -> None:
    with connect(told) as client:
        client.sendall(b"GET /livez HTTP/1.1\r\n\r\n")
        client.shutdown(socket.SHUT_WR)
        assert rest(client).endswith(b"ok\n")


def test_a_request_that_is_cut_off_is_refused(told: Told) -> None:
    with connect(told) as client:
        client.sendall(b"GET /livez HTTP/1.1\r\n")
        client.shutdown(socket.SHUT_WR)
        assert rest(client).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"])
def test_a_request_past_the_limit_is_refused_before_it_ends(told: Told, end: bytes) -> None:
    start = b"GET /livez HTTP/1.1\r\nX: "
    assert exchange(told, start + b"a" * (MAX_REQUEST_BYTES - len(start)) + b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    assert exchange(told, start + b"a" * MAX_REQUEST_BYTES + end).startswith(b"HTTP/1.1 431 ")


def test_a_client_that_goes_on_sending_is_cut(told: Told) -> None:
    with connect(told) as client:
        client.sendall(b"GET /livez HTTP/1.1\r\n\r\n")
        with pytest.raises(ConnectionError):
            client.sendall(b"a" * 50_000_000)  # more than the buffers between


@pytest.mark.parametrize("sent", [b"", b"GET /metr", b"GET /livez HTTP/1.1\r\n\r\n"])
def test_a_client_that_stays_is_cut_in_time_and_stalls_nobody(
    told: Told, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(http_status, "CONNECTION_TIMEOUT_S", 0.3)
    with connect(told) as client:
        client.sendall(sent)
        assert request(told, "/livez")[0] == 200
        rest(client)  # returns: it was cut
    assert request(told, "/livez")[0] == 200


def test_a_client_that_does_not_read_is_cut_in_time_and_stalls_nobody(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_status, "CONNECTION_TIMEOUT_S", 0.3)
    told.body = b"a" * 50_000_000  # more than the buffers between
    with connect(told) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert client.recv(1) == b"H"
        assert request(told, "/livez")[0] == 200
        cut = threading.Event()
        told.loop.call_soon_threadsafe(told.loop.call_later, 0.6, cut.set)  # well past the limit
        assert cut.wait(WAIT_S)
        assert len(rest(client)) < len(told.body)


def test_more_clients_than_there_is_room_for_push_out_the_oldest(told: Told) -> None:
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connect(told)) for _ in range(MAX_CONNECTIONS + 3)]
        for path in PATHS:
            assert request(told, path)[0] == 200
        assert [rest(client) for client in idle[:3]] == [b""] * 3
        idle[-1].sendall(b"GET /livez HTTP/1.1\r\n\r\n")
        assert rest(idle[-1]).endswith(b"ok\n")


def test_a_bug_is_a_500_that_reveals_nothing_and_the_next_request_is_answered(
    told: Told, log_lines: Callable[[], list[dict[str, object]]]
) -> None:
    told.health, told.body = Broken("my secret"), Broken("my secret")
    for path in ("/readyz", "/healthz", "/metrics"):
        status, body, _ = request(told, path)
        assert (status, body) == (500, b"Internal Server Error\n")
    lines = log_lines()
    assert [line["event"] for line in lines] == ["error"] * 3
    assert all("test_http_status.py" in str(line["where"]) for line in lines)
    assert "secret" not in json.dumps(lines)
    told.health, told.body = READY, b"up 3\n"
    assert [request(told, path)[0] for path in PATHS] == [200] * 4


@pytest.mark.requirement("WORKER-4810")
@pytest.mark.requirement("WORKER-4920")
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "localhost", "worker.example"])
def test_an_address_that_others_may_reach_is_refused(host: str) -> None:
    async def start() -> None:
        await start_http_status(WorkerMetrics(platform="cpu"), lambda: READY, host=host)

    with pytest.raises(OrcdError) as refused:
        asyncio.run(start())
    assert refused.value.code is ErrorCode.POLICY_VIOLATION


def test_a_port_in_use_is_an_error(told: Told) -> None:
    async def start() -> None:
        await start_http_status(told, told.snapshot, port=told.port)

    with pytest.raises(OSError, match="address already in use"):
        asyncio.run(start())


def test_closing_cuts_the_clients_and_frees_the_port(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_status, "CONNECTION_TIMEOUT_S", 10 * WAIT_S)
    with connect(told) as client:
        assert request(told, "/livez")[0] == 200
        told.close()
        assert rest(client) == b""
    with pytest.raises(ConnectionRefusedError):
        connect(told)


_PIECES = st.sampled_from(
    [
        *(b"GET ", b"HEAD ", b"POST ", b"/livez", b"/metrics", b" HTTP/1.1", b" ", b":", b"\0"),
        *(b"\r\n", b"\r\n\r\n", b"\n", b"Host: x\r\n", b"Content-Length: -1\r\n"),
        *(b"Transfer-Encoding: chunked\r\n", b"GET /healthz HTTP/1.0\r\n\r\n"),
    ]
)
_SENT = st.one_of(
    st.binary(max_size=300), st.lists(st.one_of(_PIECES, st.binary(max_size=8)), max_size=24).map(b"".join)
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(_SENT, min_size=1, max_size=3), half_close=st.booleans())
def test_whatever_is_sent_ends_and_leaves_the_listener_well(
    told: Told, monkeypatch: pytest.MonkeyPatch, parts: list[bytes], half_close: bool
) -> None:
    monkeypatch.setattr(http_status, "CONNECTION_TIMEOUT_S", WAIT_S if half_close else 0.02)
    with connect(told) as client:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                client.sendall(part)
            if half_close:
                client.shutdown(socket.SHUT_WR)
        received = rest(client)
    assert received == b"" or received.startswith(b"HTTP/1.1 ")
    assert received.count(b"HTTP/1.1 ") <= 1
    monkeypatch.setattr(http_status, "CONNECTION_TIMEOUT_S", WAIT_S)
    assert request(told, "/livez")[:2] == (200, b"ok\n")
