"""The life of a worker as one table of legal moves (WORKER-4030)."""

from __future__ import annotations

import enum
from collections.abc import Callable


class State(enum.StrEnum):
    """Where a worker is in its life."""

    STARTING = "STARTING"
    LOADING = "LOADING"
    READY = "READY"
    EXECUTING = "EXECUTING"
    DRAINING = "DRAINING"
    STOPPED = "STOPPED"


MOVES: dict[State, frozenset[State]] = {
    State.STARTING: frozenset({State.LOADING, State.DRAINING, State.STOPPED}),
    State.LOADING: frozenset({State.READY, State.STARTING, State.DRAINING, State.STOPPED}),
    State.READY: frozenset({State.EXECUTING, State.DRAINING, State.STOPPED}),
    State.EXECUTING: frozenset({State.READY, State.DRAINING, State.STOPPED}),
    State.DRAINING: frozenset({State.STOPPED}),
    State.STOPPED: frozenset(),
}


class IllegalMove(RuntimeError):
    """A move that is not in the table: a bug in the worker."""


class Lifecycle:
    """Owns the worker's state. Lives on the event loop; listeners are called there, in order, after each move."""

    def __init__(self) -> None:
        """A worker that is STARTING."""
        self._state = State.STARTING
        self._listeners: list[Callable[[State], None]] = []

    @property
    def state(self) -> State:
        """The state now."""
        return self._state

    @property
    def serving(self) -> bool:
        """Whether jobs are accepted."""
        return self._state in (State.READY, State.EXECUTING)

    def subscribe(self, listener: Callable[[State], None]) -> None:
        """Calls ``listener`` with the new state after every move."""
        self._listeners.append(listener)

    def move(self, to: State) -> None:
        """Moves to ``to``; moving to the present state does nothing.

        Raises:
          IllegalMove: the table does not allow it.
        """
        if to is self._state:
            return
        if to not in MOVES[self._state]:
            raise IllegalMove(f"a worker cannot go from {self._state} to {to}")
        self._state = to
        for listener in self._listeners:
            listener(to)
