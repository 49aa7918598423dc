"""One client's HTTP/2 connection: grpclib's and h2's, with the bounds that they lack.

What arrives is cut into frames before h2 sees it. A frame that is too long or of a kind that came too often ends the
connection with a GOAWAY that says so; the others are handled a millisecond at a time, so that no client keeps the event
loop from the rest. Written against grpclib 0.4 and h2 4, whose inner parts it touches; nothing else does.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from functools import partial

from grpclib.config import Configuration
from grpclib.const import Handler
from grpclib.encoding.base import CodecBase, StatusDetailsCodecBase
from grpclib.events import _DispatchServerEvents
from grpclib.metadata import Deadline
from grpclib.protocol import AbstractHandler, EventsProcessor, H2Protocol, Stream
from grpclib.protocol import Connection as Channel
from grpclib.server import request_handler
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    RemoteSettingsChanged,
    RequestReceived,
    UnknownFrameReceived,
)
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings

from orcd_jax.errors import OrcdError
from orcd_jax.server.admission import Standing
from orcd_jax.server.call import Headers, readable
from orcd_jax.server.frames import RST_STREAM, Frames, Misbehaved, goaway
from orcd_jax.server.limits import Limits, Seldom
from orcd_jax.server.status import report_unexpected
from orcd_jax.telemetry.log import EventCode, get_logger

# Of our own compression table, whatever room the client offers: it is searched from end to end for each header.
_ENCODER_TABLE_BYTES = 4096

# Headers are decoded and checked for each call: a bad one must not end the others.
_H2_CONFIG = H2Configuration(
    client_side=False,
    header_encoding=None,
    validate_inbound_headers=False,
    validate_outbound_headers=False,
    normalize_inbound_headers=False,
    normalize_outbound_headers=False,
)


class CallStream(Stream):
    """The stream of one call.

    Attributes:
      deadline: of the call. grpclib is not told: it would end the call without a reason in its details.
      problem: what is wrong with its headers, for the gate to answer.
      standing: of the connection's client.
    """

    deadline: Deadline | None = None
    problem: OrcdError | None = None
    standing: Standing

    def __terminated__(self, reason: str) -> None:
        # To cancel a call that ends already would break off how it ends.
        if self.wrapper is not None and not any(task.cancelling() for task in self.wrapper._tasks):
            super().__terminated__(reason)


class Calls(AbstractHandler):
    """The calls of one connection that run. Owns their tasks, until each is done."""

    def __init__(
        self,
        mapping: dict[str, Handler],
        codec: CodecBase,
        details_codec: StatusDetailsCodecBase,
        dispatch: _DispatchServerEvents,
    ) -> None:
        """Answers by ``mapping``."""
        self._answer = partial(request_handler, mapping)
        self._with = (codec, details_codec, dispatch)
        self._tasks: dict[Stream, asyncio.Task[None]] = {}

    def accept(self, stream: Stream, headers: Headers, release_stream: Callable[[], None]) -> None:
        """Begins to answer a call."""
        task = asyncio.get_running_loop().create_task(self._answer(stream, headers, *self._with, lambda: None))
        self._tasks[stream] = task

        # Not by grpclib's handler: a task that is cancelled before it begins never gets to its end.
        def done(_: asyncio.Task[None]) -> None:
            del self._tasks[stream]
            release_stream()

        task.add_done_callback(done)

    def cancel(self, stream: Stream) -> None:
        """The client gave a call up."""
        task = self._tasks.get(stream)
        if task is not None and not task.cancelling():
            task.cancel()

    def close(self) -> None:
        """Cancels every call."""
        for stream in self._tasks:
            self.cancel(stream)


class Connection(H2Protocol):
    """One client's connection. Owns its transport, its calls and its timers, and ends itself when a limit is broken."""

    _transport: asyncio.Transport
    connection: _Channel
    processor: _Processor

    def __init__(
        self, calls: Calls, limits: Limits, on_over: Callable[[Connection], None], cuts: Seldom | None = None
    ) -> None:
        """Waits for ``connection_made``.

        Args:
          calls: answers them.
          limits: what the client may take.
          on_over: called when the socket is closed and the last call has ended.
          cuts: lets one of many connections that broke a limit into the log.
        """
        super().__init__(calls, Configuration().__for_server__(), _H2_CONFIG)
        self.limits = limits
        self.standing = Standing()
        self.made = self.draining = False
        self.frames = Frames(limits)
        self._on_over, self._cuts = on_over, cuts or Seldom(limits.log_s)
        self._ended = self._lost = self._waits_for_its_turn = False
        self._timer: asyncio.TimerHandle | None = None  # for a client that does nothing
        self._stalled: asyncio.TimerHandle | None = None  # for one that reads nothing

    # -- asyncio ---------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - what a server gives; for the type checker
        self._transport = transport
        h2 = _server_side(self.limits)
        self.connection = _Channel(h2, transport, config=self.config)
        self.connection.frames = self.frames
        self.connection.flush()
        self.processor = _Processor(self)
        self.frames.streams = self.processor.streams
        self.made = True
        secured = transport.get_extra_info("ssl_object")
        if secured is not None and secured.selected_alpn_protocol() != "h2":
            self.end(ErrorCodes.HTTP_1_1_REQUIRED, "the client did not choose h2 (ALPN)")
        self._end_after(self.limits.first_request_s, "no call came")

    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        self.frames.add(data)
        if not self._waits_for_its_turn:
            self._take_a_turn()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = asyncio.get_running_loop().call_later(self.limits.send_s, self._transport.abort)

    def resume_writing(self) -> None:
        self._end_stall()
        super().resume_writing()

    def connection_lost(self, exc: BaseException | None) -> None:
        del exc
        self._lost = self._ended = True
        self._end_timer()
        self._end_stall()
        self.processor.close("connection lost")
        self._see_whether_over()

    # -- its life --------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Tells the client to make new calls elsewhere; ends after the ones that run."""
        if not self.made or self._ended or self.draining:
            return
        self.draining = True
        last = self.connection._connection.highest_inbound_stream_id
        self.connection.flush()
        self._transport.write(goaway(last, ErrorCodes.NO_ERROR, "the worker drains"))
        if not self.processor.streams:
            self.end()

    def end(self, code: ErrorCodes | None = ErrorCodes.NO_ERROR, why: str = "") -> None:
        """Ends the calls, and the connection once what was written is sent.

        Args:
          code: for the client, in a GOAWAY; None sends none.
          why: for the client too.
        """
        if not self.made or self._ended:
            return
        self._ended = True
        self._end_timer()
        self.connection.flush()
        if code is not None:
            self._transport.write(goaway(self.connection._connection.highest_inbound_stream_id, code, why))
        self.processor.close(why or "connection closed")
        # To close a socket that holds something unread resets it, and what was sent last is lost. So it is read, and
        # thrown away, until the client has heard of the end and closes its side.
        self._transport.resume_reading()
        if self._transport.can_write_eof():
            with contextlib.suppress(OSError):  # the client has reset it
                self._transport.write_eof()
        else:  # TLS has a farewell of its own
            self._transport.close()
        self._timer = asyncio.get_running_loop().call_later(self.limits.close_s, self._transport.abort)

    def call_began(self) -> None:
        """Told by the processor."""
        self._end_timer()

    def call_ended(self) -> None:
        """Told by the processor."""
        if self._ended:
            self._see_whether_over()
        elif not self.processor.streams:
            if self.draining:
                self.end(None)
            else:
                known = self.standing.fingerprint  # a stranger keeps no place for long
                seconds = self.limits.idle_s if known else self.limits.first_request_s
                self._end_after(seconds, "no call came for a while")

    def _take_a_turn(self) -> None:
        """Handles frames, for a while; then the rest of the worker has its turn."""
        self._waits_for_its_turn = False
        until = time.monotonic() + self.limits.turn_s
        try:
            while not self._ended and (frame := self.frames.take()):
                for event in self.connection.feed(frame):
                    self.processor.process(event)
                if time.monotonic() > until:
                    self._waits_for_its_turn = True
                    break
        except Misbehaved as error:
            self._cut(error.code, error.why)
        except ProtocolError:
            self._cut(None, "not HTTP/2")  # h2 has written a GOAWAY
        except Exception as error:
            report_unexpected(error)
            self._cut(ErrorCodes.INTERNAL_ERROR, "internal error")
        if self._ended:
            return
        self.connection.flush()
        if self._waits_for_its_turn:
            self._transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._take_a_turn)
        else:
            self._transport.resume_reading()

    def _cut(self, code: ErrorCodes | None, why: str) -> None:
        address = self.connection.get_peer().addr()
        if human := self._cuts.told(f"A client's connection was closed: {why}."):
            get_logger().warning(EventCode.REQUEST, human=human, peer=address[0] if address else None, reason=why)
        self.end(code, why)

    def _end_after(self, seconds: float, why: str) -> None:
        self._end_timer()
        if not self._ended:
            self._timer = asyncio.get_running_loop().call_later(seconds, self.end, ErrorCodes.NO_ERROR, why)

    def _end_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end_stall(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _see_whether_over(self) -> None:
        if self._lost and not self.processor.streams:
            self._on_over(self)


class _Processor(EventsProcessor):
    """What h2 understood, handled: calls begin here."""

    connection: _Channel

    def __init__(self, owner: Connection) -> None:
        super().__init__(owner.handler, owner.connection)
        self._owner = owner
        # Others may invent kinds of frames, and a peer that does not know them ignores them.
        self.processors[UnknownFrameReceived] = lambda event: None

    def register(self, stream: Stream) -> Callable[[], None]:
        release = super().register(stream)
        self._owner.call_began()

        def released() -> None:
            release()
            self._owner.call_ended()

        return released

    def process_request_received(self, event: RequestReceived) -> None:
        if not self._owner.standing.fingerprint:
            self._owner.frames.charge_stranger()
        most, h2 = self._owner.limits.streams, self.connection._connection
        # A call that was given up is no stream any more, but may take a while to end.
        if self._owner.draining or h2.count_streams() > most or len(self.streams) >= 2 * most:
            self._refuse(event.stream_id, ErrorCodes.REFUSED_STREAM)
            return
        headers, problem = readable(event.headers)
        names = {name for name, _ in headers}
        if not {":method", ":path"} <= names:
            self._refuse(event.stream_id, ErrorCodes.PROTOCOL_ERROR)
            return
        stream = CallStream(self.connection, h2, self.connection._transport, stream_id=event.stream_id)
        stream.problem, stream.standing = problem, self._owner.standing
        # The deadline is the gate's.
        stream.deadline = Deadline.from_headers(headers)
        headers = [header for header in headers if header[0] != "grpc-timeout"]
        self.handler.accept(stream, headers, self.register(stream))

    def process_data_received(self, event: DataReceived) -> None:
        if event.flow_controlled_length:  # grpclib takes an empty frame for the end
            super().process_data_received(event)

    def process_remote_settings_changed(self, event: RemoteSettingsChanged) -> None:
        super().process_remote_settings_changed(event)
        encoder = self.connection._connection.encoder
        if encoder.header_table_size > _ENCODER_TABLE_BYTES:
            encoder.header_table_size = _ENCODER_TABLE_BYTES

    def process_connection_terminated(self, event: ConnectionTerminated) -> None:
        del event  # the client leaves
        self._owner.end(None)

    def _refuse(self, stream_id: int, code: ErrorCodes) -> None:
        self._owner.frames.charge(RST_STREAM)
        self.connection._connection.reset_stream(stream_id, code)


class _Channel(Channel):
    """grpclib's half of a connection, which tells the budget what it sends."""

    _connection: _H2
    frames: Frames
    closed = False

    def close(self) -> None:
        """Sends nothing any more: the streams are gone, and the socket is the protocol's to close."""
        self.closed = True
        self._connection.streams.clear()

    def is_closing(self) -> bool:
        return self.closed

    def headers_send_process(self) -> None:
        super().headers_send_process()
        self.frames.earn(1.0)

    def data_send_process(self) -> None:
        super().data_send_process()
        self.frames.earn(self.frames.limits.frames_per_sent)


class _H2(H2Connection):
    """h2's half, which leaves it to the processor to refuse a stream: it would end the connection."""

    MAX_CLOSED_STREAMS = 1024  # remembered; late frames of older ones are ignored or end the connection

    @property
    def open_inbound_streams(self) -> int:
        """0, to h2."""
        return 0

    def count_streams(self) -> int:
        """The streams that are open."""
        return super().open_inbound_streams  # which forgets the closed ones


def _server_side(limits: Limits) -> _H2:
    """An HTTP/2 connection that has written its settings."""
    h2 = _H2(_H2_CONFIG)
    h2.local_settings = Settings(
        client=False,
        initial_values={
            SettingCodes.MAX_CONCURRENT_STREAMS: limits.streams,
            SettingCodes.MAX_HEADER_LIST_SIZE: limits.header_bytes,
            SettingCodes.INITIAL_WINDOW_SIZE: limits.stream_window,
        },
    )
    h2.decoder.max_header_list_size = limits.header_bytes
    h2.initiate_connection()
    h2.increment_flow_control_window(limits.connection_window - 65_535)  # what every connection begins with
    return h2
