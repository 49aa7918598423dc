"""Places that clients take up: so many in all, and so many of one peer, whoever comes first (WORKER-4420)."""

from __future__ import annotations

import enum
from collections import Counter

from orcd_jax.server.limits import peer_of


class Refusal(enum.StrEnum):
    """Why there is no place."""

    FULL = "full"  # all are taken
    PEER = "peer"  # this peer has as many as one may have


class Places:
    """Counts who holds how many. A peer is an address, or the network of 2^64 that one host of IPv6 has."""

    def __init__(self, most: int, most_of_peer: int) -> None:
        """All are free.

        Args:
          most: places in all.
          most_of_peer: places that one peer may hold.
        """
        self.most, self.most_of_peer = most, most_of_peer
        self._of: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._of.total()

    def take(self, address: str) -> Refusal | None:
        """Takes a place for a client at ``address``, who must ``leave`` it; None, or why there is none."""
        peer = peer_of(address)
        if self._of[peer] >= self.most_of_peer:
            return Refusal.PEER
        if len(self) >= self.most:
            return Refusal.FULL
        self._of[peer] += 1
        return None

    def leave(self, address: str) -> None:
        """Gives back one place of a client at ``address``."""
        peer = peer_of(address)
        self._of[peer] -= 1
        if not self._of[peer]:
            del self._of[peer]
