"""A job ends when it is cancelled, when its client goes away, and at its deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing

import grpc
import pytest
from grpclib.client import Channel

from orcd_jax.api.orcd.worker import v1
from orcd_jax.server.auth import fingerprint
from tests.server.fake_worker import OTHER_TOKEN, STARTED, TOKEN, WAIT_S, Served, hang_after, play
from tests.server.peer import Peer, bearer, error_detail, execute_request, message, outcome
from tests.server.raw import Raw, framed

DEADLINE_EXCEEDED = grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
JOB = framed(execute_request().SerializeToString())


def cancel_request(job_id: str = "job", tenant: str = "") -> object:
    return message("CancelRequest", job_id=job_id, tenant=tenant)


# -- Cancel ------------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4250")
@pytest.mark.requirement("WORKER-4251")
def test_the_answer_is_the_same_for_an_own_a_foreign_and_an_unknown_job(served: Served, peer: Peer) -> None:
    served.worker.script = hang_after(STARTED)
    job = peer.execute(tenant="acme")
    next(job)
    answers = [
        peer.unary("Cancel", cancel_request("job", "acme")),
        peer.unary("Cancel", cancel_request("job", "acme")),
        peer.unary("Cancel", cancel_request("job", "acme"), metadata=bearer(OTHER_TOKEN)),
        peer.unary("Cancel", cancel_request("none", "acme")),
    ]
    assert [answer.SerializeToString() for answer in answers] == [b""] * 4
    job.cancel()


@pytest.mark.requirement("WORKER-4250")
def test_token_and_tenant_are_the_identity_that_cancels(served: Served, peer: Peer) -> None:
    peer.unary("Cancel", cancel_request("job", "acme"))
    peer.unary("Cancel", cancel_request("job"))
    peer.unary("Cancel", cancel_request("job", "acme"), metadata=bearer(OTHER_TOKEN))
    one, other = fingerprint(TOKEN), fingerprint(OTHER_TOKEN)
    assert served.worker.cancelled == [("job", f"{one}/acme"), ("job", f"{one}/"), ("job", f"{other}/acme")]


@pytest.mark.parametrize(
    ("job_id", "tenant", "field"),
    [("", "", "job_id"), ("a b", "", "job_id"), ("x" * 257, "", "job_id"), ("job", "a b", "tenant")],
)
def test_what_to_cancel_must_be_identifiers(served: Served, peer: Peer, job_id: str, tenant: str, field: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        peer.unary("Cancel", cancel_request(job_id, tenant))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error_detail(caught.value).field == field
    assert served.worker.cancelled == []


# -- the client goes away ----------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4254")
def test_cancelling_the_call_closes_the_job(served: Served, peer: Peer) -> None:
    served.worker.script = hang_after(STARTED)
    job = peer.execute()
    next(job)
    assert not served.worker.closed.is_set()
    job.cancel()
    assert served.worker.closed.wait(WAIT_S)


@pytest.mark.requirement("WORKER-4254")
def test_cancelling_the_call_before_the_job_started_closes_it_too(served: Served, peer: Peer) -> None:
    served.worker.script = hang_after()
    job = peer.execute()
    assert served.worker.running.wait(WAIT_S)
    job.cancel()
    assert served.worker.closed.wait(WAIT_S)


@pytest.mark.requirement("WORKER-4254")
def test_closing_the_channel_closes_the_job(served: Served) -> None:
    served.worker.script = hang_after(STARTED)
    with Peer(served.port) as peer:
        next(peer.execute())
    assert served.worker.closed.wait(WAIT_S)


@pytest.mark.requirement("WORKER-4254")
@pytest.mark.parametrize("leave", [Raw.reset, Raw.close], ids=["the stream is reset", "the connection is lost"])
def test_a_client_that_vanishes_closes_the_job(served: Served, leave: Callable[[Raw], None]) -> None:
    served.worker.script = hang_after(STARTED)
    with Raw(served.port) as raw:
        raw.call("Execute")
        raw.send(JOB, end=True)
        assert served.worker.running.wait(WAIT_S)
        leave(raw)
        assert served.worker.closed.wait(WAIT_S)


@pytest.mark.requirement("WORKER-4254")
def test_leaving_the_stream_of_our_own_client_closes_the_job(served: Served) -> None:
    served.worker.script = hang_after(STARTED)

    async def leave() -> None:
        async with Channel("127.0.0.1", served.port) as channel:
            events = v1.WorkerStub(channel, metadata=dict(bearer())).execute(
                v1.ExecuteRequest(job_id="job", prompt_text="hello", max_tokens=8)
            )
            async with aclosing(events):  # type: ignore[type-var]  # a generator
                async for event in events:
                    assert event.started is not None
                    break

    asyncio.run(leave())
    assert served.worker.closed.wait(WAIT_S)


@pytest.mark.requirement("WORKER-4254")
def test_cancelling_the_task_of_our_own_client_closes_the_job(served: Served) -> None:
    served.worker.script = hang_after(STARTED)

    async def cancel() -> None:
        started = asyncio.Event()

        async def run(channel: Channel) -> None:
            stub = v1.WorkerStub(channel, metadata=dict(bearer()))
            async for _ in stub.execute(v1.ExecuteRequest(job_id="job", prompt_text="hello", max_tokens=8)):
                started.set()

        async with Channel("127.0.0.1", served.port) as channel:
            running = asyncio.create_task(run(channel))
            await started.wait()
            running.cancel()
            assert await asyncio.to_thread(served.worker.closed.wait, WAIT_S)

    asyncio.run(cancel())


def test_a_job_that_fails_while_it_is_closed_leaves_the_server_well(served: Served, peer: Peer) -> None:
    served.worker.script = hang_after(STARTED)
    served.worker.close_error = ValueError("it went wrong at the end")
    job = peer.execute()
    next(job)
    job.cancel()
    assert served.worker.closed.wait(WAIT_S)
    served.worker.script, served.worker.close_error = play(STARTED), None
    assert next(peer.execute()).WhichOneof("event") == "started"


# -- deadlines ---------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4240")
@pytest.mark.requirement("WORKER-4242")
def test_the_calls_own_deadline_ends_the_job(served: Served) -> None:
    served.worker.script = hang_after(STARTED)
    with Raw(served.port) as raw:
        raw.call("Execute", timeout="500m")
        raw.send(JOB, end=True)
        answer = raw.answer()
    assert answer.status == DEADLINE_EXCEEDED
    assert answer.data
    assert served.worker.closed.wait(WAIT_S)


def test_a_deadline_that_passes_is_deadline_exceeded_for_the_official_client(served: Served, peer: Peer) -> None:
    served.worker.script = hang_after(STARTED)
    events, error = outcome(peer.execute(timeout=0.5))
    assert len(events) == 1
    assert error is not None
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert served.worker.closed.wait(WAIT_S)


@pytest.mark.requirement("WORKER-4240")
@pytest.mark.requirement("WORKER-4242")
@pytest.mark.parametrize(
    ("call_s", "field_ms", "least", "most"),
    [
        (None, 1500, 1500, 1500),
        (30.0, None, 20_000, 30_000),
        (30.0, 1500, 1500, 1500),
        (30.0, 60_000, 20_000, 30_000),
        (30.0, 0, 20_000, 30_000),
    ],
)
def test_the_earlier_of_the_field_and_the_call_reaches_the_worker(
    served: Served, peer: Peer, call_s: float | None, field_ms: int | None, least: int, most: int
) -> None:
    outcome(peer.execute(deadline_ms=field_ms, timeout=call_s))
    ((params, _),) = served.worker.executed
    assert params.timeout_ms is not None
    assert least <= params.timeout_ms <= most


def test_without_a_deadline_the_workers_own_limit_is_left_to_the_worker(served: Served, peer: Peer) -> None:
    outcome(peer.execute(timeout=None))
    ((params, _),) = served.worker.executed
    assert params.timeout_ms is None
