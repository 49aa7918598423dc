"""A job's stream: merged while unread, exactly one terminal event, nothing after it."""

from __future__ import annotations

import asyncio

import pytest

from orcd_jax.engine.request import Ended, Event, Failed, FinishReason, Tokens
from orcd_jax.engine.stream import JobStream
from orcd_jax.errors import ErrorCode, OrcdError

ENDED = Ended(
    finish_reason=FinishReason.LENGTH, tokens_in=1, tokens_out=2, decode_time_ms=0.0, time_to_first_token_ms=0.0
)
CANCELLED = Failed(OrcdError(ErrorCode.CANCELLED, "the job was cancelled"))


def read_all(stream: JobStream) -> list[Event]:
    async def run() -> list[Event]:
        events: list[Event] = []
        while True:
            event = await stream.next(timeout_s=0.01)
            if event is None:
                return events
            events.append(event)
            if not isinstance(event, Tokens):
                return events

    return asyncio.run(run())


@pytest.mark.requirement("WORKER-4243")
def test_unread_tokens_merge_into_one_event() -> None:
    stream = JobStream()
    for i in range(3):
        stream.put(Tokens(i, (i,), str(i)))
    stream.put(ENDED)
    assert read_all(stream) == [Tokens(0, (0, 1, 2), "012"), ENDED]


@pytest.mark.requirement("WORKER-4250")
@pytest.mark.requirement("WORKER-4253")
def test_nothing_follows_a_terminal_event() -> None:
    stream = JobStream()
    stream.put(ENDED)
    stream.put(Tokens(2, (9,), "x"))
    stream.put(CANCELLED)
    assert read_all(stream) == [ENDED]


@pytest.mark.requirement("WORKER-4250")
def test_abort_drops_unread_tokens() -> None:
    stream = JobStream()
    stream.put(Tokens(0, (1,), "a"))
    stream.abort(CANCELLED)
    stream.put(Tokens(1, (2,), "b"))
    assert read_all(stream) == [CANCELLED]


@pytest.mark.requirement("WORKER-4254")
@pytest.mark.parametrize("turns", range(6))
def test_a_reader_that_is_cancelled_as_an_event_comes_is_cancelled(turns: int) -> None:
    async def run() -> bool:
        stream = JobStream()
        reading = asyncio.create_task(stream.next(timeout_s=60.0))
        await asyncio.sleep(0)
        stream.put(ENDED)
        for _ in range(turns):
            await asyncio.sleep(0)
        was_to_end = reading.cancel()
        await asyncio.wait((reading,))
        return reading.cancelled() is was_to_end

    assert asyncio.run(run())


def test_a_read_times_out_without_losing_anything() -> None:
    async def run() -> None:
        stream = JobStream()
        assert await stream.next(timeout_s=0.0) is None
        stream.put(ENDED)
        assert await stream.next() == ENDED

    asyncio.run(run())
