"""A connection to one worker, and every way in which a call over it can fail."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from types import TracebackType
from typing import Self, cast

import betterproto2
from grpclib.client import Channel, Handler
from grpclib.config import Configuration
from grpclib.const import Status
from grpclib.encoding.base import StatusDetailsCodecBase
from grpclib.encoding.proto import ProtoCodec
from grpclib.exceptions import GRPCError, StreamTerminatedError
from grpclib.metadata import Deadline
from grpclib.protocol import AbstractHandler, H2Protocol
from h2.config import H2Configuration

from orcd_jax.api.google import rpc
from orcd_jax.api.orcd.worker import v1
from orcd_jax.cli import tls
from orcd_jax.cli.arguments import Target
from orcd_jax.errors import ErrorCode, ExitCode

CONNECT_TIMEOUT_S = 5.0
# Ready and GetStatus are answered from memory, Plan from a manifest.
ANSWER_TIMEOUT_S = 10.0
# An attestation reads all weights.
PROOF_TIMEOUT_S = 120.0
CLOSE_TIMEOUT_S = 1.0
# A job may be silent for long; a worker that does not even answer HTTP/2's ping for this long is gone.
PING_EVERY_S = 10.0
PING_TIMEOUT_S = 20.0

# Without an ErrorDetail: of a proxy, of another service, or of another protocol on HTTP/2.
_NOT_OF_A_WORKER = (Status.UNKNOWN, Status.UNIMPLEMENTED, Status.UNAVAILABLE)
_SETTINGS_FRAME = 4
_ERROR_DETAIL = "/orcd.worker.v1.ErrorDetail"


class CallFailed(Exception):
    """A call that was refused, failed or never reached a worker, as it is told to a person or a program."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        retriable: bool = False,
        retry_after_ms: int | None = None,
        field: str = "",
        exit_code: ExitCode = ExitCode.FAILED,
    ) -> None:
        """Takes the fields of an ErrorDetail, and the exit code they mean."""
        super().__init__(message)
        self.code = code
        self.message = message
        self.retriable = retriable
        self.retry_after_ms = retry_after_ms
        self.field = field
        self.exit_code = exit_code


def failed(detail: v1.ErrorDetail) -> CallFailed:
    """The failure that a worker describes."""
    refused = detail.code == v1.ErrorCode.AUTH_FAILED
    return CallFailed(
        detail.code.name or v1.ErrorCode.UNSPECIFIED.name,
        detail.message,
        retriable=detail.retriable,
        retry_after_ms=detail.retry_after_ms,
        field=detail.field,
        exit_code=ExitCode.UNAUTHENTICATED if refused else ExitCode.FAILED,
    )


