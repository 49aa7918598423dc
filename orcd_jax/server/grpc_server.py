"""The gRPC server: the worker's service, health and reflection, all behind the gate."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import Callable, Sequence

from grpclib.events import SendInitialMetadata, SendTrailingMetadata, _DispatchServerEvents
from grpclib.health.v1 import health_pb2
from grpclib.reflection.service import ServerReflection
from grpclib.reflection.v1 import reflection_pb2

from orcd_jax.server.admission import AuthOutcome
from orcd_jax.server.auth import Access, Role, Tokens
from orcd_jax.server.call import CORRELATION_ID, current_correlation_id
from orcd_jax.server.codec import DetailsCodec, StrictCodec, load_pool
from orcd_jax.server.connection import Calls, Connection
from orcd_jax.server.gate import Gate
from orcd_jax.server.grpc_service import ServedWorker, WorkerService
from orcd_jax.server.health import health_service
from orcd_jax.server.limits import Limits, Seldom
from orcd_jax.server.places import Places, Refusal
from orcd_jax.telemetry.log import EventCode, get_logger

_BACKLOG = 128
_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_ACCEPT_PAUSE_S = 0.5


class GuardedServer:
    """A gRPC server in which no path leads past the gate. Owns the listening socket and the connections.

    Attributes:
      tls: what connections begin with from now on; None: they are not encrypted. Those that are there keep theirs.
    """

    def __init__(
        self,
        worker: ServedWorker,
        access: Access,
        *,
        on_shutdown: Callable[[], None] | None,
        tls: ssl.SSLContext | None,
        limits: Limits,
        on_auth: Callable[[AuthOutcome], None] | None,
        on_refused: Callable[[Refusal], None] | None,
        open_ready: bool,
    ) -> None:
        """Serves ``worker`` to whoever ``access`` knows."""
        self._codec, self._details_codec = StrictCodec(), DetailsCodec()
        service = WorkerService(worker, on_shutdown)
        health = health_service(worker.lifecycle, service)
        pool = load_pool(health_pb2.DESCRIPTOR.serialized_pb, reflection_pb2.DESCRIPTOR.serialized_pb)
        services = ServerReflection.extend([service, health], pool=pool)
        self.gate = Gate(services, access, self._codec, limits=limits, open_ready=open_ready, on_auth=on_auth)
        self._dispatch = _DispatchServerEvents()
        for answer in (SendInitialMetadata, SendTrailingMetadata):
            self._dispatch.add_listener(answer, _name_the_call)  # type: ignore[arg-type]  # it wants any event
        self.tls, self._limits, self._on_refused = tls, limits, on_refused
        self._connections: dict[Connection, str] = {}  # and the address that each holds a place of
        self._places = Places(limits.connections, limits.connections_per_peer)
        self._seldom = {refusal: Seldom(limits.log_s) for refusal in Refusal}
        self._cuts, self._starved = Seldom(limits.log_s), Seldom(limits.log_s)
        self._one_less = asyncio.Event()
        self._welcoming: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The TCP port it listens at."""
        if self._listener is None:
            raise RuntimeError("the server does not listen")
        port: int = self._listener.getsockname()[1]
        return port

    def listen(self, host: str, port: int) -> None:
        """Begins to take connections.

        Raises:
          OSError: the address cannot be bound.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        self._listener.setblocking(False)
        self._accepting = asyncio.get_running_loop().create_task(self._accept(self._listener))

    async def drain(self, timeout_s: float) -> None:
        """Takes no more calls and tells the clients so; returns when the last call ended, or after ``timeout_s``."""
        self._stop_listening()
        self.gate.end_watches()
        for connection in list(self._connections):
            connection.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.wait_closed()

    def close(self) -> None:
        """Takes no more connections, ends the calls and closes the connections."""
        self._stop_listening()
        for connection in list(self._connections):
            connection.end(why="the worker ends")

    async def wait_closed(self) -> None:
        """Returns when the last connection and the last call ended."""
        while self._connections:
            self._one_less.clear()
            await self._one_less.wait()

    def revoke(self, fingerprints: Sequence[str]) -> int:
        """Ends the calls that came with these tokens, which are valid no more; how many."""
        for connection in self._connections:
            connection.standing.revoke(fingerprints)
        return self.gate.revoke(fingerprints)

    def _stop_listening(self) -> None:
        if self._accepting is not None and self._listener is not None:
            self._accepting.cancel()
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._accepting = None
            for task in self._welcoming:
                task.cancel()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(0)  # one a turn: who connects over and over must not keep the loop from the calls
            try:
                client, (address, *_) = await loop.sock_accept(listener)
            except OSError as error:  # the client is gone already, or we have no room for it
                if error.errno in _OUT_OF_RESOURCES:
                    self._say_starved(error)
                    await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            if (refusal := self._places.take(address)) is not None:
                self._turn_away(client, address, refusal)
                continue
            _tune(client, self._limits.keepalive_s)
            calls = Calls(self.gate, self._codec, self._details_codec, self._dispatch)
            connection = Connection(calls, self._limits, self._forget, self._cuts)
            self._connections[connection] = address
            task = loop.create_task(self._welcome(connection, client))
            self._welcoming.add(task)
            task.add_done_callback(self._welcoming.discard)

    async def _welcome(self, connection: Connection, client: socket.socket) -> None:
        """Hands a socket over to its connection, after the TLS handshake if there is to be one."""
        tls = self.tls
        handshake_s = None if tls is None else self._limits.handshake_s
        close_s = None if tls is None else self._limits.close_s
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection, client, ssl=tls, ssl_handshake_timeout=handshake_s, ssl_shutdown_timeout=close_s
            )
        except OSError:  # it did not speak TLS, had no certificate that we trust, or left
            self._forget(connection)
        except BaseException:  # whatever it is, nobody holds its place any more
            self._forget(connection)
            raise

    def _turn_away(self, client: socket.socket, address: str, refusal: Refusal) -> None:
        """Closes a connection that is one too many, without a word: a client that got one would come back at once."""
        client.close()
        if self._on_refused is not None:
            self._on_refused(refusal)
        if refusal is Refusal.FULL:
            human = f"{len(self._places)} connections are open, as many as may be: others are turned away."
        else:
            most = self._places.most_of_peer
            human = f"{most} connections of one address are open, as many as may be: it gets no more."
        if human := self._seldom[refusal].told(human):
            get_logger().warning(EventCode.REQUEST, human=human, peer=address, reason=refusal.value)

    def _say_starved(self, error: OSError) -> None:
        """A process without descriptors looks healthy and takes nobody."""
        if human := self._starved.told(
            f"No connection can be taken ({error.strerror}): raise LimitNOFILE or make room."
        ):
            get_logger().error(EventCode.REQUEST, human=human)

    def _forget(self, connection: Connection) -> None:
        if (address := self._connections.pop(connection, None)) is not None:
            self._places.leave(address)
        self._one_less.set()


def _tune(sock: socket.socket, seconds: int) -> None:
    """Sends a token when there is one; and lets the kernel find out that the other end is gone without a word."""
    with contextlib.suppress(OSError):  # the other end may be gone already
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL"):
            if hasattr(socket, name):  # not on every system
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)


async def _name_the_call(event: SendInitialMetadata | SendTrailingMetadata) -> None:
    """Tells the client under which name the logs know its call."""
    event.metadata[CORRELATION_ID] = current_correlation_id()


async def start_server(
    worker: ServedWorker,
    *,
    host: str,
    port: int,
    tokens: Access | Tokens,
    on_shutdown: Callable[[], None] | None = None,
    tls: ssl.SSLContext | None = None,
    limits: Limits | None = None,
    on_auth: Callable[[AuthOutcome], None] | None = None,
    on_refused: Callable[[Refusal], None] | None = None,
    open_ready: bool = False,
) -> GuardedServer:
    """Starts to listen.

    Args:
      worker: what is served; it may still be loading.
      host: IP address to listen at.
      port: TCP port; 0 takes a free one.
      tokens: what opens which methods; where there are tokens of one role only, it is execute.
      on_shutdown: called by the RPC Shutdown; without it that RPC is UNIMPLEMENTED.
      tls: from ``tls.server_context``; without it traffic is not encrypted.
      limits: what clients may take.
      on_auth: called with the outcome of every authentication, on the event loop.
      on_refused: called for every connection that is turned away, likewise.
      open_ready: whether Ready needs no token.

    Returns:
      The server: ``await drain()`` lets calls finish, ``close()`` ends them, ``await wait_closed()`` sees them out.

    Raises:
      OSError: the address cannot be bound.
    """
    server = GuardedServer(
        worker,
        tokens if isinstance(tokens, Access) else Access({Role.EXECUTE: tokens}),
        on_shutdown=on_shutdown,
        tls=tls,
        limits=limits or Limits(),
        on_auth=on_auth,
        on_refused=on_refused,
        open_ready=open_ready,
    )
    server.listen(host, port)
    return server
