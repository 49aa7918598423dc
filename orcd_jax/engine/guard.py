"""What the step loop asks of whoever keeps the weights proved. ``residency.guard.SealGuard`` is the one there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from orcd_jax.engine.state import DecodeState
from orcd_jax.errors import OrcdError

OnProof = Callable[[OrcdError | None], None]
"""Called once: with None when a whole pass over the weights succeeded, else with why there is none."""


class Guard(Protocol):
    """Proves the weights again and again, slice by slice, on the engine thread.

    ``admit``, ``turn``, ``settle`` and ``suspect`` may raise an OrcdError, which ends the engine: the weights are not
    what was sealed, or not where they must be.
    """

    def admit(self) -> None:
        """A job is about to begin: returns when the seal holds and the proof is fresh."""

    def turn(self, state: DecodeState | None) -> None:
        """Between two steps: reads the proof that is in flight, and begins the next one when it is due."""

    def settle(self) -> None:
        """Tokens are about to leave: returns when every byte was proved recently enough."""

    def suspect(self) -> None:
        """The model computed what it cannot: returns when every byte is proved anew."""

    def wait_s(self) -> float:
        """Seconds until the next turn has something to do."""
        ...

    def request(self, done: OnProof) -> None:
        """Wants a whole pass that begins now."""

    def close(self, reason: OrcdError) -> None:
        """No turn follows: whoever waits for a pass is told ``reason``."""
