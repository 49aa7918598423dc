"""Frames that cost a client nothing: a budget of them, then the end of its connection. Others do not notice."""

from __future__ import annotations

import asyncio
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace

import pytest
from h2.errors import ErrorCodes
from h2.events import DataReceived, Event

from orcd_jax.engine.request import Tokens
from orcd_jax.server.limits import Limits
from orcd_jax.worker.types import ExecuteParams, WorkerEvent
from tests.server.fake_worker import ENDED, STARTED, WAIT_S, Script, Served, hang_after, play, serving
from tests.server.peer import Peer, execute_request, outcome
from tests.server.raw import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PING_FRAME,
    PRIORITY,
    ROOM_FOR_ONE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Raw,
    call_headers,
    frame,
    framed,
)

JOB: bytes = execute_request().SerializeToString()
TOKENS = 100
UNBOUNDED = Limits(frame_burst=1e12)
# A slow machine must not give the budget time to refill.
BOUNDED = Limits(frame_burst=1000, frame_rate=0.001)


def resets(raw: Raw, first: int) -> Iterator[bytes]:
    """Calls that are given up at once, each on a stream of its own."""
    for stream in range(first, first + 2 * 150, 2):
        yield raw.headers("Execute", stream=stream)
        raw.h2.reset_stream(stream, ErrorCodes.CANCEL)
        yield raw.h2.data_to_send()


def continued(raw: Raw, first: int) -> Iterator[bytes]:
    """Calls whose headers come in empty pieces."""
    for stream in range(first, first + 2 * 20, 2):
        block = raw.headers("Ready", stream=stream)[9:]
        yield frame(HEADERS, block, flags=END_STREAM, stream=stream)
        yield frame(CONTINUATION, stream=stream) * 60
        yield frame(CONTINUATION, flags=END_HEADERS, stream=stream)


def many(one: bytes) -> Callable[[Raw, int], Iterator[bytes]]:
    return lambda raw, stream: iter([one] * 1100)


# With stream 1 open, on which a job runs, and stream 3 closed.
FLOODS: dict[str, tuple[Callable[[Raw, int], Iterator[bytes]], str]] = {
    "PING": (many(PING_FRAME), "PING"),
    "SETTINGS": (many(frame(SETTINGS)), "SETTINGS"),
    "SETTINGS that change the windows": (many(frame(SETTINGS, b"\x00\x04\x00\x00\xff\xff")), "SETTINGS"),
    "acknowledged SETTINGS": (many(frame(SETTINGS, flags=1)), "SETTINGS"),
    "WINDOW_UPDATE of the connection": (many(frame(WINDOW_UPDATE, ROOM_FOR_ONE)), "WINDOW_UPDATE"),
    "WINDOW_UPDATE of a stream": (many(frame(WINDOW_UPDATE, ROOM_FOR_ONE, stream=1)), "WINDOW_UPDATE"),
    "WINDOW_UPDATE of a closed stream": (many(frame(WINDOW_UPDATE, ROOM_FOR_ONE, stream=3)), "WINDOW_UPDATE"),
    "RST_STREAM of new calls": (resets, "RST_STREAM"),
    "RST_STREAM of a closed stream": (many(frame(RST_STREAM, b"\x00\x00\x00\x08", stream=3)), "RST_STREAM"),
    "empty DATA": (many(frame(DATA, stream=1)), "DATA"),
    "DATA of one byte": (many(frame(DATA, b"x", stream=1)), "DATA"),
    "DATA of a closed stream": (many(frame(DATA, b"x" * 300, stream=3)), "DATA"),
    "the last DATA of a closed stream": (many(frame(DATA, flags=END_STREAM, stream=3)), "DATA"),
    "CONTINUATION": (continued, "CONTINUATION"),
    "PRIORITY": (many(frame(PRIORITY, b"\x00\x00\x00\x00\x01", stream=1)), "PRIORITY"),
    "a kind nobody knows": (many(frame(0xEE, b"?")), "unknown"),
}


