"""Who tries tokens is slowed down; everybody else is not."""

from __future__ import annotations

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orcd_jax.server.admission import AuthOutcome, AuthResult
from orcd_jax.server.limits import AuthFailures, Limits, TokenBucket
from tests.server.fake_worker import STARTED, TOKEN, WAIT_S, Served, hang_after, serving
from tests.server.peer import SERVICE, Peer, bearer, details, enum_name, error_detail

READY = f"/{SERVICE.full_name}/Ready"
WRONG = bearer("x" * 32)
LIMITS = Limits(auth_failures=3, auth_failures_per_s=0.001)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def refusals(peer: Peer, count: int) -> list[grpc.RpcError]:
    return [peer.refusal_of(READY, metadata=WRONG) for _ in range(count)]


@pytest.mark.requirement("WORKER-4420")
@pytest.mark.requirement("WORKER-4423")
def test_after_too_many_failures_a_token_is_not_even_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[AuthOutcome] = []
    with serving(limits=LIMITS, on_auth=told.append) as served, Peer(served.port) as peer:
        assert {error.code() for error in refusals(peer, 3)} == {grpc.StatusCode.UNAUTHENTICATED}
        compared: list[bytes] = []

        def compare(one: bytes, other: bytes) -> bool:
            compared.append(one)
            return one == other

        monkeypatch.setattr("orcd_jax.server.auth.hmac.compare_digest", compare)
        error = peer.refusal_of(READY, metadata=WRONG)
        good = peer.refusal_of(READY, metadata=bearer(TOKEN))
    assert compared == []
    for refused in (error, good):
        assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        detail = error_detail(refused)
        assert enum_name(detail, "code") == "ERROR_CODE_BUSY"
        assert 0 < detail.retry_after_ms <= 1_000_000
        assert "google.rpc.RetryInfo" in details(refused)
    assert [outcome.result for outcome in told] == [AuthResult.FAILED] * 3 + [AuthResult.LIMITED] * 2


@pytest.mark.requirement("WORKER-4420")
@pytest.mark.requirement("WORKER-4423")
def test_a_holder_of_a_good_token_on_another_connection_is_not_held_up() -> None:
    with serving(limits=LIMITS) as served, Peer(served.port) as before, Peer(served.port) as attacker:
        assert before.unary("Ready").ready
        assert refusals(attacker, 5)[-1].code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        for _ in range(5):
            assert before.unary("Ready").ready
        with Peer(served.port) as after:  # of the same address, and never seen before
            for _ in range(5):
                assert after.unary("Ready").ready
        assert refusals(attacker, 1)[0].code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.requirement("WORKER-4420")
def test_who_mistyped_once_and_then_did_not_is_trusted_again() -> None:
    with serving(limits=LIMITS) as served, Peer(served.port) as clumsy, Peer(served.port) as attacker:
        refusals(clumsy, 1)
        assert clumsy.unary("Ready").ready
        assert refusals(attacker, 5)[-1].code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert clumsy.unary("Ready").ready


@pytest.mark.requirement("WORKER-4420")
def test_beyond_the_limit_a_guess_costs_a_connection_and_is_no_audit_event_of_its_own() -> None:
    told: list[AuthOutcome] = []
    with serving(limits=LIMITS, on_auth=told.append) as served:
        with Peer(served.port) as peer:
            refusals(peer, 3)
        for _ in range(3):
            with Peer(served.port) as peer:
                codes = [error.code() for error in refusals(peer, 2)]
                assert codes == [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.RESOURCE_EXHAUSTED]
    assert [outcome.result for outcome in told] == [AuthResult.FAILED] * 3 + [AuthResult.LIMITED] * 6


@pytest.mark.requirement("WORKER-4420")
def test_a_job_that_runs_on_the_connection_is_not_touched(served: Served) -> None:
    with serving(limits=LIMITS) as served, Peer(served.port) as peer:
        served.worker.script = hang_after(STARTED)
        job = peer.execute()
        next(job)
        refusals(peer, 5)
        assert not served.worker.closed.is_set()
        job.cancel()
        assert served.worker.closed.wait(WAIT_S)


# -- the table ---------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4420")
@pytest.mark.requirement("WORKER-4423")
def test_an_address_may_fail_again_when_the_time_has_come() -> None:
    clock = Clock()
    failures = AuthFailures(Limits(auth_failures=2, auth_failures_per_s=0.5), clock)
    assert [failures.note("10.0.0.1") for _ in range(3)] == [True, True, False]
    assert failures.wait_ms("10.0.0.1") == 2000
    assert failures.wait_ms("10.0.0.2") == 0
    clock.now += 1.5
    assert failures.wait_ms("10.0.0.1") == 500
    clock.now += 0.5
    assert failures.wait_ms("10.0.0.1") == 0
    assert failures.note("10.0.0.1")


@pytest.mark.requirement("WORKER-4420")
@pytest.mark.requirement("WORKER-4423")
def test_the_table_forgets_who_failed_longest_ago() -> None:
    failures = AuthFailures(Limits(auth_peers=3, auth_failures=1))
    for address in ("10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.1", "10.0.0.4"):
        failures.note(address)
    assert len(failures) == 3
    assert [failures.wait_ms(f"10.0.0.{host}") > 0 for host in (1, 2, 3, 4)] == [True, False, True, True]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:1:2:3", True),  # one host has a whole /64
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("10.0.0.1", "10.0.0.2", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("", "10.0.0.1", False),
    ],
)
def test_what_counts_as_one_peer(one: str, other: str, same: bool) -> None:
    failures = AuthFailures(Limits(auth_failures=1))
    failures.note(one)
    assert (failures.wait_ms(other) > 0) is same


@settings(deadline=None)
@given(st.lists(st.text(), max_size=50))
def test_whatever_an_address_is_the_table_stays_small(addresses: list[str]) -> None:
    failures = AuthFailures(Limits(auth_peers=4))
    for address in addresses:
        failures.note(address)
    assert len(failures) <= 4


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 20)), max_size=50))
def test_a_bucket_gives_no_more_than_it_had_and_gained(steps: list[tuple[float, float]]) -> None:
    clock = Clock()
    bucket = TokenBucket(10, 2, clock=clock)
    spent = 0.0
    for seconds, amount in steps:
        clock.now += seconds
        wait_s = bucket.wait_s(amount)
        if bucket.spend(amount):
            spent += amount
            assert wait_s == 0
        else:
            assert wait_s > 0
        assert spent <= 10 + 2 * (clock.now - 1000) + 1e-6


def test_what_is_earned_goes_above_the_burst_as_far_as_the_credit() -> None:
    clock = Clock()
    bucket = TokenBucket(10, 1, 5, clock)
    bucket.earn(100)
    clock.now += 1000
    assert not bucket.spend(15.5)
    assert bucket.spend(15)
    clock.now += 1000
    assert not bucket.spend(10.5), "time gives no more than the burst"
    assert bucket.spend(10)
