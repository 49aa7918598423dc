"""HTTP/2 by hand: calls that no well-behaved client makes."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field
from typing import Self

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.settings import SettingCodes

from tests.server.fake_worker import WAIT_S
from tests.server.peer import SERVICE, Metadata, bearer


def framed(body: bytes, *, flag: int = 0, size: int | None = None) -> bytes:
    """A message with its 5-byte prefix; ``size``: what the prefix says instead of the truth."""
    return struct.pack(">BI", flag, len(body) if size is None else size) + body


@dataclass(slots=True)
class Answer:
    """What came back on a stream, headers and trailers together."""

    headers: dict[str, str] = field(default_factory=dict)
    data: bytes = b""
    ended: bool = False
    reset: bool = False

    @property
    def status(self) -> int:
        """The gRPC status."""
        return int(self.headers["grpc-status"])

    @property
    def said(self) -> str:
        """The status's message."""
        return self.headers.get("grpc-message", "")


class Raw:
    """A connection with one call on it. Gives the server no more room to send than ``window``."""

    def __init__(self, port: int, *, window: int | None = None) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)
        self._h2 = H2Connection(H2Configuration(client_side=True, header_encoding="ascii"))
        self._h2.initiate_connection()
        if window is not None:
            self._h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: window})
            self._h2.increment_flow_control_window(window)
        self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, method: str, *, timeout: str | None = None, metadata: Metadata | None = None) -> None:
        """Sends the headers of a call."""
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", f"/{SERVICE.full_name}/{method}"),
            (":authority", "localhost"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            *([] if timeout is None else [("grpc-timeout", timeout)]),
            *(bearer() if metadata is None else metadata),
        ]
        self._h2.send_headers(1, headers)
        self._flush()

    def send(self, data: bytes = b"", *, end: bool = False) -> None:
        """Sends a DATA frame."""
        self._h2.send_data(1, data, end_stream=end)
        self._flush()

    def reset(self) -> None:
        """Sends RST_STREAM."""
        self._h2.reset_stream(1, ErrorCodes.CANCEL)
        self._flush()

    def close(self) -> None:
        """Drops the connection."""
        self._socket.close()

    def answer(self) -> Answer:
        """Reads until the stream or the connection ends; never gives the server more room."""
        answer = Answer()
        while not (answer.ended or answer.reset):
            try:
                received = self._socket.recv(65536)
            except ConnectionResetError:
                break
            if not received:
                break
            for event in self._h2.receive_data(received):
                self._note(answer, event)
        return answer

    @staticmethod
    def _note(answer: Answer, event: Event) -> None:
        if isinstance(event, ResponseReceived | TrailersReceived):
            answer.headers.update(dict(event.headers))  # type: ignore[arg-type]  # header_encoding makes them text
        elif isinstance(event, DataReceived):
            answer.data += event.data
        elif isinstance(event, StreamEnded):
            answer.ended = True
        elif isinstance(event, StreamReset | ConnectionTerminated):
            answer.reset = True

    def _flush(self) -> None:
        self._socket.sendall(self._h2.data_to_send())
