"""A token that is taken away ends the calls that it opened, and no others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import grpc
import pytest

from orcd_jax.checkpoint.progress import Progress
from orcd_jax.engine.request import Tokens
from orcd_jax.server.auth import Access, fingerprint
from orcd_jax.server.limits import Limits
from orcd_jax.worker.types import CommitEvent, CommitParams, ExecuteParams, WorkerEvent
from tests.server.fake_worker import ENDED, STARTED, WAIT_S, FakeWorker, Served, hang_after, serving
from tests.server.peer import Peer, bearer, enum_name, error_detail, outcome
from tests.server.raw import Raw
from tests.server.test_access import write
from tests.server.test_connections import JOB, REFLECT, never, until

OLD, NEW, KEPT, CONTROL = (letter * 32 for letter in "abcd")
WORDS = "the token of this call is not valid any more: call with a new one"


class Rotated:
    """A server whose token files a test changes."""

    def __init__(self, served: Served, access: Access, execute: Path, control: Path) -> None:
        self.served, self.execute, self.control = served, execute, control
        self._access = access

    def reload(self, before: Callable[[], None] = lambda: None) -> int:
        """What SIGHUP does; how many calls were ended. ``before``: what happens in the same moment."""

        def at_once() -> int:
            before()
            return self.served.server.revoke(self._access.reload().went)

        return self.served.on_loop(at_once)


@pytest.fixture
def rotated(tmp_path: Path) -> Iterator[Rotated]:
    execute, control = write(tmp_path / "execute", OLD, KEPT), write(tmp_path / "control", CONTROL)
    access = Access.from_files(execute, control)
    with serving(access=access, limits=Limits(auth_failures=3, auth_failures_per_s=0.001)) as served:
        served.worker.script = hang_after(STARTED, Tokens(0, (11,), "a"))
        yield Rotated(served, access, execute, control)


@pytest.mark.requirement("WORKER-4201")
@pytest.mark.requirement("WORKER-4245")
def test_a_job_of_a_token_that_is_gone_ends_with_an_error_and_the_same_status(rotated: Rotated) -> None:
    with Peer(rotated.served.port) as peer:
        job = peer.execute(metadata=bearer(OLD))
        begun = [next(job), next(job)]
        write(rotated.execute, NEW, KEPT)
        assert rotated.reload() == 1
        rest, error = outcome(job)
        assert rotated.served.worker.closed.wait(WAIT_S), "the job was not cancelled"
    assert [event.WhichOneof("event") for event in (*begun, *rest)] == ["started", "token", "error"]
    assert error is not None
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAUTHENTICATED, WORDS)
    for told in (rest[0].error, error_detail(error)):
        assert (enum_name(told, "code"), told.message) == ("ERROR_CODE_AUTH_FAILED", WORDS)


@pytest.mark.requirement("WORKER-4201")
def test_jobs_of_tokens_that_stay_go_on_and_the_new_token_opens_others(rotated: Rotated) -> None:
    may_end = rotated.served.on_loop(asyncio.Event)

    async def story(params: ExecuteParams) -> AsyncIterator[WorkerEvent]:
        yield STARTED
        await may_end.wait()
        yield Tokens(0, (1,), "b")
        yield ENDED

    rotated.served.worker.script = story
    with Peer(rotated.served.port) as peer:
        kept = peer.execute(metadata=bearer(KEPT), job_id="kept")
        gone = peer.execute(metadata=bearer(OLD), job_id="gone")
        assert next(kept)
        assert next(gone)
        write(rotated.execute, NEW, KEPT)
        assert rotated.reload() == 1
        assert outcome(gone)[1].code() is grpc.StatusCode.UNAUTHENTICATED  # type: ignore[union-attr]  # it failed
        rotated.served.on_loop(may_end.set)
        events, error = outcome(kept)
        assert [event.WhichOneof("event") for event in events] == ["token", "end"]
        assert error is None
        assert peer.unary("Ready", metadata=bearer(NEW)).ready
        assert peer.unary("Ready", metadata=bearer(KEPT)).ready
        with pytest.raises(grpc.RpcError):
            peer.unary("Ready", metadata=bearer(OLD))


@pytest.mark.requirement("WORKER-4201")
def test_files_that_did_not_change_end_nothing(rotated: Rotated) -> None:
    with Peer(rotated.served.port) as peer:
        job = peer.execute(metadata=bearer(OLD))
        next(job)
        assert rotated.reload() == 0
        assert not rotated.served.worker.closed.is_set()
        job.cancel()


@pytest.mark.requirement("WORKER-4201")
def test_a_client_that_reads_nothing_is_ended_too(rotated: Rotated) -> None:
    """Its event has no room on the stream, but its status has."""

    async def much(params: ExecuteParams) -> AsyncIterator[WorkerEvent]:
        yield STARTED
        yield Tokens(0, (1,), "x" * 10_000)

    rotated.served.worker.script = much
    with Raw(rotated.served.port, window=200) as raw:
        raw.ask("Execute", JOB, metadata=bearer(OLD))
        raw.read_until(lambda: len(raw.answers[1].data) >= 200)
        write(rotated.execute, KEPT)
        assert rotated.reload() == 1
        assert raw.answer().status == grpc.StatusCode.UNAUTHENTICATED.value[0]
        assert rotated.served.worker.closed.wait(WAIT_S)


@pytest.mark.requirement("WORKER-4201")
def test_a_job_ends_though_a_token_came_in_the_same_moment(rotated: Rotated) -> None:
    """``asyncio.wait_for`` of Python 3.11 forgets a cancellation when what it waits for is there."""
    came = rotated.served.on_loop(asyncio.Event)

    async def story(params: ExecuteParams) -> AsyncIterator[WorkerEvent]:
        yield STARTED
        await asyncio.wait_for(came.wait(), WAIT_S)
        for index in range(1000):
            yield Tokens(index, (1,), "b")
            await asyncio.sleep(0)
        await asyncio.Event().wait()

    rotated.served.worker.script = story
    with Peer(rotated.served.port) as peer:
        job = peer.execute(metadata=bearer(OLD))
        next(job)
        write(rotated.execute, KEPT)
        assert rotated.reload(before=came.set) == 1
        rest, error = outcome(job)
    assert error is not None
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert [event.WhichOneof("event") for event in rest][-1] == "error"
    assert len(rest) < 1000


@pytest.mark.requirement("WORKER-4201")
def test_a_commit_ends_in_its_own_words(rotated: Rotated, monkeypatch: pytest.MonkeyPatch) -> None:
    async def commit(worker: FakeWorker, params: CommitParams) -> AsyncIterator[CommitEvent]:
        yield Progress("digest", 1, 2)
        await asyncio.Event().wait()

    monkeypatch.setattr(FakeWorker, "commit", commit)
    with Peer(rotated.served.port) as peer:
        load = peer.stream("Commit", metadata=bearer(CONTROL))
        assert next(load).WhichOneof("event") == "progress"
        write(rotated.control, NEW)
        assert rotated.reload() == 1
        events, error = outcome(load)
        assert [event.WhichOneof("event") for event in events] == ["error"]
        assert error is not None
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.requirement("WORKER-4201")
def test_a_reflection_that_would_never_end_ends(rotated: Rotated) -> None:
    with Peer(rotated.served.port) as peer:
        served = rotated.served
        call = peer.channel.stream_stream(REFLECT)(never(served.shutdown), metadata=bearer(OLD), timeout=WAIT_S)
        served.wait(until(lambda: len(served.server.gate._permits) == 1))
        write(rotated.execute, KEPT)
        assert rotated.reload() == 1
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.requirement("WORKER-4201")
def test_a_token_that_changes_its_role_ends_what_it_opened_in_the_other(rotated: Rotated) -> None:
    with Peer(rotated.served.port) as peer:
        job = peer.execute(metadata=bearer(OLD))
        next(job)
        write(rotated.execute, KEPT)
        write(rotated.control, CONTROL, OLD)
        assert rotated.reload() == 1
        error = outcome(job)[1]
        assert error is not None
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.requirement("WORKER-4201")
def test_another_token_with_the_old_one_s_fingerprint_is_not_the_old_one(
    rotated: Rotated, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Peer(rotated.served.port) as peer:
        job = peer.execute(metadata=bearer(OLD))
        next(job)
        write(rotated.execute, NEW, KEPT)
        name = fingerprint(OLD)
        monkeypatch.setattr(
            "orcd_jax.server.auth.fingerprint", lambda token: name if token == NEW else fingerprint(token)
        )
        assert rotated.reload() == 1
        error = outcome(job)[1]
        assert error is not None
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.requirement("WORKER-4201")
@pytest.mark.requirement("WORKER-4423")
def test_a_connection_is_not_trusted_for_a_token_that_is_gone(rotated: Rotated) -> None:
    """A good token lets a connection try again, however often its address failed. One that was good once does not."""
    with Raw(rotated.served.port) as raw, Peer(rotated.served.port) as guesser:
        raw.ask("Ready", metadata=bearer(OLD))
        assert raw.answer().status == 0
        for _ in range(3):
            guesser.refusal_of("/orcd.worker.v1.Worker/Ready", metadata=bearer("x" * 32))
        raw.ask("Ready", stream=3, metadata=bearer(OLD))
        assert raw.answer(3).status == 0, "trusted"
        write(rotated.execute, KEPT)
        assert rotated.reload() == 0
        raw.ask("Ready", stream=5, metadata=bearer(OLD))
        assert raw.answer(5).status == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]


@pytest.mark.requirement("WORKER-4201")
def test_calls_that_ended_are_forgotten(rotated: Rotated) -> None:
    with Peer(rotated.served.port) as peer:
        for _ in range(3):
            assert peer.unary("Ready", metadata=bearer(OLD)).ready
        job = peer.execute(metadata=bearer(OLD))
        next(job)
        job.cancel()
        served = rotated.served
        served.wait(until(lambda: not served.server.gate._permits))
        write(rotated.execute, KEPT)
        assert rotated.reload() == 0
