"""How many connections and calls there may be, how large they may be, and for how long they may do nothing."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from h2.errors import ErrorCodes
from h2.settings import SettingCodes

from orcd_jax.server.limits import Limits
from orcd_jax.worker.types import ExecuteParams, WorkerEvent
from tests.server.fake_worker import ENDED, STARTED, WAIT_S, Served, hang_after, play, serving
from tests.server.peer import SERVICE, Peer, bearer, error_detail, execute_request, outcome
from tests.server.raw import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    HEADERS,
    PING_FRAME,
    SETTINGS,
    Goaway,
    Raw,
    call_headers,
    frame,
    framed,
)

JOB: bytes = execute_request().SerializeToString()
CALM, REFUSED = ErrorCodes.ENHANCE_YOUR_CALM, ErrorCodes.REFUSED_STREAM
DEADLINE_EXCEEDED = grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
RESOURCE_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
REFLECT = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"


def said(goaway: Goaway | None) -> tuple[int, str]:
    assert goaway is not None, "the connection was closed without a word"
    return goaway.code, goaway.why


# -- how many ----------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4420")
def test_a_connection_that_is_one_too_many_is_closed_and_the_others_go_on(
    all_log_lines: Callable[[], list[dict[str, object]]],
) -> None:
    with serving(limits=Limits(connections=2)) as served, Raw(served.port) as one, Raw(served.port) as two:
        for raw in (one, two):
            raw.ask("Ready")
            assert raw.answer().status == 0
        for _ in range(3):
            with Raw(served.port, greet=False) as three:
                assert three._socket.recv(1) == b""
        for raw in (one, two):
            raw.ask("Ready", stream=3)
            assert raw.answer(3).status == 0
    (line,) = [line for line in all_log_lines() if line["level"] == "warning"]
    assert line["human"] == "2 connections are open, as many as may be: others are turned away."


@pytest.mark.requirement("WORKER-4420")
def test_an_official_client_that_is_turned_away_does_not_insist_and_comes_in_when_there_is_room() -> None:
    with serving(limits=Limits(connections=1)) as served:
        with Raw(served.port) as raw:
            raw.ask("Ready")
            assert raw.answer().status == 0
            with Peer(served.port) as peer, pytest.raises(grpc.RpcError) as caught:
                peer.unary("Ready")
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        served.wait(until(lambda: not served.server._connections))
        with Peer(served.port) as peer:
            assert peer.unary("Ready").ready


@pytest.mark.requirement("WORKER-4420")
def test_the_number_of_calls_is_advertised_and_a_call_beyond_it_is_refused_alone() -> None:
    with serving(limits=Limits(streams=2)) as served, Raw(served.port) as raw:
        served.worker.script = hang_after(STARTED)
        raw.ask("Execute", JOB, stream=1)
        raw.ask("Execute", JOB, stream=3)
        raw.read_until(lambda: bool(raw.answers[1].data and raw.answers[3].data))
        assert raw.h2.remote_settings[SettingCodes.MAX_CONCURRENT_STREAMS] == 2
        raw.h2.remote_settings[SettingCodes.MAX_CONCURRENT_STREAMS] = 100  # and now as if it had not been read
        raw.h2.remote_settings.acknowledge()
        raw.call("Ready", stream=5)
        assert raw.answer(5).reset == REFUSED
        raw.reset(1)
        served.worker.closed.wait(WAIT_S)
        raw.ask("Ready", stream=7)
        assert raw.answer(7).status == 0
        assert raw.goaway is None


@pytest.mark.requirement("WORKER-4420")
def test_an_official_client_with_more_calls_than_that_has_them_all_answered() -> None:
    with serving(limits=Limits(streams=4)) as served, Peer(served.port) as peer, ThreadPoolExecutor(20) as pool:
        for events, error in pool.map(lambda number: outcome(peer.execute(job_id=f"job-{number}")), range(20)):
            assert (len(events), error) == (5, None)


@pytest.mark.requirement("WORKER-4420")
def test_calls_that_were_given_up_and_have_not_ended_are_bounded_too() -> None:
    with serving(limits=Limits(streams=2)) as served, Raw(served.port) as raw:
        may_end = served.on_loop(asyncio.Event)

        async def slow_to_end(params: ExecuteParams) -> AsyncIterator[WorkerEvent]:
            try:
                async for event in hang_after(STARTED)(params):
                    yield event
            finally:
                await may_end.wait()

        served.worker.script = slow_to_end
        for stream in (1, 3, 5, 7):
            raw.ask("Execute", JOB, stream=stream)
            raw.read_until(lambda stream=stream: bool(raw.answers[stream].data))  # type: ignore[misc]
            raw.reset(stream)
        raw.call("Ready", stream=9)
        assert raw.answer(9).reset == REFUSED
        served.on_loop(may_end.set)
        assert served.worker.closed.wait(WAIT_S)
        (connection,) = served.server._connections
        served.wait(until(lambda: not connection.processor.streams))
        raw.ask("Ready", stream=11)
        assert raw.answer(11).status == 0


@pytest.mark.requirement("WORKER-4420")
def test_watches_without_a_token_are_bounded_and_checks_still_answered() -> None:
    watch, check = "/grpc.health.v1.Health/Watch", "/grpc.health.v1.Health/Check"
    with serving(limits=Limits(watches=2)) as served, Peer(served.port) as peer:
        watches = [peer.channel.unary_stream(watch)(b"", timeout=WAIT_S) for _ in range(2)]
        assert [next(call) for call in watches] == [b"\x08\x02"] * 2
        error = peer.refusal_of(watch, metadata=())
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error_detail(error).retry_after_ms == 1000
        assert peer.channel.unary_unary(check)(b"", timeout=WAIT_S) == b"\x08\x02"
        watches[0].cancel()
        served.wait(until(lambda: len(served.server.gate._watches) == 1))
        assert next(peer.channel.unary_stream(watch)(b"", timeout=WAIT_S)) == b"\x08\x02"


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0)


# -- how large ---------------------------------------------------------------------------------------------------------


def compressed(raw: Raw, size: int) -> bytes:
    """The header block of a call with so many bytes of metadata, none of which can be compressed."""
    return raw.h2.encoder.encode([*call_headers("Ready"), ("x-large", "#" * size)], huffman=False)


@pytest.mark.requirement("WORKER-4420")
def test_headers_of_the_largest_size_pass_and_the_size_is_advertised(served: Served) -> None:
    with Raw(served.port) as raw:
        raw.call("Ready", metadata=(*bearer(), ("x-large", "#" * 7500)))
        raw.send(framed(b""), end=True)
        assert raw.answer().status == 0
        assert raw.h2.remote_settings[SettingCodes.MAX_HEADER_LIST_SIZE] == 8192


@pytest.mark.requirement("WORKER-4420")
@pytest.mark.parametrize("as_sent", ["in many", "without an end"])
def test_headers_that_are_too_large_end_the_connection_before_they_are_read(served: Served, as_sent: str) -> None:
    with Raw(served.port) as raw:
        block = compressed(raw, 17_000)
        pieces = [block[i : i + 1000] for i in range(0, len(block), 1000)]
        kinds = [HEADERS, *[CONTINUATION] * (len(pieces) - 1)]
        for kind, piece in zip(kinds, pieces, strict=True):
            last = piece is pieces[-1] and as_sent != "without an end"
            raw.write(frame(kind, piece, flags=END_HEADERS if last else 0, stream=1))
        code, why = said(raw.read_to_the_end())
        assert code == CALM
        assert why.endswith("bytes and more; the limit is 16384")


@pytest.mark.requirement("WORKER-4420")
def test_headers_that_are_a_little_too_large_end_the_connection_too(served: Served) -> None:
    with Raw(served.port) as raw:
        raw.write(frame(HEADERS, compressed(raw, 8192), flags=END_HEADERS, stream=1))
        assert said(raw.read_to_the_end())[0] == CALM


@pytest.mark.requirement("WORKER-4420")
def test_headers_that_become_too_large_when_they_are_unpacked_end_the_connection(served: Served) -> None:
    with Raw(served.port) as raw:
        block = compressed(raw, 3000)  # not too large, until it is repeated
        again = bytes([0x80 | 62])  # the newest entry of the table, by its number
        raw.write(frame(HEADERS, block + again * 1000, flags=END_HEADERS, stream=1))
        assert said(raw.read_to_the_end())[0] == CALM


@pytest.mark.requirement("WORKER-4305")
@pytest.mark.parametrize("kind", [DATA, HEADERS, SETTINGS, 0xEE])
@pytest.mark.parametrize("size", [16_385, 2**24 - 1])
def test_a_frame_that_is_too_long_is_refused_at_its_head(served: Served, kind: int, size: int) -> None:
    with Raw(served.port) as raw:
        raw.write(frame(kind, size=size, stream=1))
        assert said(raw.read_to_the_end()) == (
            ErrorCodes.FRAME_SIZE_ERROR,
            f"a frame of {size} bytes; the limit is 16384",
        )


@pytest.mark.requirement("WORKER-4420")
def test_messages_that_are_being_received_are_bounded_together() -> None:
    size = 3000
    with serving(limits=Limits(receiving_bytes=5000)) as served, Raw(served.port) as one, Peer(served.port) as peer:
        one.call("Tokenize")
        one.send(framed(b"", size=size))
        served.wait(until(lambda: served.server.gate._receiving == size))
        error = peer.refusal_of(
            f"/{SERVICE.full_name}/Tokenize",
            metadata=bearer(),
            body=execute_request(tenant="x" * 2500).SerializeToString(),
        )
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error_detail(error).retry_after_ms == 1000
        assert peer.unary("Ready").ready  # what is small fits in
        one.close()
        served.wait(until(lambda: served.server.gate._receiving == 0))


@pytest.mark.requirement("WORKER-4420")
def test_a_client_cannot_make_the_server_remember_more_headers(served: Served) -> None:
    with Raw(served.port) as raw:
        raw.h2.update_settings({SettingCodes.HEADER_TABLE_SIZE: 2**31 - 1})
        raw.flush()
        raw.ask("Ready")
        assert raw.answer().status == 0
        (connection,) = served.server._connections
        assert connection.connection._connection.encoder.header_table_size == 4096


def test_tokens_are_sent_without_waiting_for_more(served: Served) -> None:
    with Raw(served.port) as raw:
        raw.ask("Ready")
        raw.answer()
        (connection,) = served.server._connections
        of = connection._transport.get_extra_info("socket")
        assert of.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert of.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


# -- how long ----------------------------------------------------------------------------------------------------------

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@pytest.mark.requirement("WORKER-4420")
@pytest.mark.parametrize(
    "sent",
    [
        b"",
        PREFACE[:10],
        PREFACE,
        PREFACE + frame(SETTINGS),
        PREFACE + frame(SETTINGS) + frame(HEADERS, b"\x83", stream=1),
        PREFACE + frame(SETTINGS) + frame(HEADERS, b"\x83", size=100, stream=1),
        PREFACE + frame(SETTINGS) + PING_FRAME,
    ],
    ids=["nothing", "half a greeting", "a greeting", "settings", "headers without an end", "half of them", "a ping"],
)
def test_a_connection_on_which_no_call_comes_is_closed(sent: bytes) -> None:
    with serving(limits=Limits(first_request_s=0.2)) as served, Raw(served.port, greet=False) as raw:
        raw.write(sent)
        assert said(raw.read_to_the_end()) == (ErrorCodes.NO_ERROR, "no call came")


@pytest.mark.requirement("WORKER-4420")
def test_headers_that_trickle_in_do_not_hold_a_connection_open() -> None:
    with serving(limits=Limits(first_request_s=0.3)) as served, Raw(served.port) as raw:
        raw.write(frame(HEADERS, raw.h2.encoder.encode(call_headers("Ready")), stream=1))
        raw._socket.settimeout(0.01)
        while not raw.closed:
            raw.write(frame(CONTINUATION, stream=1))
            try:
                raw.read_to_the_end()
            except TimeoutError:
                continue
        assert raw.goaway is not None


@pytest.mark.requirement("WORKER-4420")
def test_a_connection_without_calls_is_closed_after_a_while() -> None:
    with serving(limits=Limits(idle_s=0.2)) as served, Raw(served.port) as raw:
        raw.ask("Ready")
        assert raw.answer().status == 0
        assert said(raw.read_to_the_end()) == (ErrorCodes.NO_ERROR, "no call came for a while")


@pytest.mark.requirement("WORKER-4420")
def test_one_with_a_call_is_not_however_long_that_takes() -> None:
    async def slow(params: ExecuteParams) -> AsyncIterator[WorkerEvent]:
        async for event in play(STARTED)(params):
            yield event
        await asyncio.sleep(0.5)
        yield ENDED

    with serving(limits=Limits(idle_s=0.05, first_request_s=0.2)) as served, Raw(served.port) as raw:
        served.worker.script = slow
        raw.ask("Execute", JOB)
        assert raw.answer().status == 0


@pytest.mark.requirement("WORKER-4420")
def test_an_official_client_whose_idle_connection_was_closed_comes_back() -> None:
    with serving(limits=Limits(idle_s=0.05)) as served, Peer(served.port) as peer:
        for _ in range(3):
            assert peer.unary("Ready").ready
            served.wait(until(lambda: not served.server._connections))


@pytest.mark.requirement("WORKER-4420")
@pytest.mark.parametrize(
    "sent",
    [b"", framed(JOB)[:3], framed(JOB)[:5], framed(JOB)[:-1]],
    ids=["nothing", "half a prefix", "a prefix", "most"],
)
def test_a_call_whose_message_does_not_arrive_ends_with_a_status(sent: bytes) -> None:
    with serving(limits=Limits(request_s=0.2)) as served, Raw(served.port) as raw:
        raw.call("Execute")
        if sent:
            raw.send(sent)
        answer = raw.answer()
        assert (answer.status, answer.said) == (DEADLINE_EXCEEDED, "no whole message arrived within 0.2 s")
        raw.ask("Ready", stream=3)
        assert raw.answer(3).status == 0, "the connection is well"
    assert served.worker.calls == 0


@pytest.mark.requirement("WORKER-4420")
def test_a_message_that_trickles_in_does_not_hold_a_call_open() -> None:
    with serving(limits=Limits(request_s=0.3)) as served, Raw(served.port) as raw:
        raw.call("Execute")
        raw.send(framed(b"", size=1_000_000))
        raw._socket.settimeout(0.01)
        while not raw.answers[1].ended:
            raw.write(frame(DATA, b"x" * 10, stream=1))
            try:
                raw.answer()
            except TimeoutError:
                continue
        assert raw.answers[1].status == DEADLINE_EXCEEDED


@pytest.mark.requirement("WORKER-4420")
def test_a_client_that_asks_reflection_nothing_is_not_waited_for() -> None:
    with serving(limits=Limits(request_s=0.2)) as served, Peer(served.port) as peer:
        call = peer.channel.stream_stream(REFLECT)(never(served.shutdown), metadata=bearer(), timeout=WAIT_S)
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "no whole message arrived" in caught.value.details()


def never(stopped: threading.Event) -> Iterator[bytes]:
    """Requests that do not come while anybody waits for them."""
    stopped.wait(1)
    yield from ()


@pytest.mark.requirement("WORKER-4420")
def test_a_connection_that_is_closed_does_not_wait_for_a_client_that_reads_nothing() -> None:
    with serving(limits=Limits(close_s=0.2)) as served, Raw(served.port, window=2**31 - 65_536) as raw:
        raw.ask("Execute", JOB)
        assert served.worker.running.wait(WAIT_S)
        served.on_loop(served.server.close)
        served.wait(served.server.wait_closed())
        assert served.worker.closed.wait(WAIT_S)
