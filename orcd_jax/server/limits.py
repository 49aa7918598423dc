"""Every number that bounds what a client may take, and the buckets that count against them (WORKER-4420)."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

Clock = Callable[[], float]

CONNECTIONS = 128
"""Connections to the gRPC server at once."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the gRPC server lets its clients take. Times are in seconds, sizes in bytes."""

    # An orchestrator needs one connection, a person with tools a few. Each may hold a receive window and its streams.
    connections: int = CONNECTIONS
    # Of one address, so that no one takes them all: the default leaves room for three others that try.
    connections_per_peer: int = 32
    # Calls that run at once on one connection: every slot of a GPU (64) four times over. As many again may be ending.
    streams: int = 256
    # Health watches need no token and never end: one for each supervisor there could be.
    watches: int = 32
    watches_per_peer: int = 8
    # Of the headers of one call, uncompressed: the longest token, a correlation id and a trace context, twice over.
    # Decoding them takes up to 0.4 ms a KiB on the event loop.
    header_bytes: int = 8 * 2**10
    # One message: 100 000 characters or a million token ids.
    message_bytes: int = 4 * 2**20
    # One of a call that needs no token: the name of a service. What is being received is bounded for all together, and
    # a stranger must not use that up.
    open_message_bytes: int = 2**10
    # Messages that are being received, of all clients together: sixteen of the largest.
    receiving_bytes: int = 64 * 2**20
    # What a client may send that nobody has read yet, on a connection and on one of its streams.
    connection_window: int = 2**20
    stream_window: int = 2**18
    # TCP to TLS: a few round trips.
    handshake_s: float = 10.0
    # A new connection's first call, and the next one of a client that never had a valid token. Clients connect because
    # they have a call.
    first_request_s: float = 20.0
    # A connection without calls. Clients come back when they need it.
    idle_s: float = 600.0
    # From a call's headers to the end of its message: the largest at 1 Mbit/s.
    request_s: float = 30.0
    # A client that takes nothing off the socket, or gives no room on a stream. HTTP/2 has no write timeout.
    send_s: float = 30.0
    # For the last bytes to leave a connection that is being closed.
    close_s: float = 2.0
    # Silence of the network after which the kernel asks whether the other end is still there.
    keepalive_s: int = 60
    # Frames that carry nothing (WINDOW_UPDATE, PING, SETTINGS, RST_STREAM, small or empty DATA, …), at once and each
    # second, in units of FRAME_COST in frames.py. A frame takes 20 to 35 µs of the event loop: 4000 are 0.1 s.
    frame_burst: float = 4000.0
    frame_rate: float = 400.0
    # What each message frame that we send earns its reader, who answers with window updates and pings; headers earn 1.
    frames_per_sent: float = 4.0
    # Most that is earned so: what a client answers that reads 10 000 messages at a time.
    frame_credit: float = 40_000.0
    # How long one connection may keep the event loop before others have their turn.
    turn_s: float = 0.001
    # Failed authentications from one address, at once and each second: a person mistypes, a program tries for long.
    auth_failures: float = 10.0
    auth_failures_per_s: float = 0.2
    # Addresses whose failures are remembered; the one that failed longest ago is forgotten first.
    auth_peers: int = 4096
    # What clients can bring about as often as they like is logged once in this time, with how often it was.
    log_s: float = 60.0


class TokenBucket:
    """A budget that is full at first, and refills with time up to that; more can be earned."""

    __slots__ = ("_burst", "_clock", "_credit", "_level", "_per_s", "_since")

    def __init__(self, burst: float, per_s: float, credit: float = 0.0, clock: Clock = time.monotonic) -> None:
        """Holds ``burst``, gains ``per_s`` a second up to that, and never holds more than ``credit`` above it."""
        self._burst, self._per_s, self._credit, self._clock = burst, per_s, credit, clock
        self._level, self._since = burst, clock()

    def spend(self, amount: float = 1.0) -> bool:
        """Takes ``amount``; False, and nothing is taken, when there is less."""
        if self._now() < amount:
            return False
        self._level -= amount
        return True

    def earn(self, amount: float) -> None:
        """Adds ``amount``."""
        self._level = min(self._burst + self._credit, self._now() + amount)

    def wait_s(self, amount: float = 1.0) -> float:
        """Seconds until ``amount`` is there; 0 when it is."""
        return max(0.0, amount - self._now()) / self._per_s

    def _now(self) -> float:
        now = self._clock()
        if self._level < self._burst:
            self._level = min(self._burst, self._level + (now - self._since) * self._per_s)
        self._since = now
        return self._level


class Seldom:
    """Lets one of many occurrences through in each interval, so that whoever repeats one fills no log."""

    __slots__ = ("_clock", "_interval_s", "_told_s", "_untold")

    def __init__(self, interval_s: float, clock: Clock = time.monotonic) -> None:
        """Nothing has occurred yet."""
        self._interval_s, self._clock = interval_s, clock
        self._told_s, self._untold = float("-inf"), 0

    def told(self, human: str) -> str:
        """The sentence as it is to be logged for one more occurrence; empty: it is not to be logged."""
        self._untold += 1
        now = self._clock()
        if now - self._told_s < self._interval_s:
            return ""
        count, self._told_s, self._untold = self._untold, now, 0
        return human if count == 1 else f"{human} ({count} times since the last such line)"


class AuthFailures:
    """How often each address failed to authenticate. Owns a table of bounded size."""

    def __init__(self, limits: Limits, clock: Clock = time.monotonic) -> None:
        """Nobody has failed yet."""
        self._limits, self._clock = limits, clock
        self._of: OrderedDict[str, TokenBucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._of)

    def wait_ms(self, address: str) -> int:
        """Milliseconds until this address may fail again; 0: it may now."""
        bucket = self._of.get(peer_of(address))
        return 0 if bucket is None else int(bucket.wait_s() * 1e3 + 0.999)

    def note(self, address: str) -> bool:
        """Counts a failure; False when it was one too many."""
        peer = peer_of(address)
        bucket = self._of.get(peer)
        if bucket is None:
            bucket = TokenBucket(self._limits.auth_failures, self._limits.auth_failures_per_s, clock=self._clock)
            self._of[peer] = bucket
            if len(self._of) > self._limits.auth_peers:
                self._of.popitem(last=False)
        self._of.move_to_end(peer)
        return bucket.spend()


def peer_of(address: str) -> str:
    """Whom an address stands for: one host of IPv6 has 2^64 of them."""
    try:
        of = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if of.version == 4:
        return str(of)
    return str(of.ipv4_mapped or ipaddress.ip_network((of, 64), strict=False))
