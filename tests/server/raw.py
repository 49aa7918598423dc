"""HTTP/2 by hand: calls and frames that no well-behaved client makes."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Self

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    DataReceived,
    Event,
    PingAckReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.settings import SettingCodes

from tests.server.fake_worker import WAIT_S
from tests.server.peer import SERVICE, Metadata, bearer_for

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 2, 3, 4, 6, 7, 8, 9
END_STREAM, END_HEADERS = 1, 4


def framed(body: bytes, *, flag: int = 0, size: int | None = None) -> bytes:
    """A message with its 5-byte prefix; ``size``: what the prefix says instead of the truth."""
    return struct.pack(">BI", flag, len(body) if size is None else size) + body


def frame(kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0, size: int | None = None) -> bytes:
    """An HTTP/2 frame; ``size``: what its head says instead of the truth."""
    length = len(payload) if size is None else size
    return length.to_bytes(3, "big") + struct.pack(">BBL", kind, flags, stream) + payload


PING_FRAME = frame(PING, b"8 bytes.")
ROOM_FOR_ONE = struct.pack(">L", 1)


def call_headers(method: str, *, timeout: str | None = None, metadata: Iterable[tuple[str, str]] = ()) -> Metadata:
    """The headers of a call."""
    return [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", f"/{SERVICE.full_name}/{method}"),
        (":authority", "localhost"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        *([] if timeout is None else [("grpc-timeout", timeout)]),
        *metadata,
    ]


@dataclass(slots=True)
class Answer:
    """What came back on a stream, headers and trailers together."""

    headers: dict[str, str] = field(default_factory=dict)
    data: bytes = b""
    ended: bool = False
    reset: int | None = None

    @property
    def status(self) -> int:
        """The gRPC status."""
        return int(self.headers["grpc-status"])

    @property
    def said(self) -> str:
        """The status's message."""
        return self.headers.get("grpc-message", "")


@dataclass(frozen=True, slots=True)
class Goaway:
    """That the server takes no more calls on this connection."""

    last_stream: int
    code: int
    why: str


class Raw:
    """A connection. Gives the server no more room to send than ``window``.

    Attributes:
      h2: our half of it.
      answers: what came back, by stream.
      goaway: the last one that the server sent.
      closed: whether the server closed the connection.
      pings: how many of our pings it has answered.
    """

    def __init__(self, port: int, *, window: int | None = None, greet: bool = True, source: str = "127.0.0.1") -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), WAIT_S, source_address=(source, 0))
        # What it sends may be anything: h2 must not correct it.
        self.h2 = H2Connection(
            H2Configuration(
                client_side=True,
                header_encoding="ascii",
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self.answers: defaultdict[int, Answer] = defaultdict(Answer)
        self.goaway: Goaway | None = None
        self.closed = False
        self.pings = 0
        self._unread = b""
        self._greeted = greet  # else it answers nothing either
        if greet:
            self.h2.initiate_connection()
            if window is not None:
                self.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: window})
                self.h2.increment_flow_control_window(window)
            self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(
        self,
        method: str,
        *,
        timeout: str | None = None,
        metadata: Metadata | None = None,
        stream: int = 1,
        end: bool = False,
    ) -> None:
        """Sends the headers of a call."""
        given = bearer_for(method) if metadata is None else metadata
        self.h2.send_headers(stream, call_headers(method, timeout=timeout, metadata=given), end_stream=end)
        self.flush()

    def headers(self, method: str, *, stream: int, end: bool = False) -> bytes:
        """The HEADERS frame of a call, for who sends it."""
        return self.any_headers(call_headers(method, metadata=bearer_for(method)), stream=stream, end=end)

    def any_headers(
        self, headers: Iterable[tuple[str, str] | tuple[bytes, bytes]], *, stream: int = 1, end: bool = False
    ) -> bytes:
        """A HEADERS frame of whatever it is, for who sends it."""
        self.h2.send_headers(stream, list(headers), end_stream=end)
        return self.h2.data_to_send()

    def send(self, data: bytes = b"", *, end: bool = False, stream: int = 1) -> None:
        """Sends a DATA frame."""
        self.h2.send_data(stream, data, end_stream=end)
        self.flush()

    def ask(self, method: str, message: bytes = b"", *, stream: int = 1, metadata: Metadata | None = None) -> None:
        """Sends a whole call."""
        self.call(method, stream=stream, metadata=metadata)
        self.send(framed(message), end=True, stream=stream)

    def reset(self, stream: int = 1) -> None:
        """Sends RST_STREAM."""
        self.h2.reset_stream(stream, ErrorCodes.CANCEL)
        self.flush()

    def write(self, data: bytes) -> bool:
        """Sends bytes past h2; False when the server has closed the connection."""
        try:
            self._socket.sendall(data)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Drops the connection."""
        self._socket.close()

    def answer(self, stream: int = 1) -> Answer:
        """Reads until the stream or the connection ends; never gives the server more room."""
        answer = self.answers[stream]
        self.read_until(lambda: answer.ended or answer.reset is not None)
        return answer

    def read_to_the_end(self) -> Goaway | None:
        """Reads until the server closes the connection; why it said it does."""
        self.read_until(lambda: False)
        return self.goaway

    def read_until(self, done: Callable[[], bool]) -> None:
        """Reads until ``done``, or the connection ends."""
        while not done() and not self.closed:
            try:
                received = self._socket.recv(65536)
            except ConnectionResetError:
                received = b""
            if not received:
                self.closed = True
                return
            for kind, whole in self._frames(received):
                if kind == GOAWAY:  # h2 would read nothing after it
                    last, code = struct.unpack(">LL", whole[9:17])
                    self.goaway = Goaway(last, code, whole[17:].decode())
                    continue
                for event in self.h2.receive_data(whole):
                    self._note(event)
            if self._greeted:
                with contextlib.suppress(OSError):
                    self.flush()

    def _frames(self, received: bytes) -> Iterator[tuple[int, bytes]]:
        """Kind and bytes of each frame that is complete."""
        self._unread += received
        while len(self._unread) >= 9 and len(self._unread) >= (end := 9 + int.from_bytes(self._unread[:3], "big")):
            whole, self._unread = self._unread[:end], self._unread[end:]
            yield whole[3], whole

    def _note(self, event: Event) -> None:
        if isinstance(event, ResponseReceived | TrailersReceived):
            self.answers[event.stream_id].headers.update(dict(event.headers))  # type: ignore[arg-type]  # decoded
        elif isinstance(event, DataReceived):
            self.answers[event.stream_id].data += event.data
        elif isinstance(event, StreamEnded):
            self.answers[event.stream_id].ended = True
        elif isinstance(event, StreamReset):
            self.answers[event.stream_id].reset = event.error_code
        elif isinstance(event, PingAckReceived):
            self.pings += 1

    def flush(self) -> None:
        """Sends what h2 has to say."""
        self._socket.sendall(self.h2.data_to_send())
