"""A client that does not read holds its job for a while, and nobody else's."""

from __future__ import annotations

import grpc
import pytest

from orcd_jax.server.limits import Limits
from tests.server.fake_worker import WAIT_S, Served, flood, play, serving
from tests.server.peer import Peer, execute_request, outcome
from tests.server.raw import Raw, framed

JOB = framed(execute_request().SerializeToString())
DEADLINE_EXCEEDED = grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
ALL = 2**31 - 1 - 65_535  # the most room a client can give


@pytest.mark.requirement("WORKER-4420")
def test_a_client_that_takes_no_more_messages_loses_its_job_and_is_told() -> None:
    with serving(limits=Limits(send_s=0.2)) as served:
        served.worker.script = flood("x" * 1000)
        with Raw(served.port) as raw:  # 64 KiB of room
            raw.call("Execute")
            raw.send(JOB, end=True)
            answer = raw.answer()
        assert answer.status == DEADLINE_EXCEEDED
        assert answer.said == "the client read nothing for 0.2 s; the call is over"
        assert served.worker.closed.is_set(), "the job outlived its call"


@pytest.mark.requirement("WORKER-4420")
def test_a_client_that_reads_nothing_off_the_socket_loses_its_connection() -> None:
    with serving(limits=Limits(send_s=0.2)) as served:
        served.worker.script = flood("x" * 100_000)
        with Raw(served.port, window=ALL) as raw:
            raw.call("Execute")
            raw.send(JOB, end=True)
            assert served.worker.closed.wait(WAIT_S)
            answer = raw.answer()  # what was on its way, then the end of the connection
        assert not answer.ended
        assert "grpc-status" not in answer.headers


@pytest.mark.requirement("WORKER-4420")
def test_others_are_served_meanwhile(served: Served, peer: Peer) -> None:
    served.worker.script = flood("x" * 1000)
    with Raw(served.port) as raw:
        raw.call("Execute")
        raw.send(JOB, end=True)
        assert served.worker.running.wait(WAIT_S)
        served.worker.script = play()
        for _ in range(100):
            assert peer.unary("Ready").ready
        outcome(peer.execute())
        assert len(served.worker.executed) == 2
