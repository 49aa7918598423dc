"""The step loop over scripted programs: what each job is told, and when nothing more may follow."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import jax.numpy as jnp
import pytest

from orcd_jax.engine.engine import MAX_OOMS, Delivery, Engine, warm_up
from orcd_jax.engine.request import Ended, Event, Failed, FinishReason, JobRequest, SamplingParams, Tokens
from orcd_jax.engine.state import zero_state
from orcd_jax.errors import ErrorCode, OrcdError
from tests.engine.guards import Unguarded
from tests.engine.scripted import BYTES, EOS, SHAPE, WAIT_S, Harness, ScriptedPrograms, ids, request, text
from tests.engine.tiny import TINY


@pytest.fixture
def harness() -> Iterator[Harness]:
    made = Harness(ScriptedPrograms())
    yield made
    assert made.engine.stop(WAIT_S)


def test_a_job_gets_its_tokens_in_order_and_one_end(harness: Harness) -> None:
    events = harness.run("a")
    assert text(events) == "bcdef"
    assert [e.index for e in events if isinstance(e, Tokens)] == [0, 1, 2, 3, 4]
    end = events[-1]
    assert isinstance(end, Ended)
    assert (end.finish_reason, end.tokens_in, end.tokens_out) == (FinishReason.LENGTH, 1, 5)
    assert ids(events) == [*b"bcdef"]


def test_end_of_sequence_ends_the_job_and_shows_no_text(harness: Harness) -> None:
    events = harness.run("}", max_tokens=9)  # '~', 127, then 0
    end = events[-1]
    assert isinstance(end, Ended)
    assert end.finish_reason is FinishReason.EOS
    assert text(events) == "~\x7f"
    assert ids(events) == [126, 127, EOS]
    assert end.tokens_out == 3


def test_ignore_eos_goes_on(harness: Harness) -> None:
    events = harness.run("}", max_tokens=4, ignore_eos=True)
    assert ids(events) == [126, 127, 0, 1]


def test_a_stop_string_across_tokens_never_shows(harness: Harness) -> None:
    events = harness.run("a", max_tokens=20, stop=("de",))
    end = events[-1]
    assert isinstance(end, Ended)
    assert end.finish_reason is FinishReason.STOP
    assert text(events) == "bc"
    assert len(ids(events)) == end.tokens_out


def test_held_back_text_is_released_at_the_end(harness: Harness) -> None:
    assert text(harness.run("a", max_tokens=3, stop=("dx",))) == "bcd"


def test_a_stop_id_ends_the_job_and_shows_no_text(harness: Harness) -> None:
    events = harness.run("a", max_tokens=20, stop_ids=frozenset({ord("d")}))
    assert text(events) == "bc"
    assert ids(events) == [*b"bcd"]


def test_more_jobs_than_rows_all_end(harness: Harness) -> None:
    jobs = [harness.engine.submit(request(c, 7)) for c in "abcdefg"]
    assert [text(harness.finish(j)) for j in jobs] == ["".join(chr(ord(c) + i) for i in range(1, 8)) for c in "abcdefg"]


@pytest.mark.requirement("WORKER-4254")
def test_after_a_cancel_no_token_follows() -> None:
    harness = Harness(ScriptedPrograms(gate=threading.Semaphore(4)))
    job = harness.engine.submit(request("a", 50))
    harness.wait(lambda: len(harness.events.get(job, [])) >= 2)
    harness.engine.cancel(job)
    harness.engine.cancel(job)
    for _ in range(3):
        harness.programs.gate.release()  # type: ignore[union-attr]
    events = harness.finish(job)
    last = events[-1]
    assert isinstance(last, Failed)
    assert last.error.code is ErrorCode.CANCELLED
    for _ in range(60):
        harness.programs.gate.release()  # type: ignore[union-attr]
    assert text(harness.run("p")) == "qrstu"
    assert harness.events[job] == events
    assert harness.programs.calls < 20
    assert harness.engine.stop(WAIT_S)


@pytest.mark.requirement("WORKER-4240")
def test_a_deadline_is_checked_every_step() -> None:
    now = [0.0]
    harness = Harness(ScriptedPrograms(gate=threading.Semaphore(3)), clock=lambda: now[0])
    job = harness.engine.submit(request("a", 50, deadline_s=10.0))
    harness.wait(lambda: len(harness.events.get(job, [])) >= 1)
    now[0] = 10.0
    for _ in range(3):
        harness.programs.gate.release()  # type: ignore[union-attr]
    last = harness.finish(job)[-1]
    assert isinstance(last, Failed)
    assert last.error.code is ErrorCode.TIMEOUT
    assert harness.engine.stop(WAIT_S)


@pytest.mark.requirement("WORKER-4032")
def test_a_device_failure_fails_every_job_and_stops_the_engine() -> None:
    harness = Harness(ScriptedPrograms(fail_at=5, failure=RuntimeError("boom")))
    job = harness.engine.submit(request("a", 50))
    last = harness.finish(job)[-1]
    assert isinstance(last, Failed)
    assert last.error.code is ErrorCode.INTERNAL
    assert "boom" not in last.error.message
    harness.wait(lambda: bool(harness.fatal))
    assert harness.engine.stop(WAIT_S)


@pytest.mark.requirement("WORKER-4400")
@pytest.mark.requirement("WORKER-4401")
def test_after_running_out_of_memory_the_next_job_succeeds() -> None:
    harness = Harness(ScriptedPrograms(fail_at=5, failure=MemoryError()))
    last = harness.run("a", 50)[-1]
    assert isinstance(last, Failed)
    assert last.error.code is ErrorCode.HOST_OOM
    assert text(harness.run("a")) == "bcdef"
    assert harness.programs.inits == 2
    assert harness.fatal == []
    assert harness.engine.stop(WAIT_S)


def test_stopping_fails_what_still_runs() -> None:
    harness = Harness(ScriptedPrograms(gate=threading.Semaphore(2)))
    job = harness.engine.submit(request("a", 50))
    harness.wait(lambda: len(harness.events.get(job, [])) >= 1)
    for _ in range(50):
        harness.programs.gate.release()  # type: ignore[union-attr]
    assert harness.engine.stop(WAIT_S)
    assert sum(isinstance(e, Ended | Failed) for e in harness.events[job]) == 1


def terminal(events: list[Event]) -> list[Event]:
    return [event for event in events if isinstance(event, Ended | Failed)]


def test_the_next_step_is_dispatched_before_the_last_one_is_read() -> None:
    harness = Harness(ScriptedPrograms())
    harness.programs.log.clear()
    harness.run("a", 6)
    log = harness.programs.log
    assert log[:3] == ["decode", "decode", "read"]
    assert log.count("read") == log.count("decode") == 5  # the first of the six tokens is the prefill's
    assert harness.engine.stop(WAIT_S)


@pytest.mark.requirement("WORKER-4032")
@pytest.mark.requirement("WORKER-4502")
def test_every_job_that_reaches_an_engine_while_it_dies_is_told() -> None:
    """Running, waiting for a row, still in the inbox: each gets one terminal event."""
    gate = threading.Semaphore(1)
    harness = Harness(ScriptedPrograms(fail_at=4, failure=RuntimeError("boom"), gate=gate))
    first = harness.engine.submit(request("a", 50))
    harness.wait(lambda: harness.programs.calls >= 4)  # the failing step is held back
    others = [harness.engine.submit(request(letter, 50)) for letter in "bcd"]
    gate.release()
    for job in (first, *others):
        assert isinstance(harness.finish(job)[-1], Failed)
    harness.wait(lambda: bool(harness.fatal))
    with pytest.raises(OrcdError) as caught:
        harness.engine.submit(request("e"))
    assert caught.value is harness.fatal[0]
    assert harness.engine.stop(WAIT_S)
    assert all(len(terminal(events)) == 1 for events in harness.events.values())


@pytest.mark.requirement("WORKER-4502")
def test_stopping_tells_waiting_jobs_too_and_lets_none_in_after() -> None:
    gate = threading.Semaphore(1)
    harness = Harness(ScriptedPrograms(gate=gate))
    jobs = [harness.engine.submit(request(letter, 50)) for letter in "abcd"]  # two rows
    harness.wait(lambda: harness.programs.calls >= 4)
    harness.engine._inbox.put(harness.engine._stop)
    late = harness.engine.submit(request("e"))
    for _ in range(4):
        gate.release()
    assert harness.engine.stop(WAIT_S)
    assert [len(terminal(harness.finish(job))) for job in (*jobs, late)] == [1, 1, 1, 1, 1]
    with pytest.raises(OrcdError, match="the worker stopped"):
        harness.engine.submit(request("f"))
    assert harness.fatal == []


@pytest.mark.requirement("WORKER-4400")
@pytest.mark.requirement("WORKER-4402")
def test_running_out_of_memory_again_and_again_stops_the_engine() -> None:
    harness = Harness(ScriptedPrograms(fail_from=3, failure=MemoryError()))
    for n in range(MAX_OOMS):
        assert not harness.fatal, n
        assert isinstance(harness.run("a")[-1], Failed)
    harness.wait(lambda: bool(harness.fatal))
    assert harness.fatal[0].code is ErrorCode.HOST_OOM
    assert harness.engine.stop(WAIT_S)


@pytest.mark.requirement("WORKER-4400")
def test_the_lost_state_is_gone_before_a_new_one_is_made() -> None:
    """Both together would need twice the memory, when there is none."""
    harness = Harness(ScriptedPrograms(fail_at=4, failure=MemoryError()))
    harness.run("a", 50)
    assert text(harness.run("a")) == "bcdef"
    assert harness.programs.pages_alive_at_init
    assert not any(harness.programs.pages_alive_at_init)
    assert harness.engine.stop(WAIT_S)


def test_an_engine_whose_events_cannot_be_handed_off_says_so_and_ends() -> None:
    fatal: list[OrcdError] = []
    told = threading.Event()

    def refuse(batch: list[Delivery]) -> None:
        raise ValueError("the reader is broken")

    def on_fatal(error: OrcdError) -> None:
        fatal.append(error)
        told.set()

    programs = ScriptedPrograms()
    engine = Engine(programs, {}, Unguarded(), token_bytes=BYTES, eos_ids=[EOS], deliver=refuse, on_fatal=on_fatal)
    engine.start(warm_up(programs, {}))
    engine.submit(request("a"))
    assert told.wait(WAIT_S)
    assert fatal[0].code is ErrorCode.INTERNAL
    assert engine.stop(WAIT_S)


@pytest.mark.requirement("WORKER-4240")
def test_a_deadline_ends_a_job_that_still_waits_for_a_row() -> None:
    now = [0.0]
    gate = threading.Semaphore(1)
    harness = Harness(ScriptedPrograms(gate=gate), clock=lambda: now[0])
    running = [harness.engine.submit(request(letter, 50)) for letter in "ab"]
    waiting = harness.engine.submit(request("c", 5, deadline_s=10.0))
    harness.wait(lambda: harness.programs.calls >= 4)
    now[0] = 10.0
    gate.release()
    gate.release()
    (only,) = harness.finish(waiting)
    assert isinstance(only, Failed)
    assert only.error.code is ErrorCode.TIMEOUT
    assert all(not terminal(harness.events.get(job, [])) for job in running)
    for _ in range(200):
        gate.release()
    assert harness.engine.stop(WAIT_S)


def test_values_that_are_not_numbers_fail_their_job_alone() -> None:
    """The programs answer -1 where a logit is not a number."""
    harness = Harness(ScriptedPrograms(not_a_number_after=ord("x")))
    broken, other = (harness.engine.submit(request(letter, 5)) for letter in "wa")
    last = harness.finish(broken)[-1]
    assert isinstance(last, Failed)
    assert last.error.code is ErrorCode.INTERNAL
    assert text(harness.events[broken]) == "x"
    assert text(harness.finish(other)) == "bcdef"
    assert harness.engine.stop(WAIT_S)


def test_a_stop_string_that_the_end_completes_counts() -> None:
    """An unfinished character becomes U+FFFD when the text ends, and only then."""
    harness = Harness(
        ScriptedPrograms(), token_bytes=tuple(b"\xe2" if i == ord("c") else b for i, b in enumerate(BYTES))
    )
    events = harness.run("a", max_tokens=2, stop=("\ufffd",))
    end = events[-1]
    assert isinstance(end, Ended)
    assert end.finish_reason is FinishReason.STOP
    assert text(events) == "b"
    assert harness.engine.stop(WAIT_S)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": 2**31},
        {"top_p": 0.0},
        {"min_p": 1.5},
        {"seed": 2**64},
    ],
)
@pytest.mark.requirement("WORKER-4410")
@pytest.mark.requirement("WORKER-4411")
def test_sampling_that_the_device_cannot_hold_is_refused_at_the_door(
    harness: Harness, wrong: dict[str, object]
) -> None:
    with pytest.raises(OrcdError) as caught:
        harness.engine.submit(request("a", sampling=SamplingParams(**wrong)))  # type: ignore[arg-type]
    assert caught.value.code is ErrorCode.INVALID_PARAMS
    assert text(harness.run("a")) == "bcdef"


@pytest.mark.parametrize(
    ("prompt_ids", "max_tokens", "field"),
    [((1,) * 60, 5, "max_tokens"), ((), 5, "prompt"), ((1,), 0, "prompt"), ((128,), 1, "prompt_token_ids")],
)
@pytest.mark.requirement("WORKER-4410")
@pytest.mark.requirement("WORKER-4411")
def test_a_job_that_could_never_run_is_refused_at_the_door(
    harness: Harness, prompt_ids: tuple[int, ...], max_tokens: int, field: str
) -> None:
    with pytest.raises(OrcdError) as caught:
        harness.engine.submit(JobRequest(job_id="j", prompt_ids=prompt_ids, max_tokens=max_tokens))
    assert caught.value.code is ErrorCode.INVALID_PARAMS
    assert caught.value.field == field


def test_scripted_state_has_the_real_shape() -> None:
    assert zero_state(TINY, SHAPE).tokens.dtype == jnp.int32
