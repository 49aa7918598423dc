"""What every call passes, whatever its method: authentication, bounded and strict input, errors as statuses.

The gate wraps whole services, so a method that is added later is behind it without anyone remembering.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

from grpclib.const import Cardinality, Handler, Status
from grpclib.exceptions import GRPCError
from grpclib.server import Stream
from grpclib.stream import StreamIterator
from h2.exceptions import StreamClosedError

from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.server.admission import EXECUTE, OPEN_METHODS, READY, AuthOutcome, Door, roles_for
from orcd_jax.server.auth import Access, Role
from orcd_jax.server.call import CORRELATION_ID, Call, Permit, correlation_id, current_call, enter, only
from orcd_jax.server.codec import MalformedMessage, StrictCodec
from orcd_jax.server.connection import CallStream
from orcd_jax.server.limits import Limits
from orcd_jax.server.places import Places, Refusal
from orcd_jax.server.status import grpc_error, internal_error, report_unexpected
from orcd_jax.telemetry.log import EventCode, get_logger

__all__ = ["Gate", "Service", "current_call", "internal_error", "report_unexpected"]

_PREFIX = struct.Struct(">BI")
_BUSY_RETRY_MS = 1000
_UNCOUNTED = contextlib.nullcontext()


class Service(Protocol):
    """A gRPC service as grpclib sees it."""

    def __mapping__(self) -> Mapping[str, Handler]:
        """Path to handler."""
        ...


class Gate(dict[str, Handler]):
    """Path to guarded handler, for every path there is: an unknown one is refused to strangers and UNIMPLEMENTED."""

    def __init__(
        self,
        services: Iterable[Service],
        access: Access,
        codec: StrictCodec,
        *,
        limits: Limits,
        open_ready: bool = False,
        on_auth: Callable[[AuthOutcome], None] | None = None,
    ) -> None:
        """Guards every method of ``services``."""
        super().__init__()
        self._door = Door(access, limits, on_auth, clock=time.monotonic)
        self._codec = codec
        self._limits = limits
        self._receiving = 0
        self._permits: dict[Permit, str] = {}  # of the calls that run by leave of a token, and which
        self._watches: set[asyncio.Timeout] = set()
        self._watchers = Places(limits.watches, limits.watches_per_peer)
        self._draining = False
        self._open = OPEN_METHODS | ({READY} if open_ready else set())
        for service in services:
            for path, handler in service.__mapping__().items():
                self[path] = self._guarded(handler, path, roles_for(path))
        nowhere = Handler(_unimplemented, Cardinality.STREAM_STREAM, None, None)
        self._unknown = self._guarded(nowhere, "unknown", frozenset(Role))

    def get(self, path: str, default: object = None) -> Handler:
        """The handler of a path; never ``default``."""
        del default
        return super().get(path, self._unknown)

    def _guarded(self, handler: Handler, path: str, roles: frozenset[Role]) -> Handler:
        async def guarded(stream: Stream[Any, Any]) -> None:
            source = cast("CallStream", stream._stream)
            trace = only(_metadata(stream, "traceparent"))
            call = Call("", source.deadline, correlation_id(_metadata(stream, CORRELATION_ID)), trace)
            enter(call)
            try:
                if path not in self._open:
                    self._authenticate(stream, path, roles, call)
                if source.problem is not None:
                    raise source.problem
                await self._in_time(handler, stream, is_watch=path in OPEN_METHODS and _streams(handler))
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

    def _authenticate(self, stream: Stream[Any, Any], path: str, roles: frozenset[Role], call: Call) -> None:
        """Lets the caller in, under its own identity, or raises."""
        peer = _address(stream)
        identity = self._door.admit(
            _metadata(stream, "authorization"),
            roles,
            method=path,
            peer=peer,
            standing=cast("CallStream", stream._stream).standing,
            correlation_id=call.correlation_id,
        )
        enter(replace(call, fingerprint=identity.fingerprint))
        method = path.rpartition("/")[2]
        weighty = path == EXECUTE or roles == {Role.CONTROL}
        log = get_logger().info if weighty else get_logger().debug
        log(
            EventCode.REQUEST,
            human=f"The holder of token {identity.fingerprint} calls {method}.",
            method=method,
            peer=peer,
        )

    async def _in_time(self, handler: Handler, stream: Stream[Any, Any], *, is_watch: bool) -> None:
        """Answers a call before its deadline, and while its token is valid."""
        call = current_call()
        left = None if call.deadline is None else call.deadline.time_remaining()
        if left is not None and left <= 0:
            raise OrcdError(ErrorCode.TIMEOUT, "the call's deadline had passed when it arrived")
        try:
            async with asyncio.timeout(left) as timer:
                with self._permitted(call, timer), self._watching(stream, timer) if is_watch else _UNCOUNTED:
                    await handler.func(_GuardedStream(stream, handler, self, known=bool(call.fingerprint)))
        except TimeoutError:
            if not timer.expired():
                raise
            call.permit.check()
            if is_watch and self._draining:
                raise OrcdError(ErrorCode.NOT_READY, "the worker ends: nothing more is to be seen here") from None
            raise OrcdError(ErrorCode.TIMEOUT, "the call's deadline has passed") from None

    def end_watches(self) -> None:
        """Ends the calls that would never end by themselves."""
        self._draining = True
        for timer in self._watches:
            if not timer.expired():
                timer.reschedule(asyncio.get_running_loop().time())

    def revoke(self, fingerprints: Container[str]) -> int:
        """Ends the calls that run by leave of these tokens, with AUTH_FAILED; how many."""
        gone = [permit for permit, fingerprint in self._permits.items() if fingerprint in fingerprints]
        for permit in gone:
            permit.revoke()
        return len(gone)

    @contextlib.contextmanager
    def _permitted(self, call: Call, timer: asyncio.Timeout) -> Iterator[None]:
        """Notes by leave of which token a call runs, until it ends."""
        call.permit.time(timer)
        self._permits[call.permit] = call.fingerprint
        try:
            yield
        finally:
            del self._permits[call.permit]

    @contextlib.contextmanager
    def _watching(self, stream: Stream[Any, Any], timer: asyncio.Timeout) -> Iterator[None]:
        """Counts a call that needs no token and does not end."""
        address, places = _address(stream), self._watchers
        if (refusal := places.take(address)) is not None:
            of, most = ("all", places.most) if refusal is Refusal.FULL else ("this address", places.most_of_peer)
            problem = f"{most} watches of {of} are open, as many as may be: use Check, or end one"
            raise OrcdError(ErrorCode.BUSY, problem, retry_after_ms=_BUSY_RETRY_MS)
        self._watches.add(timer)
        try:
            yield
        finally:
            self._watches.discard(timer)
            places.leave(address)

    @contextlib.contextmanager
    def receiving(self, size: int, *, known: bool) -> Iterator[None]:
        """Counts the bytes of a message while they arrive.

        Args:
          size: of the message.
          known: whether the call has a token.

        Raises:
          OrcdError: INVALID_PARAMS: it is too large. BUSY: too much arrives at once.
        """
        limits = self._limits
        most = limits.message_bytes if known else limits.open_message_bytes
        if size > most:
            raise _malformed(f"the message has {size} bytes; the limit is {most}")
        if self._receiving + size > limits.receiving_bytes:
            problem = f"messages of {limits.receiving_bytes} bytes are being received already: try again"
            raise OrcdError(ErrorCode.BUSY, problem, retry_after_ms=_BUSY_RETRY_MS)
        self._receiving += size
        try:
            yield
        finally:
            self._receiving -= size


class _GuardedStream(StreamIterator[Any]):
    """The part of a grpclib stream that handlers use, with bounds on what comes in and on how long anything takes."""

    def __init__(self, stream: Stream[Any, Any], handler: Handler, gate: Gate, *, known: bool) -> None:
        self._inner = stream
        self._handler = handler
        self._gate = gate
        self._known = known

    async def recv_message(self) -> Any:
        """The next message, or None after the last.

        Raises:
          OrcdError: INVALID_PARAMS, when it is too large, cut off or malformed. TIMEOUT, when it does not arrive.
        """
        seconds = self._gate._limits.request_s
        try:
            async with asyncio.timeout(seconds):
                data = await self._receive()
        except TimeoutError:
            raise OrcdError(ErrorCode.TIMEOUT, f"no whole message arrived within {seconds:g} s") from None
        except AssertionError:  # grpclib's word for a stream that ended within a message
            raise _malformed("the message is cut off") from None
        try:
            return None if data is None else self._gate._codec.decode(data, self._handler.request_type)
        except MalformedMessage:
            raise _malformed("the message is not what this method takes: malformed protobuf") from None

    async def _receive(self) -> bytes | None:
        # grpclib believes the length in the prefix; so the prefix is read here, and refused before the body is.
        source = self._inner._stream
        prefix = await source.recv_data(_PREFIX.size)
        if not prefix:
            if self._handler.cardinality.client_streaming:
                return None
            raise _malformed("the call holds no message")
        compressed, size = _PREFIX.unpack(prefix)
        if compressed:
            raise GRPCError(Status.UNIMPLEMENTED, "compressed messages are not accepted: send them as they are")
        with self._gate.receiving(size, known=self._known):
            data = await source.recv_data(size)
        if len(data) != size:
            raise _malformed("the message is cut off")
        return data

    async def send_message(self, message: object) -> None:
        """Sends a message.

        Raises:
          OrcdError: TIMEOUT, when the client does not read.
        """
        seconds = self._gate._limits.send_s
        try:
            async with asyncio.timeout(seconds):
                await self._inner.send_message(message)
        except TimeoutError:
            raise OrcdError(ErrorCode.TIMEOUT, f"the client read nothing for {seconds:g} s; the call is over") from None

    async def send_trailing_metadata(self, *, status: Status) -> None:
        """Ends the call with a status."""
        await self._inner.send_trailing_metadata(status=status)


def _streams(handler: Handler) -> bool:
    return bool(handler.cardinality.server_streaming)


def _metadata(stream: Stream[Any, Any], name: str) -> Sequence[object]:
    return [] if stream.metadata is None else stream.metadata.getall(name, [])


def _address(stream: Stream[Any, Any]) -> str:
    """Of the client, without its port; empty when it is gone already."""
    address = stream.peer.addr()
    return address[0] if address else ""


def _malformed(message: str) -> OrcdError:
    return OrcdError(ErrorCode.INVALID_PARAMS, message)


async def _unimplemented(stream: object) -> None:
    del stream
    raise GRPCError(Status.UNIMPLEMENTED, "there is no such method")
