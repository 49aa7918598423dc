"""Metrics and health over plain HTTP, for scrapers and supervisors of this host (WORKER-4810).

    GET /metrics   Prometheus' text format
    GET /livez     200: the event loop answers
    GET /readyz    200 while jobs are taken, else 503; the body is the state
    GET /healthz   200: JSON of the state, the model and the age of its last proof

Nothing here needs a token or tells a secret, and the listener is bound to loopback. It shares the worker's event loop:
one that hangs does not answer ``/livez``. Each connection carries one request, within a time and a size, and is closed;
when too many are open, the oldest makes room.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Protocol, cast

from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.telemetry.log import EventCode, get_logger, where
from orcd_jax.telemetry.metrics import CONTENT_TYPE

MAX_REQUEST_BYTES = 8192
MAX_CONNECTIONS = 32
CONNECTION_TIMEOUT_S = 5.0  # from the first byte to the last, in both directions
METRICS_FRESH_S = 0.25  # rendering takes milliseconds of the loop that streams tokens: scrapes in between share one

_REQUEST_LINE = re.compile(rb"([A-Z]{1,16}) (/[!-~]{0,255}) HTTP/1\.[01]\r\n")
_END_OF_HEAD = b"\r\n\r\n"
_TEXT = "text/plain; charset=utf-8"


class Metrics(Protocol):
    """What is scraped; ``telemetry.metrics.WorkerMetrics`` is one."""

    def exposition(self) -> bytes:
        """Everything, in Prometheus' text format."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthSnapshot:
    """How the worker is at this moment, from cached state.

    Attributes:
      state: the lifecycle's word, such as ``READY``.
      ready: whether jobs are taken.
      model: what is loaded; empty before.
      seal_age_s: since the last full digest of the weights on the device; None before the first.
    """

    state: str
    ready: bool
    model: str
    seal_age_s: float | None


@dataclass(frozen=True, slots=True)
class _Answer:
    status: HTTPStatus
    body: bytes
    content_type: str = _TEXT
    headers: tuple[str, ...] = ()


class HttpStatus:
    """Owns the listening socket and the open connections."""

    def __init__(self, metrics: Metrics, health: Callable[[], HealthSnapshot], clock: Callable[[], float]) -> None:
        """Answers from ``metrics`` and ``health``; ``start_http_status`` makes it listen."""
        self._metrics, self._health, self._clock = metrics, health, clock
        self._rendered, self._rendered_s = b"", float("-inf")
        self._paths: Mapping[bytes, Callable[[], _Answer]] = {
            b"/metrics": self._scrape,
            b"/livez": lambda: _Answer(HTTPStatus.OK, b"ok\n"),
            b"/readyz": self._readiness,
            b"/healthz": self._describe,
        }
        self._open: dict[_Connection, None] = {}  # oldest first
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        """The port it listens at; 0 when it does not."""
        sockets = () if self._server is None else self._server.sockets
        return int(sockets[0].getsockname()[1]) if sockets else 0

    async def _listen(self, host: str, port: int) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), host, port, backlog=2 * MAX_CONNECTIONS)

    def close(self) -> None:
        """Takes no more connections and cuts those there are."""
        if self._server is not None:
            self._server.close()
        for connection in tuple(self._open):
            connection.cut()

    async def wait_closed(self) -> None:
        """Returns when the socket is closed."""
        if self._server is not None:
            await self._server.wait_closed()

    def opened(self, connection: _Connection) -> None:
        """A client came; if there are too many, the one that came first has had its time."""
        self._open[connection] = None
        if len(self._open) > MAX_CONNECTIONS:
            oldest = next(iter(self._open))
            del self._open[oldest]
            oldest.cut()

    def closed(self, connection: _Connection) -> None:
        """A client left. Harmless when repeated."""
        self._open.pop(connection, None)

    def answer(self, request: bytes) -> bytes:
        """The whole response to one request's head."""
        line = _REQUEST_LINE.match(request)
        if line is None:
            return _response(_refusal(HTTPStatus.BAD_REQUEST))
        method, path = line.groups()
        if method not in (b"GET", b"HEAD"):
            return _response(_refusal(HTTPStatus.METHOD_NOT_ALLOWED, "Allow: GET, HEAD"))
        handler = self._paths.get(path)
        if handler is None:
            return _response(_refusal(HTTPStatus.NOT_FOUND), head_only=method == b"HEAD")
        try:
            answer = handler()
        except Exception as error:  # what it says may hold data: it stays here
            human = f"An internal error ({type(error).__name__}) in answering a health or metrics request."
            get_logger().error(EventCode.ERROR, human=human, code=ErrorCode.INTERNAL.value, where=where(error))
            answer = _refusal(HTTPStatus.INTERNAL_SERVER_ERROR)
        return _response(answer, head_only=method == b"HEAD")

    def _scrape(self) -> _Answer:
        now_s = self._clock()
        if now_s - self._rendered_s >= METRICS_FRESH_S:
            self._rendered, self._rendered_s = self._metrics.exposition(), now_s
        return _Answer(HTTPStatus.OK, self._rendered, CONTENT_TYPE)

    def _readiness(self) -> _Answer:
        now = self._health()
        return _Answer(HTTPStatus.OK if now.ready else HTTPStatus.SERVICE_UNAVAILABLE, f"{now.state}\n".encode())

    def _describe(self) -> _Answer:
        now = self._health()
        age_s = None if now.seal_age_s is None else round(now.seal_age_s, 3)
        told = {"state": now.state, "ready": now.ready, "model": now.model, "seal_age_s": age_s}
        return _Answer(HTTPStatus.OK, json.dumps(told).encode() + b"\n", "application/json")


