"""A server that drains lets calls finish and takes no more; its clients are told where they stand."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator

import grpc
import pytest
from h2.errors import ErrorCodes

from orcd_jax.server.connection import Connection
from orcd_jax.server.limits import Limits
from orcd_jax.worker.lifecycle import State
from orcd_jax.worker.types import ExecuteParams, WorkerEvent
from tests.server.fake_worker import ENDED, STARTED, WAIT_S, Script, Served, hang_after, play, serving
from tests.server.peer import Peer, error_detail, execute_request, outcome
from tests.server.raw import Goaway, Raw, framed

JOB: bytes = execute_request().SerializeToString()


def until(event: asyncio.Event) -> Script:
    """A job that starts, and ends when it is told to."""

    async def script(params: ExecuteParams) -> AsyncIterator[WorkerEvent]:
        async for started in play(STARTED)(params):
            yield started
        await event.wait()
        yield ENDED

    return script


class Draining:
    """A drain that goes on while the test does something else."""

    def __init__(self, served: Served, timeout_s: float = WAIT_S) -> None:
        self._served = served
        self._drain = asyncio.run_coroutine_threadsafe(served.server.drain(timeout_s), served.loop)
        served.on_loop(lambda: None)  # it has begun

    @property
    def done(self) -> bool:
        return self._drain.done()

    def wait(self) -> None:
        self._drain.result(WAIT_S)


@pytest.mark.requirement("WORKER-4970")
def test_a_call_that_runs_finishes_and_a_new_one_on_its_connection_is_refused(served: Served) -> None:
    may_end = served.on_loop(asyncio.Event)
    served.worker.script = until(may_end)
    with Raw(served.port) as raw:
        raw.ask("Execute", JOB)
        raw.read_until(lambda: bool(raw.answers[1].data))
        raw.ask("Ready", stream=3)
        assert raw.answer(3).status == 0
        drain = Draining(served)
        late = raw.headers("Ready", stream=5)  # on its way before the client hears of it
        raw.write(late)
        raw.read_until(lambda: raw.goaway is not None)
        assert raw.goaway is not None
        assert raw.goaway == Goaway(3, ErrorCodes.NO_ERROR, "the worker drains")
        served.on_loop(may_end.set)
        raw.read_to_the_end()
        assert raw.answers[5].reset == ErrorCodes.REFUSED_STREAM
        assert raw.answers[1].status == 0
    drain.wait()
    assert served.worker.closed.is_set()


@pytest.mark.requirement("WORKER-4970")
def test_a_job_of_the_official_client_gets_to_its_end(served: Served, peer: Peer) -> None:
    may_end = served.on_loop(asyncio.Event)
    served.worker.script = until(may_end)
    job = peer.execute()
    next(job)
    drain = Draining(served)
    assert not drain.done
    served.on_loop(may_end.set)
    events, error = outcome(job)
    assert error is None
    assert [event.WhichOneof("event") for event in events] == ["end"]
    drain.wait()


@pytest.mark.requirement("WORKER-4970")
def test_a_connection_without_calls_is_closed_at_once(served: Served) -> None:
    with Raw(served.port) as raw:
        raw.ask("Ready")
        assert raw.answer().status == 0
        drain = Draining(served)
        goaway = raw.read_to_the_end()
        assert goaway is not None
        assert (goaway.code, goaway.last_stream) == (ErrorCodes.NO_ERROR, 1)
    drain.wait()


@pytest.mark.requirement("WORKER-4970")
def test_nobody_can_connect_any_more(served: Served, peer: Peer) -> None:
    served.worker.script = hang_after(STARTED)
    job = peer.execute()
    next(job)
    drain = Draining(served)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", served.port), timeout=WAIT_S)
    assert not drain.done
    with Peer(served.port) as other, pytest.raises(grpc.RpcError) as caught:
        other.unary("Ready")
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    job.cancel()
    drain.wait()


@pytest.mark.requirement("WORKER-4970")
def test_a_watch_of_its_health_does_not_hold_up_a_drain(served: Served, peer: Peer) -> None:
    served.move(State.LOADING, State.READY)
    watch = peer.channel.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=WAIT_S)
    assert next(watch) == b"\x08\x01"
    served.move(State.DRAINING)
    drain = Draining(served, timeout_s=10 * WAIT_S)
    answers, error = outcome(watch)
    assert answers == [b"\x08\x02"], "it is told that the worker does not serve any more"
    assert error is not None
    assert error_detail(error).message == "the worker ends: nothing more is to be seen here"
    drain.wait()


@pytest.mark.requirement("WORKER-4970")
def test_a_drain_waits_no_longer_than_it_is_told_and_closing_ends_what_is_left(served: Served, peer: Peer) -> None:
    served.worker.script = hang_after(STARTED)
    job = peer.execute()
    next(job)
    Draining(served, timeout_s=0.1).wait()
    assert not served.worker.closed.is_set()
    served.on_loop(served.server.close)
    served.wait(served.server.wait_closed())
    assert served.worker.closed.is_set()
    _, error = outcome(job)
    assert error is not None
    assert error.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.requirement("WORKER-4970")
def test_a_client_that_has_not_said_anything_does_not_hold_up_a_drain() -> None:
    with (
        serving(limits=Limits(close_s=0.2)) as served,
        socket.create_connection(("127.0.0.1", served.port), timeout=WAIT_S) as silent,
    ):
        assert silent.recv(1)
        Draining(served).wait()
        Draining(served).wait()  # and again is the same


@pytest.mark.requirement("WORKER-4254")
@pytest.mark.parametrize("first", ["the server ends", "the client cancels", "the deadline passes"])
def test_what_a_job_does_at_its_end_is_not_broken_off_when_its_connection_goes_too(served: Served, first: str) -> None:
    ending, may_end = threading.Event(), served.on_loop(asyncio.Event)
    ended = threading.Event()

    async def slow_to_end(params: ExecuteParams) -> AsyncIterator[WorkerEvent]:
        try:
            async for event in hang_after(STARTED)(params):
                yield event
        finally:
            ending.set()
            await may_end.wait()
            ended.set()

    served.worker.script = slow_to_end
    with Raw(served.port) as raw:
        raw.call("Execute", timeout="300m" if first == "the deadline passes" else None)
        raw.send(framed(JOB), end=True)
        raw.read_until(lambda: bool(raw.answers[1].data))
        (connection,) = served.server._connections
        if first == "the server ends":
            served.on_loop(connection.end)
        elif first == "the client cancels":
            raw.reset()
        assert ending.wait(WAIT_S)
    served.wait(lost(connection))
    assert served.server._connections, "it is over before its call is"
    served.on_loop(may_end.set)
    served.wait(served.server.wait_closed())
    assert ended.is_set()


async def lost(connection: Connection) -> None:
    while not connection._lost:
        await asyncio.sleep(0)