@pytest.fixture
def bounded() -> Iterator[Served]:
    """A server with a budget of frames that does not refill."""
    with serving(limits=BOUNDED) as started:
        yield started


@pytest.mark.requirement("WORKER-4420")
@pytest.mark.parametrize(("flood", "named"), FLOODS.values(), ids=FLOODS.keys())
def test_a_flood_ends_its_connection_and_is_told_why(
    bounded: Served, flood: Callable[[Raw, int], Iterator[bytes]], named: str
) -> None:
    bounded.worker.script = hang_after(STARTED)
    with Raw(bounded.port) as raw:
        raw.call("Execute")
        raw.send(framed(JOB))
        assert bounded.worker.running.wait(WAIT_S)
        raw.ask("Ready", stream=3)
        assert raw.answer(3).status == 0
        raw.write(b"".join(flood(raw, 5)))
        goaway = raw.read_to_the_end()
        assert goaway is not None
        assert (goaway.code, goaway.why) == (ErrorCodes.ENHANCE_YOUR_CALM, f"too many {named} frames")
        assert bounded.worker.closed.wait(WAIT_S), "the job outlived the connection"


@pytest.mark.requirement("WORKER-4420")
def test_streams_that_are_refused_are_counted_too() -> None:
    with serving(limits=replace(BOUNDED, streams=1)) as served, Raw(served.port) as raw:
        served.worker.script = hang_after(STARTED)
        raw.ask("Execute", JOB)
        assert served.worker.running.wait(WAIT_S)
        raw.write(b"".join(raw.headers("Ready", stream=stream, end=True) for stream in range(3, 303, 2)))
        goaway = raw.read_to_the_end()
        assert goaway is not None
        assert goaway.why == "too many RST_STREAM frames"


@pytest.mark.requirement("WORKER-4420")
def test_calls_that_were_given_up_leave_nothing_behind() -> None:
    with serving(limits=replace(BOUNDED, streams=8)) as served, Raw(served.port) as raw:
        raw.write(b"".join(list(resets(raw, 1))[:200]))  # 100 of the 120 that the budget allows
        raw.write(PING_FRAME)
        raw.read_until(lambda: raw.pings == 1)
        (connection,) = served.server._connections
        served.on_loop(lambda: None)
        assert served.on_loop(lambda: dict(connection.processor.streams)) == {}
        assert served.worker.calls == 0


@pytest.mark.requirement("WORKER-4420")
@pytest.mark.parametrize("path", ["/grpc.health.v1.Health/Check", "/orcd.worker.v1.Worker/Ready"])
def test_calls_without_a_token_are_a_flood_in_the_end(bounded: Served, path: str) -> None:
    with Raw(bounded.port) as raw:
        headers = [(name, path if name == ":path" else value) for name, value in call_headers("")]
        for stream in range(1, 200, 2):
            raw.write(raw.any_headers(headers, stream=stream, end=True))
        goaway = raw.read_to_the_end()
        assert goaway is not None
        assert (goaway.code, goaway.why) == (ErrorCodes.ENHANCE_YOUR_CALM, "too many calls without a valid token")
        assert goaway.last_stream > 2 * 20, "some are answered"


@pytest.mark.requirement("WORKER-4420")
def test_calls_with_one_are_none_however_many_come_at_once(bounded: Served) -> None:
    with Raw(bounded.port) as raw:
        raw.ask("Ready")
        assert raw.answer().status == 0
        raw.write(b"".join(raw.headers("Ready", stream=stream, end=True) for stream in range(3, 403, 2)))
        raw.read_until(lambda: all(raw.answers[stream].ended for stream in range(3, 403, 2)))
        assert raw.goaway is None


# -- ordinary clients --------------------------------------------------------------------------------------------------


class Talkative(Raw):
    """Answers everything that it is sent as it may: with room on the stream and the connection, and a ping."""

    def _note(self, event: Event) -> None:
        super()._note(event)
        if isinstance(event, DataReceived):
            self.write(PING_FRAME)
            for stream in (0, event.stream_id):
                self.write(frame(WINDOW_UPDATE, struct.pack(">L", event.flow_controlled_length), stream=stream))


