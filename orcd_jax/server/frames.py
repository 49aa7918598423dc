"""What a client sends, cut into HTTP/2 frames before anything else looks at it, and counted."""

from __future__ import annotations

import struct
from collections.abc import Container

from h2.errors import ErrorCodes

from orcd_jax.server.limits import Limits, TokenBucket

_PREFACE_BYTES = 24
_FRAME_HEAD = struct.Struct(">BHBBL")
_MAX_FRAME_BYTES = 16_384  # what a client may send when it was told nothing else
_END_HEADERS = 0x4
_DATA, _HEADERS, RST_STREAM, _SETTINGS, _CONTINUATION = 0, 1, 3, 4, 9
_KINDS = ("DATA", "HEADERS", "PRIORITY", "RST_STREAM", "SETTINGS", "PUSH_PROMISE", "PING", "GOAWAY", "WINDOW_UPDATE")
# A DATA frame of fewer bytes carries so little that it counts like an empty one.
_SMALL_DATA_BYTES = 256
# What a frame takes of the budget; 1 where nothing is said. Streams are bounded otherwise; to reset one throws the
# work on a call away; settings change every stream and are sent once or twice in a connection's life.
FRAME_COST = {_HEADERS: 0, RST_STREAM: 8, _SETTINGS: 20}
# A call of a client that never had a valid token takes 0.5 ms of the event loop, and has nothing to lose.
STRANGERS_CALL_COST = 20


def goaway(last_stream: int, code: ErrorCodes, why: str = "") -> bytes:
    """The frame that tells a client to come no more. h2 would take no further frame of a call after its own."""
    text = why.encode()
    return _FRAME_HEAD.pack(0, 8 + len(text), 7, 0, 0) + struct.pack(">LL", last_stream, code) + text


class Misbehaved(Exception):
    """A client sent what no client needs; the connection ends with ``code``."""

    def __init__(self, code: ErrorCodes, why: str) -> None:
        super().__init__(why)
        self.code, self.why = code, why


class Frames:
    """What a client sent, cut into frames. Owns the bytes of the one that is not complete, and the budget.

    Attributes:
      streams: those that have a call; set by the connection.
    """

    def __init__(self, limits: Limits) -> None:
        """Nothing has been sent."""
        self.limits = limits
        self.streams: Container[int] = ()
        self._data = bytearray()
        self._preface_left = _PREFACE_BYTES
        self._header_block: int | None = None
        self._budget = TokenBucket(limits.frame_burst, limits.frame_rate, limits.frame_credit)

    def add(self, data: bytes) -> None:
        """Takes what arrived."""
        self._data += data

    def take(self) -> bytes:
        """The next whole frame (or a part of the preface); empty when there is none yet.

        Raises:
          Misbehaved: it is too long, or one too many of its kind.
        """
        if self._preface_left:
            part = self._cut(min(self._preface_left, len(self._data)))
            self._preface_left -= len(part)
            return part
        if len(self._data) < _FRAME_HEAD.size:
            return b""
        high, low, kind, flags, stream = _FRAME_HEAD.unpack_from(self._data)
        size = high << 16 | low
        if size > _MAX_FRAME_BYTES:
            raise Misbehaved(ErrorCodes.FRAME_SIZE_ERROR, f"a frame of {size} bytes; the limit is {_MAX_FRAME_BYTES}")
        if kind in (_HEADERS, _CONTINUATION):
            self._check_headers(size)
        if len(self._data) < _FRAME_HEAD.size + size:
            return b""
        if kind in (_HEADERS, _CONTINUATION):
            self._header_block = None if flags & _END_HEADERS else (self._header_block or 0) + size
        if kind != _DATA or size < _SMALL_DATA_BYTES or stream not in self.streams:  # windows bound the others
            self.charge(kind)
        return self._cut(_FRAME_HEAD.size + size)

    def charge(self, kind: int) -> None:
        """Counts a frame of a kind against the budget.

        Raises:
          Misbehaved: it is one too many.
        """
        if not self._budget.spend(FRAME_COST.get(kind, 1)):
            name = _KINDS[kind] if kind < len(_KINDS) else "CONTINUATION" if kind == _CONTINUATION else "unknown"
            raise Misbehaved(ErrorCodes.ENHANCE_YOUR_CALM, f"too many {name} frames")

    def charge_stranger(self) -> None:
        """Counts a call of a client without a valid token. Raises Misbehaved when it is one too many."""
        if not self._budget.spend(STRANGERS_CALL_COST):
            raise Misbehaved(ErrorCodes.ENHANCE_YOUR_CALM, "too many calls without a valid token")

    def earn(self, amount: float) -> None:
        """Gives the client so many frames more, with which it takes what it was sent."""
        self._budget.earn(amount)

    def _check_headers(self, size: int) -> None:
        limit = 2 * self.limits.header_bytes  # the code for text makes rare characters longer
        if (size := (self._header_block or 0) + size) > limit:
            raise Misbehaved(ErrorCodes.ENHANCE_YOUR_CALM, f"headers of {size} bytes and more; the limit is {limit}")

    def _cut(self, size: int) -> bytes:
        frame = bytes(self._data[:size])
        del self._data[:size]
        return frame
