"""A flipped bit in any weight array of a running worker is found within the bound and named, and no token follows."""

from __future__ import annotations

import random
import time

import pytest

from orcd_jax.engine.request import Failed
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.worker.lifecycle import State
from tests.residency.bitflip import flip_bit
from tests.worker.running import WAIT_S, LongJob, Running, long_job
from tests.worker.trial import Trial, random_bit

FLIPS = 200
BOUND_S = 0.5
SLACK_S = 2.0  # of a machine that does other things too


@pytest.mark.slow
@pytest.mark.requirement("WORKER-4121")
@pytest.mark.requirement("WORKER-4122")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "under load"])
def test_every_flip_is_found_named_and_followed_by_no_token(running: Running, busy: bool) -> None:
    sealed = running.worker.sealed
    assert sealed is not None
    params = sealed.resident.params
    paths, chance = sorted(params), random.Random(f"flips {busy}")
    chosen = paths + [chance.choice(paths) for _ in range(FLIPS // 2 - len(paths))]  # every tensor at least once
    latencies = []
    for path in chosen[: max(len(paths), FLIPS // 2)]:
        trial = Trial(sealed, BOUND_S)
        if busy:
            trial.load(2)
            while len(trial.tokens) < 2 and trial.fatal is None:
                time.sleep(0.001)
        bit = random_bit(params[path], chance)
        flipped_s = time.monotonic()
        flip_bit(params[path], bit)
        try:
            error = trial.wait()
        finally:
            flip_bit(params[path], bit)
            assert trial.engine.stop(WAIT_S)
        assert (error.code, error.field) == (ErrorCode.SEAL_VERIFICATION_FAILED, path)
        assert all(failed.code is ErrorCode.SEAL_VERIFICATION_FAILED for failed in trial.failures)
        assert len(trial.failures) == (2 if busy else 0)
        assert all(token_s <= trial.fatal_s for token_s in trial.tokens)
        latencies.append(trial.fatal_s - flipped_s)
    assert max(latencies) <= BOUND_S + SLACK_S, sorted(latencies)[-5:]


@pytest.mark.requirement("WORKER-4122")
def test_a_worker_whose_weights_change_stops_and_says_which(fresh: Running) -> None:
    sealed = fresh.worker.sealed
    assert sealed is not None
    held = LongJob(fresh, long_job("a"))
    weights = sealed.resident.params["embed"]
    flip_bit(weights, 12345)
    error = fresh.run(fresh.worker.wait_failed())
    flip_bit(weights, 12345)
    assert (error.code, error.field) == (ErrorCode.SEAL_VERIFICATION_FAILED, "embed")
    assert fresh.worker.lifecycle.state is State.STOPPED
    ended = held.end()
    assert isinstance(ended, Failed)
    assert ended.error.code is ErrorCode.SEAL_VERIFICATION_FAILED
    assert not fresh.worker.ready().ready


@pytest.mark.requirement("WORKER-4122")
def test_what_was_made_and_not_yet_read_is_taken_back(fresh: Running) -> None:
    """A slow reader's unread tokens were made before the flip was found; they do not follow it."""
    held = LongJob(fresh, long_job("slow", max_tokens=20))
    fresh.until_end_is_unread("slow")
    read = len(held.events)
    fresh.run(_fail(fresh, OrcdError(ErrorCode.SEAL_VERIFICATION_FAILED, "embed differs", field="embed")))
    assert isinstance(held.end(), Failed)
    assert [type(event) for event in held.events[read:]] == [Failed]


async def _fail(running: Running, error: OrcdError) -> None:
    running.worker.fail(error)


@pytest.mark.requirement("WORKER-4255")
def test_an_attestation_of_changed_weights_stops_the_worker(fresh: Running) -> None:
    sealed = fresh.worker.sealed
    assert sealed is not None
    path = sorted(sealed.resident.params)[-1]
    flip_bit(sealed.resident.params[path], 7)
    with pytest.raises(OrcdError) as refused:
        fresh.run(fresh.worker.attest(bytes(32), ""))
    flip_bit(sealed.resident.params[path], 7)
    assert (refused.value.code, refused.value.field) == (ErrorCode.SEAL_VERIFICATION_FAILED, path)
    assert fresh.run(fresh.worker.wait_failed()).code is ErrorCode.SEAL_VERIFICATION_FAILED


@pytest.mark.requirement("WORKER-4255")
def test_an_attestation_is_made_while_jobs_run(fresh: Running) -> None:
    held = LongJob(fresh, long_job("b"))
    info = fresh.run(fresh.worker.attest(bytes(range(16)), ""))
    assert info.digest == info.handle.digest
    assert info.digest_began_at_ms <= info.digest_ended_at_ms
    assert not held.events[-1:] or not isinstance(held.events[-1], Failed)
    held.abandon()