class _Connection(asyncio.Protocol):
    """One client: reads one request, answers it, closes. Cut when it takes too long or sends too much."""

    def __init__(self, server: HttpStatus) -> None:
        self._server = server
        self._received = bytearray()
        self._discarded = 0
        self._answered = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # what create_server gives
        self._deadline = asyncio.get_running_loop().call_later(CONNECTION_TIMEOUT_S, self.cut)
        self._server.opened(self)

    def data_received(self, data: bytes) -> None:
        if self._answered:
            # A client that still sends would lose the answer if the socket were closed on it; but not for ever.
            self._discarded += len(data)
            if self._discarded > MAX_REQUEST_BYTES:
                self.cut()
            return
        self._received += data
        head, end, _ = self._received.partition(_END_OF_HEAD)
        if len(head) > MAX_REQUEST_BYTES:
            self._send(_response(_refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)))
        elif end:
            self._send(self._server.answer(bytes(head + end)))

    def eof_received(self) -> bool:
        if not self._answered and self._received:
            self._send(_response(_refusal(HTTPStatus.BAD_REQUEST)))
        return False  # closes, once what was written is sent

    def connection_lost(self, exc: BaseException | None) -> None:
        self._deadline.cancel()
        self._server.closed(self)

    def cut(self) -> None:
        """Ends the connection now."""
        self._transport.abort()

    def _send(self, response: bytes) -> None:
        self._answered = True
        self._received.clear()
        self._transport.write(response)
        self._transport.write_eof()  # the client closes, or the deadline does


async def start_http_status(
    metrics: Metrics,
    health: Callable[[], HealthSnapshot],
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    clock: Callable[[], float] | None = None,
) -> HttpStatus:
    """Starts to listen.

    Args:
      metrics: what ``/metrics`` tells.
      health: what the others tell; called for each request, on the loop, so it must answer from cached state.
      host: a loopback address.
      port: TCP port; 0 takes a free one.
      clock: monotonic seconds; the loop's by default.

    Returns:
      The listener: ``close()`` ends it, ``await wait_closed()`` sees it out.

    Raises:
      OrcdError: POLICY_VIOLATION, the address is not a loopback one.
      OSError: the address cannot be bound.
    """
    server = HttpStatus(metrics, health, clock or asyncio.get_running_loop().time)
    await server._listen(_loopback(host), port)
    return server


def _loopback(host: str) -> str:
    """The address, if nobody outside this host can reach it. A name is refused: it could mean any address."""
    try:
        if ipaddress.ip_address(host).is_loopback:
            return host
    except ValueError:
        pass
    raise OrcdError(
        ErrorCode.POLICY_VIOLATION,
        "metrics and health over HTTP need no token, so their address must be a loopback one: use 127.0.0.1 or ::1",
        field="host",
    )


def _refusal(status: HTTPStatus, *headers: str) -> _Answer:
    return _Answer(status, f"{status.phrase}\n".encode(), headers=headers)


def _response(answer: _Answer, *, head_only: bool = False) -> bytes:
    """The bytes of a response, after which the connection is closed."""
    lines = [
        f"HTTP/1.1 {answer.status.value} {answer.status.phrase}",
        f"Content-Type: {answer.content_type}",
        f"Content-Length: {len(answer.body)}",
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
        "Connection: close",
        *answer.headers,
    ]
    return "\r\n".join(lines).encode() + _END_OF_HEAD + (b"" if head_only else answer.body)
