"""What arrives, cut into frames: whatever its pieces, whatever it is, and a little at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
from grpclib.events import _DispatchServerEvents
from hypothesis import given, settings
from hypothesis import strategies as st

from orcd_jax.server.codec import DetailsCodec, StrictCodec
from orcd_jax.server.connection import Calls, Connection
from orcd_jax.server.frames import Frames, Misbehaved
from orcd_jax.server.limits import Limits
from tests.server.fake_worker import Served, serving
from tests.server.peer import Peer
from tests.server.raw import PING_FRAME, ROOM_FOR_ONE, SETTINGS, WINDOW_UPDATE, Raw, frame

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
ENOUGH = Limits(frame_burst=1e9, frame_rate=1.0)

frames_of_any_kind = st.builds(
    frame,
    st.integers(0, 255),
    st.binary(max_size=400),
    flags=st.integers(0, 255),
    stream=st.integers(0, 2**31 - 1),
)


def cut(frames: Frames, data: bytes) -> list[bytes]:
    frames.add(data)
    return list(iter(frames.take, b""))


@settings(deadline=None)
@given(st.lists(frames_of_any_kind, max_size=20), st.data())
def test_frames_come_out_whole_however_they_came_in(sent: list[bytes], data: st.DataObject) -> None:
    frames, stream, found = Frames(ENOUGH), PREFACE + b"".join(sent), list[bytes]()
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        found += cut(frames, stream[:size])
        stream = stream[size:]
    joined = b"".join(found)
    assert joined[: len(PREFACE)] == PREFACE
    assert joined[len(PREFACE) :] == b"".join(sent)
    assert found[len(found) - len(sent) :] == sent


@settings(deadline=None)
@given(st.binary(max_size=2000))
def test_whatever_comes_is_cut_or_refused(data: bytes) -> None:
    frames = Frames(Limits())
    with contextlib.suppress(Misbehaved):
        assert data.startswith(b"".join(cut(frames, data)))


@pytest.mark.requirement("WORKER-4305")
@pytest.mark.parametrize("size", [16_385, 2**20, 2**24 - 1])
def test_a_frame_that_is_too_long_is_not_waited_for(size: int) -> None:
    frames = Frames(Limits())
    cut(frames, PREFACE)
    with pytest.raises(Misbehaved, match=f"a frame of {size} bytes; the limit is 16384"):
        cut(frames, frame(0xEE, size=size))


# -- turns -------------------------------------------------------------------------------------------------------------


class Wire(asyncio.Transport):
    """A transport to nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.reading = True
        self.written = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_closing(self) -> bool:
        return False

    def close(self) -> None: ...

    def abort(self) -> None: ...

    def can_write_eof(self) -> bool:
        return False


@pytest.mark.requirement("WORKER-4420")
def test_a_client_with_much_to_say_lets_others_speak_and_is_not_read_meanwhile() -> None:
    count = 3000

    async def talk() -> tuple[int, bool, bool]:
        wire, over = Wire(), list[Connection]()
        calls = Calls({}, StrictCodec(), DetailsCodec(), _DispatchServerEvents())
        connection = Connection(calls, replace(ENOUGH, turn_s=0.0), over.append)
        connection.connection_made(wire)
        connection.data_received(PREFACE + frame(SETTINGS) + frame(WINDOW_UPDATE, ROOM_FOR_ONE) * count + PING_FRAME)
        read_meanwhile, answered_at_once = wire.reading, PING_FRAME[9:] in wire.written
        others = 0
        while PING_FRAME[9:] not in wire.written or not wire.reading:
            await asyncio.sleep(0)
            others += 1
        connection.connection_lost(None)
        assert over == [connection]
        return others, read_meanwhile, answered_at_once

    others, read_meanwhile, answered_at_once = asyncio.run(talk())
    assert others >= count, "a turn of no time has one frame"
    assert not read_meanwhile
    assert not answered_at_once


# -- a real server -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def attacked() -> Iterator[Served]:
    """A server that is sent all sorts of things."""
    with serving(limits=Limits(close_s=0.1)) as started:
        yield started


@pytest.mark.requirement("WORKER-4305")
@settings(max_examples=60, deadline=None)
@given(st.lists(frames_of_any_kind | st.binary(max_size=60), min_size=1, max_size=8), st.booleans())
def test_whatever_a_client_sends_the_server_serves_the_next_one(
    attacked: Served, sent: list[bytes], greeted: bool
) -> None:
    with Raw(attacked.port, greet=greeted) as raw:
        raw.write(b"".join(sent))
        raw.write(frame(0, size=2**24 - 1))  # the end of it, whatever it was
        raw.write(b"\x00" * 64)
        raw._socket.settimeout(20)
        while raw._socket.recv(65536):  # what our own half makes of the answers to noise does not matter
            pass
    with Peer(attacked.port) as peer:
        assert peer.unary("Ready").ready
    assert attacked.worker.calls == 0