@pytest.mark.requirement("WORKER-4420")
def test_a_client_that_acknowledges_every_token_is_no_flood() -> None:
    with serving(limits=Limits(frame_burst=150, frame_rate=0.001)) as served:
        served.worker.script = counting(400)
        with Talkative(served.port) as raw:
            raw.ask("Execute", JOB)
            assert raw.answer().status == 0
            assert raw.goaway is None


@pytest.mark.requirement("WORKER-4420")
def test_keepalive_of_an_hour_at_once_is_no_flood(served: Served) -> None:
    with Raw(served.port) as raw:
        raw.write(PING_FRAME * 360)  # one each 10 s
        raw.ask("Ready")
        assert raw.answer().status == 0
        raw.read_until(lambda: raw.pings == 360)
        assert raw.goaway is None


@pytest.mark.requirement("WORKER-4420")
def test_calls_one_after_another_are_no_flood() -> None:
    with serving(limits=Limits(frame_burst=150, frame_rate=0.001)) as served, Peer(served.port) as peer:
        for _ in range(200):
            assert peer.unary("Ready").ready


@pytest.mark.requirement("WORKER-4420")
def test_every_job_of_a_full_worker_may_be_cancelled_at_once(served: Served) -> None:
    served.worker.script = hang_after(STARTED)
    with Raw(served.port) as raw:
        streams = range(1, 256, 2)
        for stream in streams:
            raw.ask("Execute", JOB, stream=stream)
        raw.read_until(lambda: all(raw.answers[stream].data for stream in streams))
        for stream in streams:
            raw.reset(stream)
        raw.ask("Ready", stream=257)
        assert raw.answer(257).status == 0


# -- others, meanwhile -------------------------------------------------------------------------------------------------


def counting(tokens: int) -> Script:
    """A job of so many tokens, one a turn of the event loop."""

    async def script(params: ExecuteParams) -> AsyncIterator[WorkerEvent]:
        async for event in play(STARTED)(params):
            yield event
        for index in range(tokens):
            yield Tokens(index, (index,), "x")
            await asyncio.sleep(0)
        yield ENDED

    return script


class Flooding(threading.Thread):
    """Sends a frame over and over, on one connection after the other, until it is stopped."""

    def __init__(self, port: int, block: bytes) -> None:
        super().__init__()
        self._port, self._block = port, block
        self.begun, self.stop = threading.Event(), threading.Event()
        self.connections = 0

    def run(self) -> None:
        while not self.stop.is_set():
            with Raw(self._port) as raw:
                self.connections += 1
                while not self.stop.is_set() and raw.write(self._block):
                    self.begun.set()


@pytest.mark.requirement("WORKER-4420")
@pytest.mark.parametrize("limits", [Limits(), UNBOUNDED], ids=["cut off again and again", "never cut off"])
def test_a_job_gets_all_its_tokens_in_order_while_floods_run(limits: Limits) -> None:
    with serving(limits=limits) as served, Peer(served.port) as peer:
        served.worker.script = counting(TOKENS)
        floods = [
            Flooding(served.port, block)
            for block in (frame(WINDOW_UPDATE, ROOM_FOR_ONE) * 2000, frame(0xEE, b"?") * 2000, b"noise" * 2000)
        ]
        for flood in floods:
            flood.start()
        try:
            for flood in floods:
                assert flood.begun.wait(WAIT_S)
            events, error = outcome(peer.execute(max_tokens=64, timeout=6 * WAIT_S))
            assert error is None
            indices = [event.token.index for event in events if event.WhichOneof("event") == "token"]
            assert indices == list(range(TOKENS))
            assert all(flood.is_alive() for flood in floods), "nothing was flooded"
        finally:
            for flood in floods:
                flood.stop.set()
            for flood in floods:
                flood.join(WAIT_S)
        assert peer.unary("Ready").ready
