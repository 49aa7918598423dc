"""The step loop and its guard: nothing leaves that was made of weights in doubt."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from orcd_jax.engine.request import Ended, Failed, Tokens
from orcd_jax.errors import ErrorCode, OrcdError
from tests.engine.guards import ScriptedGuard
from tests.engine.scripted import WAIT_S, Harness, ScriptedPrograms, ids, request

BROKEN = OrcdError(
    ErrorCode.SEAL_VERIFICATION_FAILED, "tensor x on the device is not the one that was sealed", field="x"
)


@pytest.fixture
def guard() -> ScriptedGuard:
    return ScriptedGuard()


@pytest.fixture
def harness(guard: ScriptedGuard) -> Iterator[Harness]:
    made = Harness(ScriptedPrograms(), guard=guard)
    yield made
    assert made.engine.stop(WAIT_S)


def failure_of(events: list[object]) -> OrcdError:
    last = events[-1]
    assert isinstance(last, Failed)
    return last.error


@pytest.mark.requirement("WORKER-4121")
def test_each_job_is_admitted_and_each_hand_off_settled(harness: Harness, guard: ScriptedGuard) -> None:
    events = harness.run("a", 5)
    assert isinstance(events[-1], Ended)
    assert guard.calls.count("admit") == 1
    assert guard.calls.count("settle") >= len(ids(events)) > 1
    assert guard.calls.count("turn") >= 5


@pytest.mark.requirement("WORKER-4121")
def test_a_job_that_is_not_admitted_gets_its_error_and_no_token(harness: Harness, guard: ScriptedGuard) -> None:
    guard.fail_at["admit"] = BROKEN
    events = harness.run("a", 5)
    assert [type(event) for event in events] == [Failed]
    assert failure_of(list(events)).code is ErrorCode.SEAL_VERIFICATION_FAILED
    harness.wait(lambda: bool(harness.fatal))
    assert harness.fatal == [BROKEN]


@pytest.mark.requirement("WORKER-4122")
@pytest.mark.parametrize("where", ["turn", "settle"])
def test_no_token_follows_a_broken_seal(guard: ScriptedGuard, where: str) -> None:
    gate = threading.Semaphore(6)
    harness = Harness(ScriptedPrograms(gate=gate), guard=guard)
    job = harness.engine.submit(request("a", 50))
    harness.wait(lambda: len(ids(harness.events.get(job, []))) >= 3)
    before = len(ids(harness.events[job]))
    guard.fail_at[where] = BROKEN
    gate.release(100)
    events = harness.finish(job)
    harness.wait(lambda: bool(harness.fatal))
    assert len(ids(events)) <= before + 2  # what was handed off while the test was told so
    assert failure_of(list(events)) is BROKEN
    assert sum(isinstance(event, Ended | Failed) for event in events) == 1
    with pytest.raises(OrcdError) as refused:
        harness.engine.submit(request("b"))
    assert refused.value is BROKEN
    assert harness.engine.stop(WAIT_S)


@pytest.mark.requirement("WORKER-4122")
def test_a_job_whose_end_was_not_handed_off_fails_instead(guard: ScriptedGuard) -> None:
    """Its last token and its end are made in the step after which the guard finds the seal broken."""
    gate = threading.Semaphore(0)
    harness = Harness(ScriptedPrograms(gate=gate), guard=guard)
    job = harness.engine.submit(request("a", 1))
    harness.wait(lambda: "admit" in guard.calls)
    guard.fail_at["settle"] = BROKEN
    gate.release(10)
    events = harness.finish(job)
    assert [type(event) for event in events] == [Failed]
    assert not any(isinstance(event, Tokens) for event in events)
    assert harness.engine.stop(WAIT_S)


@pytest.mark.requirement("WORKER-4121")
def test_an_idle_engine_gives_the_guard_its_turns(guard: ScriptedGuard) -> None:
    guard.pause_s = 0.0
    harness = Harness(ScriptedPrograms(), guard=guard)
    harness.wait(lambda: guard.calls.count("turn") > 20)
    assert guard.states[0] is not None
    assert harness.engine.stop(WAIT_S)


@pytest.mark.requirement("WORKER-4255")
def test_whoever_waits_for_a_proof_is_told_when_the_engine_ends(harness: Harness, guard: ScriptedGuard) -> None:
    told: list[OrcdError | None] = []
    harness.engine.prove(told.append)
    harness.wait(lambda: bool(guard.wishes))
    assert harness.engine.stop(WAIT_S)
    assert [error.code for error in told if error is not None] == [ErrorCode.CANCELLED]
    with pytest.raises(OrcdError):
        harness.engine.prove(told.append)


@pytest.mark.requirement("WORKER-4702")
def test_the_state_is_zeroed_at_the_end_and_only_then(harness: Harness) -> None:
    harness.run("a", 3)
    assert not harness.programs.wiped
    assert harness.engine.stop(WAIT_S)
    assert len(harness.programs.wiped) == 1
    assert harness.engine._state is None


@pytest.mark.requirement("WORKER-4970")
def test_an_engine_that_waits_for_the_device_is_seen_to_stall() -> None:
    now = [100.0]
    gate = threading.Semaphore(0)
    harness = Harness(ScriptedPrograms(gate=gate), clock=lambda: now[0])
    assert harness.engine.stalled_s() == 0
    job = harness.engine.submit(request("a", 3))
    harness.wait(lambda: harness.programs.calls == 3)  # the first step hangs
    now[0] = 142.0
    assert harness.engine.stalled_s() == 42.0
    gate.release(10)
    harness.finish(job)
    harness.wait(lambda: harness.engine.stalled_s() == 0)
    assert harness.engine.stop(WAIT_S)


@pytest.mark.requirement("WORKER-4122")
@pytest.mark.parametrize("broken", [False, True])
def test_values_that_are_not_numbers_make_the_weights_suspect(guard: ScriptedGuard, broken: bool) -> None:
    """A flipped exponent bit shows as NaN before the scrub comes to it: the job is told what is really wrong."""
    if broken:
        guard.fail_at["suspect"] = BROKEN
    harness = Harness(ScriptedPrograms(not_a_number_after=ord("c")), guard=guard)
    job = harness.engine.submit(request("a", 8))
    error = failure_of(list(harness.finish(job)))
    assert guard.calls.count("suspect") == 1
    assert error.code is (ErrorCode.SEAL_VERIFICATION_FAILED if broken else ErrorCode.INTERNAL)
    assert harness.engine.stop(WAIT_S)


@pytest.mark.requirement("WORKER-4122")
def test_what_could_not_be_settled_does_not_leave_whatever_the_reason(guard: ScriptedGuard) -> None:
    gate = threading.Semaphore(0)
    harness = Harness(ScriptedPrograms(gate=gate), guard=guard)
    job = harness.engine.submit(request("a", 1))
    harness.wait(lambda: "admit" in guard.calls)
    guard.fail_at["settle"] = OrcdError(ErrorCode.CUDA_ERROR, "the device failed in the proof")
    gate.release(10)
    assert [type(event) for event in harness.finish(job)] == [Failed]
    assert harness.engine.stop(WAIT_S)


@pytest.mark.requirement("WORKER-4972")
def test_a_device_that_hangs_in_the_proof_before_a_job_is_seen_to_stall(guard: ScriptedGuard) -> None:
    now, hang = [0.0], threading.Event()
    guard.admit = lambda: assert_set(hang)  # type: ignore[method-assign]
    harness = Harness(ScriptedPrograms(), clock=lambda: now[0], guard=guard)
    job = harness.engine.submit(request("a", 1))
    while harness.engine.stalled_s() < 30:  # only a clock that is read during the proof gets there
        assert now[0] < 10**7
        now[0] += 1
    hang.set()
    harness.finish(job)
    assert harness.engine.stop(WAIT_S)


def assert_set(event: threading.Event) -> None:
    assert event.wait(WAIT_S)
