"""What every call passes, whatever its method: authentication, bounded and strict input, errors as statuses.

The gate wraps whole services, so a method that is added later is behind it without anyone remembering.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from grpclib.const import Cardinality, Handler, Status
from grpclib.exceptions import GRPCError
from grpclib.metadata import Deadline
from grpclib.server import Stream
from grpclib.stream import StreamIterator
from h2.exceptions import StreamClosedError

from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.server.auth import Tokens
from orcd_jax.server.codec import MalformedMessage, StrictCodec
from orcd_jax.server.status import grpc_error
from orcd_jax.telemetry.log import EventCode, get_logger, where

MAX_MESSAGE_BYTES = 4 * 2**20
# A client that stops reading would hold its job's slot for ever: HTTP/2 has no write timeout.
SEND_TIMEOUT_S = 30.0

# Supervisors probe liveness before they have a token. Nothing else is open.
OPEN_METHODS = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"})

_PREFIX = struct.Struct(">BI")


class Service(Protocol):
    """A gRPC service as grpclib sees it."""

    def __mapping__(self) -> Mapping[str, Handler]:
        """Path to handler."""
        ...


@dataclass(frozen=True, slots=True)
class Call:
    """Who calls, and until when.

    Attributes:
      fingerprint: of the token; empty for the open methods.
      deadline: the call's own, from the client's timeout.
    """

    fingerprint: str
    deadline: Deadline | None

    def owner(self, tenant: str) -> str:
        """The identity that a job belongs to."""
        return f"{self.fingerprint}/{tenant}"

    def remaining_ms(self) -> int | None:
        """Milliseconds until the deadline, at least 1; None without one."""
        return None if self.deadline is None else max(1, int(self.deadline.time_remaining() * 1e3))


_CALL: ContextVar[Call] = ContextVar("call")


def current_call() -> Call:
    """The call that the running handler answers."""
    return _CALL.get()


class Gate(dict[str, Handler]):
    """Path to guarded handler, for every path there is: an unknown one is refused to strangers and UNIMPLEMENTED."""

    def __init__(self, services: Iterable[Service], tokens: Tokens, codec: StrictCodec) -> None:
        """Guards every method of ``services``."""
        super().__init__()
        self._tokens = tokens
        self._codec = codec
        for service in services:
            for path, handler in service.__mapping__().items():
                self[path] = self._guarded(handler, is_open=path in OPEN_METHODS)
        nowhere = Handler(_unimplemented, Cardinality.STREAM_STREAM, None, None)
        self._unknown = self._guarded(nowhere, is_open=False)

    def get(self, path: str, default: object = None) -> Handler:
        """The handler of a path; never ``default``."""
        del default
        return super().get(path, self._unknown)

    def _guarded(self, handler: Handler, *, is_open: bool) -> Handler:
        async def guarded(stream: Stream[Any, Any]) -> None:
            try:
                fingerprint = "" if is_open else self._tokens.authenticate(_authorization(stream))
                # A call is a task of its own, so nothing resets this.
                _CALL.set(Call(fingerprint, stream.deadline))
                await handler.func(_GuardedStream(stream, handler, self._codec))
            except GRPCError:
                raise
            except OrcdError as error:
                raise grpc_error(error) from None
            except StreamClosedError:
                raise GRPCError(Status.CANCELLED, "the client closed the call") from None
            except Exception as error:  # what it says may hold a caller's data: it stays here
                report_unexpected(error)
                raise grpc_error(internal_error()) from None

        return handler._replace(func=guarded)


class _GuardedStream(StreamIterator[Any]):
    """The part of a grpclib stream that handlers use, with bounds on what comes in and on how long sending takes."""

    def __init__(self, stream: Stream[Any, Any], handler: Handler, codec: StrictCodec) -> None:
        self._inner = stream
        self._handler = handler
        self._codec = codec

    async def recv_message(self) -> Any:
        """The next message, or None after the last.

        Raises:
          OrcdError: INVALID_PARAMS, when it is too large, cut off or malformed.
        """
        # grpclib believes the length in the prefix; so the prefix is read here, and refused before the body is.
        source = self._inner._stream
        try:
            prefix = await source.recv_data(_PREFIX.size)
            if not prefix:
                if self._handler.cardinality.client_streaming:
                    return None
                raise _malformed("the call holds no message")
            compressed, size = _PREFIX.unpack(prefix)
            if compressed:
                raise GRPCError(Status.UNIMPLEMENTED, "compressed messages are not accepted: send them as they are")
            if size > MAX_MESSAGE_BYTES:
                raise _malformed(f"the message has {size} bytes; the limit is {MAX_MESSAGE_BYTES}")
            data = await source.recv_data(size)
        except AssertionError:  # grpclib's word for a stream that ended within a message
            raise _malformed("the message is cut off") from None
        if len(data) != size:
            raise _malformed("the message is cut off")
        try:
            return self._codec.decode(data, self._handler.request_type)
        except MalformedMessage:
            raise _malformed("the message is not what this method takes: malformed protobuf") from None

    async def send_message(self, message: object) -> None:
        """Sends a message.

        Raises:
          OrcdError: TIMEOUT, when the client does not read.
        """
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await self._inner.send_message(message)
        except TimeoutError:
            raise OrcdError(
                ErrorCode.TIMEOUT, f"the client read nothing for {SEND_TIMEOUT_S:g} s; the call is over"
            ) from None

    async def send_trailing_metadata(self, *, status: Status) -> None:
        """Ends the call with a status."""
        await self._inner.send_trailing_metadata(status=status)


def internal_error() -> OrcdError:
    """All that a caller learns of a bug."""
    return OrcdError(ErrorCode.INTERNAL, "internal error")


def report_unexpected(error: Exception) -> None:
    """Logs a bug: where, but not what, for an exception's own text may hold data."""
    human = f"An internal error ({type(error).__name__}) ended a call: please report it with this line."
    get_logger().error(EventCode.ERROR, human=human, code=ErrorCode.INTERNAL.value, where=where(error))


def _authorization(stream: Stream[Any, Any]) -> Sequence[object]:
    return [] if stream.metadata is None else stream.metadata.getall("authorization", [])


def _malformed(message: str) -> OrcdError:
    return OrcdError(ErrorCode.INVALID_PARAMS, message)


async def _unimplemented(stream: object) -> None:
    del stream
    raise GRPCError(Status.UNIMPLEMENTED, "there is no such method")
