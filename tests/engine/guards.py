"""Guards for the engine's tests: one that proves nothing, and one that does what a test tells it to."""

from __future__ import annotations

from orcd_jax.engine.guard import OnProof
from orcd_jax.engine.state import DecodeState
from orcd_jax.errors import OrcdError


class Unguarded:
    """Lets everything pass."""

    def admit(self) -> None: ...

    def turn(self, state: DecodeState | None) -> None: ...

    def settle(self) -> None: ...

    def suspect(self) -> None: ...

    def wait_s(self) -> float:
        return 3600.0

    def request(self, done: OnProof) -> None:
        done(None)

    def close(self, reason: OrcdError) -> None: ...


class ScriptedGuard(Unguarded):
    """Raises what it is told to, where it is told to; counts its calls."""

    def __init__(self) -> None:
        self.fail_at: dict[str, OrcdError] = {}
        self.calls: list[str] = []
        self.states: list[DecodeState | None] = []
        self.wishes: list[OnProof] = []
        self.pause_s = 3600.0

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if (error := self.fail_at.get(name)) is not None:
            raise error

    def admit(self) -> None:
        self._called("admit")

    def turn(self, state: DecodeState | None) -> None:
        self.states.append(state)
        self._called("turn")

    def settle(self) -> None:
        self._called("settle")

    def suspect(self) -> None:
        self._called("suspect")

    def wait_s(self) -> float:
        return self.pause_s

    def request(self, done: OnProof) -> None:
        self.wishes.append(done)

    def close(self, reason: OrcdError) -> None:
        for done in self.wishes:
            done(reason)
        self.wishes.clear()
