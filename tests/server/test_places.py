"""Nobody takes every place: connections and watches are bounded for one address. Who is turned away fills no log."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orcd_jax.config import ConfigError
from orcd_jax.server.limits import CONNECTIONS, Limits, Seldom
from orcd_jax.server.places import Places, Refusal
from orcd_jax.server.tls import server_context
from tests.configured import parsed
from tests.server.fake_worker import WAIT_S, Served, serving
from tests.server.peer import Peer, error_detail
from tests.server.raw import Raw, call_headers, framed
from tests.server.test_connections import until
from tests.server.test_tls import Authority

# All of them are this host's, and each is a peer of its own.
ONE, TWO, THREE = "127.0.0.1", "127.0.0.2", "127.0.0.3"
WATCH, CHECK = "/grpc.health.v1.Health/Watch", "/grpc.health.v1.Health/Check"


@contextlib.contextmanager
def dialled(served: Served, address: str) -> Iterator[socket.socket]:
    """A connection from an address of our choice."""
    with socket.create_connection(("127.0.0.1", served.port), WAIT_S, source_address=(address, 0)) as sock:
        yield sock


def is_taken(sock: socket.socket) -> bool:
    """Whether the server speaks; else it has closed the connection."""
    try:
        return sock.recv(9) != b""
    except ConnectionResetError:
        return False


@pytest.mark.requirement("WORKER-4420")
def test_one_address_cannot_take_the_places_of_others() -> None:
    told: list[Refusal] = []
    limits = Limits(connections=4, connections_per_peer=2)
    with serving(limits=limits, on_refused=told.append) as served, contextlib.ExitStack() as opened:

        def dial(address: str) -> bool:
            return is_taken(opened.enter_context(dialled(served, address)))

        assert [dial(ONE) for _ in range(4)] == [True, True, False, False]
        assert [dial(TWO) for _ in range(3)] == [True, True, False]
        assert dial(THREE) is False, "all are taken"
        assert served.on_loop(lambda: Counter(told)) == {Refusal.PEER: 3, Refusal.FULL: 1}


@pytest.mark.requirement("WORKER-4420")
def test_a_connection_that_ends_gives_its_place_back() -> None:
    with serving(limits=Limits(connections_per_peer=1)) as served:
        for _ in range(3):
            with dialled(served, ONE) as sock:
                assert is_taken(sock)
                with dialled(served, ONE) as second:
                    assert not is_taken(second)
            served.wait(until(lambda: not len(served.server._places)))


@pytest.mark.requirement("WORKER-4420")
def test_handshakes_that_never_end_take_the_places_of_their_own_address_alone(tmp_path: Path) -> None:
    ours = Authority(tmp_path, "our")
    limits = Limits(connections_per_peer=2, handshake_s=0.5)
    with serving(tls=server_context(*ours.issue("server")), limits=limits) as served:
        with dialled(served, TWO) as one, dialled(served, TWO) as two, dialled(served, TWO) as three:
            assert not is_taken(three)
            trusting = grpc.ssl_channel_credentials(ours.file.read_bytes())
            with Peer(served.port, trusting) as peer:
                assert peer.unary("Ready").ready
            for sock in (one, two):
                assert not is_taken(sock), "the handshake took longer than it may"
        served.wait(until(lambda: not len(served.server._places)))


@pytest.mark.requirement("WORKER-4420")
def test_who_is_turned_away_over_and_over_is_logged_once(
    all_log_lines: Callable[[], list[dict[str, object]]],
) -> None:
    with serving(limits=Limits(connections_per_peer=1)) as served, dialled(served, ONE) as held:
        assert is_taken(held)
        for _ in range(5):
            with dialled(served, ONE) as sock:
                assert not is_taken(sock)
    (line,) = [line for line in all_log_lines() if line["level"] == "warning"]
    assert line["human"] == "1 connections of one address are open, as many as may be: it gets no more."
    assert (line["peer"], line["reason"]) == (ONE, "peer")


@pytest.mark.requirement("WORKER-4420")
def test_connections_that_break_a_rule_over_and_over_are_logged_once(
    all_log_lines: Callable[[], list[dict[str, object]]],
) -> None:
    with serving() as served:
        for _ in range(5):
            with Raw(served.port, greet=False) as raw:
                raw.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                raw.read_to_the_end()
    (line,) = [line for line in all_log_lines() if line["level"] == "warning"]
    assert line["human"] == "A client's connection was closed: not HTTP/2."


@pytest.mark.requirement("WORKER-4420")
def test_who_connects_over_and_over_does_not_keep_the_loop_from_the_calls() -> None:
    """All wait to be taken at once; between any two of them the others have a turn."""
    waiting, turns, taken = 60, list[int](), list[Refusal]()
    with serving(limits=Limits(connections=0), on_refused=taken.append) as served, contextlib.ExitStack() as opened:
        go, blocked = threading.Event(), threading.Event()

        def block() -> None:
            blocked.set()
            assert go.wait(WAIT_S)
            count()

        def count() -> None:
            turns.append(len(taken))
            if len(taken) < waiting:
                served.loop.call_soon(count)

        served.loop.call_soon_threadsafe(block)
        assert blocked.wait(WAIT_S)
        for _ in range(waiting):
            opened.enter_context(dialled(served, ONE))
        go.set()
        served.wait(until(lambda: turns[-1:] == [waiting]))
    assert max(later - earlier for earlier, later in itertools.pairwise(turns)) == 1


@pytest.mark.requirement("WORKER-4420")
def test_watches_of_one_address_leave_room_for_those_of_others() -> None:
    with serving(limits=Limits(watches_per_peer=2)) as served, Peer(served.port) as peer:
        watches = [peer.channel.unary_stream(WATCH)(b"", timeout=WAIT_S) for _ in range(2)]
        assert [next(watch) for watch in watches] == [b"\x08\x02"] * 2
        error = peer.refusal_of(WATCH, metadata=())
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error_detail(error).message == (
            "2 watches of this address are open, as many as may be: use Check, or end one"
        )
        with Raw(served.port, source=TWO) as other:
            headers = [(name, WATCH if name == ":path" else value) for name, value in call_headers("")]
            other.write(other.any_headers(headers))
            other.send(framed(b""), end=True)
            other.read_until(lambda: bool(other.answers[1].data))
            assert other.answers[1].data == framed(b"\x08\x02")
        assert peer.channel.unary_unary(CHECK)(b"", timeout=WAIT_S) == b"\x08\x02"


# -- strangers ---------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4420")
def test_a_message_of_a_call_without_a_token_is_small() -> None:
    """What is being received is bounded for all together: nobody without a token may use that up."""
    with serving(limits=Limits(open_message_bytes=100)) as served, Peer(served.port) as peer:
        error = peer.refusal_of(CHECK, metadata=(), body=bytes(101))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.details() == "the message has 101 bytes; the limit is 100"
        assert peer.unary("Tokenize").token_ids == [], "with one it may be large"


@pytest.mark.requirement("WORKER-4420")
def test_a_client_that_never_had_a_token_does_not_keep_an_idle_connection() -> None:
    with serving(limits=Limits(first_request_s=0.2, idle_s=600)) as served, Peer(served.port) as peer:
        assert peer.channel.unary_unary(CHECK)(b"", timeout=WAIT_S) == b"\x08\x02"
        served.wait(until(lambda: not served.server._connections))
        assert peer.unary("Ready").ready
        served.wait(asyncio.sleep(0.4))
        assert served.on_loop(lambda: len(served.server._connections)) == 1


# -- what counts -------------------------------------------------------------------------------------------------------

ADDRESSES = ("10.0.0.1", "10.0.0.2", "2001:db8::1", "2001:db8::2", "2001:db8:0:1::1", "::ffff:10.0.0.1")
PEERS = (0, 1, 2, 2, 3, 0)  # one host of IPv6 has a whole /64, and IPv4 in IPv6 is IPv4


@given(st.lists(st.tuples(st.booleans(), st.integers(0, len(ADDRESSES) - 1)), max_size=60))
def test_no_peer_and_not_all_together_hold_more_than_they_may(steps: list[tuple[bool, int]]) -> None:
    places, held = Places(5, 2), list[int]()
    for comes, which in steps:
        of_peer = sum(PEERS[other] == PEERS[which] for other in held)
        if comes:
            expected = Refusal.PEER if of_peer == 2 else Refusal.FULL if len(held) == 5 else None
            assert places.take(ADDRESSES[which]) is expected
            if expected is None:
                held.append(which)
        elif which in held:
            held.remove(which)
            places.leave(ADDRESSES[which])
        assert len(places) == len(held)
    for which in held:
        places.leave(ADDRESSES[which])
    assert not places._of, "who holds nothing is forgotten"


@pytest.mark.requirement("WORKER-4420")
@pytest.mark.parametrize("given", [0, CONNECTIONS + 1])
def test_the_flag_and_the_server_agree_on_how_many_there_may_be(given: int) -> None:
    config, limits = parsed("--standalone", f"--connections_per_peer={CONNECTIONS}"), Limits()
    assert config.connections_per_peer == limits.connections
    assert parsed("--standalone").connections_per_peer == limits.connections_per_peer
    with pytest.raises(ConfigError, match=f"it must be an integer from 1 to {CONNECTIONS}"):
        parsed("--standalone", f"--connections_per_peer={given}")


def test_one_of_many_is_told_with_how_many_it_stands_for() -> None:
    now = [100.0]
    seldom = Seldom(60, clock=lambda: now[0])
    assert [seldom.told("No.") for _ in range(3)] == ["No.", "", ""]
    now[0] += 59.9
    assert seldom.told("No.") == ""
    now[0] += 0.1
    assert seldom.told("No.") == "No. (4 times since the last such line)"
    now[0] += 60
    assert seldom.told("No.") == "No."