class Connection:
    """Owns one HTTP/2 connection to a worker.

    async with Connection(target) as worker:
        print((await worker.ready()).ready)

    All methods raise CallFailed and nothing else.
    """

    def __init__(self, target: Target) -> None:
        """Nothing is sent before ``async with``; must be made on the event loop."""
        self._target = target
        self._channel = _Channel(
            target.address.host,  # with TLS also the name that the certificate must have
            target.address.port,
            ssl=target.tls,
            codec=ProtoCodec(),
            status_details_codec=_Details(),
            config=Configuration(
                _keepalive_time=PING_EVERY_S,
                _keepalive_timeout=PING_TIMEOUT_S,
                _http2_max_pings_without_data=0,  # no end to them: the client of a stream sends no data
                _http2_min_sent_ping_interval_without_data=PING_EVERY_S / 2,
            ),
        )
        self._stub = v1.WorkerStub(self._channel, metadata={"authorization": f"Bearer {target.token}"})

    async def __aenter__(self) -> Self:
        try:
            await self._connect()
        except BaseException:
            await self._channel.end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._channel.end()

    async def ready(self) -> v1.ReadyResponse:
        """Whether jobs are taken."""
        with self._failures():
            return await self._stub.ready(v1.ReadyRequest(), timeout=ANSWER_TIMEOUT_S)

    async def status(self) -> v1.GetStatusResponse:
        """How the worker is."""
        with self._failures():
            return await self._stub.get_status(v1.GetStatusRequest(), timeout=ANSWER_TIMEOUT_S)

    async def plan(self, request: v1.PlanRequest) -> v1.PlanResponse:
        """Whether a model would load."""
        with self._failures():
            return await self._stub.plan(request, timeout=ANSWER_TIMEOUT_S)

    async def attest(self, request: v1.AttestRequest) -> v1.AttestResponse:
        """A signed proof of the weights, made now: as long as it takes to read them all."""
        with self._failures(answer_s=PROOF_TIMEOUT_S):
            return await self._stub.attest(request, timeout=PROOF_TIMEOUT_S)

    async def commit(self, request: v1.CommitRequest) -> AsyncGenerator[v1.CommitEvent, None]:
        """Has a model loaded. Closing the generator only stops watching."""
        with self._failures():
            calls = cast("AsyncGenerator[v1.CommitEvent, None]", self._stub.commit(request))
            async with aclosing(calls) as events:
                async for event in events:
                    yield event

    async def execute(
        self, request: v1.ExecuteRequest, timeout_s: float | None
    ) -> AsyncGenerator[v1.ExecuteEvent, None]:
        """Runs one job. Closing the generator resets the stream, which cancels the job."""
        deadline = None if timeout_s is None else Deadline.from_timeout(timeout_s)
        with self._failures(timeout_s):
            # grpclib resets the stream when the generator of the stub ends early, so it must end here and now.
            calls = cast("AsyncGenerator[v1.ExecuteEvent, None]", self._stub.execute(request, deadline=deadline))
            async with aclosing(calls) as events:
                async for event in events:
                    yield event

    async def _connect(self) -> None:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                speaks_http2 = await self._channel.greeted()
        except TimeoutError:
            raise self._unreachable(f"there is no answer within {CONNECT_TIMEOUT_S:g} s") from None
        except ssl.SSLError as error:
            raise self._unreachable(tls.reason(error), advice="", retriable=False) from None
        except OSError as error:
            raise self._unreachable(_reason(error)) from None
        if not speaks_http2:
            raise self._unreachable(
                "what answers there does not speak gRPC, or only over TLS (see --tls_ca_file)"
                if self._target.tls is None
                else f"it ends the connection after the TLS handshake; is it a worker, then {tls.WANTS_CERTIFICATE}"
            )

    @contextmanager
    def _failures(self, timeout_s: float | None = None, answer_s: float | None = None) -> Iterator[None]:
        """Every failure of a call as CallFailed.

        Args:
          timeout_s: the caller's own limit, if there is one.
          answer_s: else the longest that an answer may take; None: ANSWER_TIMEOUT_S.
        """
        try:
            yield
        except GRPCError as error:
            raise self._refused(error, timeout_s) from None
        except StreamTerminatedError as error:
            raise self._unreachable(f"the connection broke off ({error})") from None
        except TimeoutError:
            if timeout_s is None:
                raise self._unreachable(f"there is no answer within {answer_s or ANSWER_TIMEOUT_S:g} s") from None
            raise _too_late(timeout_s) from None
        except OSError as error:
            raise self._unreachable(_reason(error)) from None
        except Exception as error:  # messages that are none, and what grpclib asserts of an honest server
            raise self._unreachable(f"what answers there is no orcd worker ({type(error).__name__})") from None

    def _refused(self, error: GRPCError, timeout_s: float | None) -> CallFailed:
        if isinstance(error.details, v1.ErrorDetail):
            return failed(error.details)
        message = error.message or "the worker gave no reason"
        if error.status is Status.UNAUTHENTICATED:
            return CallFailed(ErrorCode.AUTH_FAILED.value, message, exit_code=ExitCode.UNAUTHENTICATED)
        if error.status is Status.DEADLINE_EXCEEDED and timeout_s is not None:  # by the server's library, as by ours
            return _too_late(timeout_s)
        if error.status in _NOT_OF_A_WORKER:
            return self._unreachable(f"what answers there is no orcd worker ({error.status.name}: {message})")
        return CallFailed(error.status.name, message)

    def _unreachable(
        self, why: str, *, advice: str = "; check --address and that the worker runs", retriable: bool = True
    ) -> CallFailed:
        return CallFailed(
            ExitCode.UNREACHABLE.name,
            f"no worker answers at {self._target.address}: {why}{advice}",
            retriable=retriable,
            exit_code=ExitCode.UNREACHABLE,
        )


