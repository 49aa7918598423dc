"""The gRPC server: the worker's service, health and reflection, all behind the gate."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from weakref import WeakSet

from grpclib.health.v1 import health_pb2
from grpclib.protocol import H2Protocol
from grpclib.reflection.service import ServerReflection
from grpclib.reflection.v1 import reflection_pb2
from grpclib.server import Server

from orcd_jax.server import gate
from orcd_jax.server.auth import Tokens
from orcd_jax.server.codec import DetailsCodec, StrictCodec, load_pool
from orcd_jax.server.grpc_service import ServedWorker, WorkerService
from orcd_jax.server.health import health_service


class Connection(H2Protocol):
    """One client's connection. Cut when its peer takes nothing off the socket for ``gate.SEND_TIMEOUT_S``.

    The gate bounds how long a message may wait for the client; this bounds everything else that is written, such as
    the trailers that would tell it so.
    """

    _transport: asyncio.Transport
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - what create_server gives; for the type checker
        self._transport = transport
        super().connection_made(transport)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = asyncio.get_running_loop().call_later(gate.SEND_TIMEOUT_S, self._transport.abort)

    def resume_writing(self) -> None:
        self._end_stall()
        super().resume_writing()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._end_stall()
        super().connection_lost(exc)

    def close(self) -> None:
        """Ends the connection once what was written is sent."""
        self._transport.close()

    def _end_stall(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None


class GuardedServer(Server):
    """A grpclib server in which no path leads past the gate. Owns the listening socket and the connections."""

    def __init__(self, worker: ServedWorker, tokens: Tokens, on_shutdown: Callable[[], None] | None) -> None:
        """Serves ``worker`` to whoever has one of ``tokens``."""
        codec = StrictCodec()
        super().__init__([], codec=codec, status_details_codec=DetailsCodec())
        service = WorkerService(worker, on_shutdown)
        health = health_service(worker.lifecycle, service)
        pool = load_pool(health_pb2.DESCRIPTOR.serialized_pb, reflection_pb2.DESCRIPTOR.serialized_pb)
        services = ServerReflection.extend([service, health], pool=pool)
        # grpclib copies the handlers it is given into a plain dict; the gate also answers for paths that are not there.
        self._mapping = gate.Gate(services, tokens, codec)
        self._connections: WeakSet[Connection] = WeakSet()

    def _protocol_factory(self) -> Connection:
        made = super()._protocol_factory()
        connection = Connection(made.handler, made.config, made.h2_config)
        self._connections.add(connection)
        return connection

    def close(self) -> None:
        """Takes no more connections, ends the calls and closes the connections."""
        super().close()
        # grpclib leaves them open; from Python 3.12 on, wait_closed() would wait for the clients to leave.
        for connection in self._connections:
            connection.close()


async def start_server(
    worker: ServedWorker,
    *,
    host: str,
    port: int,
    tokens: Tokens,
    on_shutdown: Callable[[], None] | None = None,
) -> GuardedServer:
    """Starts to listen.

    Args:
      worker: what is served; it may still be loading.
      host: IP address to listen at.
      port: TCP port; 0 takes a free one.
      tokens: open every method but health checks.
      on_shutdown: called by the RPC Shutdown; without it that RPC is UNIMPLEMENTED.

    Returns:
      The server: ``close()`` takes no more connections and ends the calls, ``await wait_closed()`` sees them out.

    Raises:
      OSError: the address cannot be bound.
    """
    server = GuardedServer(worker, tokens, on_shutdown)
    await server.start(host, port)
    return server
