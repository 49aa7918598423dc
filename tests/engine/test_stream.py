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


def test_a_read_times_out_without_losing_anything() -> None:
    async def run() -> None:
        stream = JobStream()
        assert await stream.next(timeout_s=0.0) is None
        stream.put(ENDED)
        assert await stream.next() == ENDED

    asyncio.run(run())