class _Channel(Channel):
    """Makes one connection, and notes how it was greeted. grpclib would make another, unproved, when that one ends."""

    _made: _Protocol | None = None

    async def greeted(self) -> bool:
        """Connects; whether the other side speaks HTTP/2.

        Raises:
          OSError: there is no connection, or TLS refused it.
        """
        await self.__connect__()
        if self._made is None:
            return False
        greeted = await self._made.greeted
        if self._made.refused is not None:
            raise self._made.refused
        return greeted

    async def end(self) -> None:
        """Closes the connection, and sees to it: TLS says goodbye before it goes."""
        self.close()
        if self._made is None or self._made.transport is None:
            return
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._made.lost.wait()
        except TimeoutError:
            self._made.transport.abort()

    async def _create_connection(self) -> H2Protocol:
        if self._made is not None:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        return await super()._create_connection()

    def _protocol_factory(self) -> H2Protocol:
        self._made = _Protocol(Handler(), self._config, self._h2_config)
        return self._made


class _Protocol(H2Protocol):
    """Notes whether the other side speaks HTTP/2: the first that it sends is a SETTINGS frame (RFC 9113, 3.4).

    grpclib sends its request without waiting for that, and then waits for ever for what is no answer.
    """

    def __init__(self, handler: AbstractHandler, config: Configuration, h2_config: H2Configuration) -> None:
        super().__init__(handler, config, h2_config)
        self.greeted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.refused: ssl.SSLError | None = None  # with TLS 1.3 a client's certificate is refused after the handshake
        self.transport: asyncio.Transport | None = None
        self.lost = asyncio.Event()
        self._head = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if not self.greeted.done():
            self._head += data[:4]
            if len(self._head) > 3:  # a frame begins with three bytes of length and one of type
                self.greeted.set_result(self._head[3] == _SETTINGS_FRAME)
        super().data_received(data)

    def connection_lost(self, exc: BaseException | None) -> None:
        if not self.greeted.done():
            self.refused = exc if isinstance(exc, ssl.SSLError) else None
            self.greeted.set_result(False)
        self.lost.set()
        super().connection_lost(exc)


class _Details(StatusDetailsCodecBase):
    """Reads the ErrorDetail among the details of a status. What cannot be read is left out: the status is enough."""

    def encode(self, status: Status, message: str | None, details: Sequence[betterproto2.Message]) -> bytes:
        raise NotImplementedError("a client sends no status")

    def decode(self, status: Status, message: str | None, data: bytes) -> v1.ErrorDetail | None:
        try:
            for packed in rpc.Status.FromString(data).details:
                if packed.type_url.endswith(_ERROR_DETAIL):
                    return v1.ErrorDetail.FromString(packed.value)
        except Exception:  # whatever the bytes do to the parser
            return None
        return None


def _too_late(timeout_s: float) -> CallFailed:
    message = f"the job was not done within --timeout={timeout_s:g} seconds; it is cancelled"
    return CallFailed(ErrorCode.TIMEOUT.value, message, retriable=True)


def _reason(error: OSError) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens there"
    if isinstance(error, socket.gaierror):
        return "there is no such host"
    return error.strerror or "the connection failed"
