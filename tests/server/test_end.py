"""Drain, Shutdown, and the end of the server."""

from __future__ import annotations

import socket

import grpc
import pytest

from orcd_jax.worker.lifecycle import State
from tests.server.fake_worker import STARTED, STATUS, WAIT_S, Served, hang_after, serving
from tests.server.peer import Peer, bearer_for, error_detail, message

MOST_MS = 20_000  # as the fake worker is configured


def drain(served: Served, peer: Peer, **fields: int) -> int:
    """Jobs left, from a drain that ends at once."""
    served.on_loop(served.worker.drain_may_end.set)
    left: int = peer.unary("Drain", message("DrainRequest", **fields)).jobs_left
    return left


@pytest.mark.parametrize(
    ("fields", "timeout_s"),
    [
        ({}, MOST_MS / 1000),
        ({"timeout_ms": 0}, 0.0),
        ({"timeout_ms": 1500}, 1.5),
        ({"timeout_ms": MOST_MS}, MOST_MS / 1000),
        ({"timeout_ms": 2**64 - 1}, MOST_MS / 1000),
    ],
)
def test_a_drain_takes_as_long_as_asked_but_no_longer_than_the_worker_allows(
    served: Served, peer: Peer, fields: dict[str, int], timeout_s: float
) -> None:
    served.move(State.LOADING, State.READY)
    drain(served, peer, **fields)
    assert served.worker.drained == [timeout_s]


def test_a_drain_answers_when_it_is_over_with_the_jobs_that_are_left(served: Served, peer: Peer) -> None:
    served.move(State.LOADING, State.READY)
    assert drain(served, peer) == STATUS.slots_used


def test_the_worker_answers_others_while_it_drains(served: Served, peer: Peer) -> None:
    served.move(State.LOADING, State.READY)
    draining = peer.channel.unary_unary("/orcd.worker.v1.Worker/Drain").future(
        b"", metadata=bearer_for("Drain"), timeout=WAIT_S
    )
    health = peer.channel.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=WAIT_S)
    for answer in health:
        if answer == b"\x08\x02":  # NOT_SERVING: the drain began
            break
    assert peer.unary("Ready").ready
    assert not draining.done()
    served.on_loop(served.worker.drain_may_end.set)
    draining.result(WAIT_S)
    health.cancel()


def test_a_worker_that_drains_may_be_asked_to_again(served: Served, peer: Peer) -> None:
    served.move(State.LOADING, State.READY, State.DRAINING)
    drain(served, peer)


@pytest.mark.parametrize("states", [(), (State.LOADING,), (State.LOADING, State.STOPPED)])
def test_a_worker_that_takes_no_jobs_cannot_drain(served: Served, peer: Peer, states: tuple[State, ...]) -> None:
    served.move(*states)
    with pytest.raises(grpc.RpcError) as caught:
        drain(served, peer)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert error_detail(caught.value).retriable
    assert served.worker.drained == []


def test_shutdown_asks_the_process_to_end_and_answers_at_once(served: Served, peer: Peer) -> None:
    assert not served.shutdown.is_set()
    peer.unary("Shutdown")
    assert served.shutdown.is_set()


def test_without_somebody_to_ask_shutdown_is_unimplemented() -> None:
    with serving(with_shutdown=False) as served, Peer(served.port) as peer:
        with pytest.raises(grpc.RpcError) as caught:
            peer.unary("Shutdown")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "SIGTERM" in caught.value.details()


def test_closing_the_server_ends_jobs_and_connections(served: Served, peer: Peer) -> None:
    served.worker.script = hang_after(STARTED)
    job = peer.execute()
    next(job)
    served.on_loop(served.server.close)
    with pytest.raises(grpc.RpcError) as caught:
        next(job)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert served.worker.closed.wait(WAIT_S)


def test_closing_the_server_ends_connections_without_calls(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=WAIT_S) as idle:
        assert idle.recv(1)  # its settings: it is connected
        served.on_loop(served.server.close)
        while idle.recv(4096):
            pass


def test_an_address_in_use_is_an_os_error(served: Served) -> None:
    from orcd_jax.server.auth import Tokens
    from orcd_jax.server.grpc_server import start_server

    starting = start_server(served.worker, host="127.0.0.1", port=served.port, tokens=Tokens(["t" * 32]))
    with pytest.raises(OSError, match="in use"):
        served.wait(starting)
