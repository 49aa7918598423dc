"""Keeps the proof of the weights fresh (WORKER-4121): pass after pass over all slices, between the steps of the engine.

Each byte is proved again every ``PACE`` x bound, and no token leaves when any byte's last proof is older than the
bound. So a changed bit is found, and its model stopped, within the bound of ``detection_bound_s``, busy or idle.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from orcd_jax.errors import OrcdError

LONGEST_AGE_S = 5.0
"""The most that ``--seal_max_age`` may be (WORKER-4121), and the bound for running jobs when it is 0."""

PACE = 0.8
"""A pass is spread over this share of the bound; the rest is slack for a long step."""

URGENT = 0.9
"""From this share of the bound on, a slice is proved at every turn."""

POLICY_INTERVAL_S = 60.0
"""How often residency is checked again (WORKER-4101)."""

Pending = TypeVar("Pending")
State = TypeVar("State", contravariant=True)
OnProof = Callable[[OrcdError | None], None]


class SliceSize(Protocol):
    """What the guard needs to know of a slice."""

    @property
    def size_bytes(self) -> int:
        """Bytes that a proof of it reads."""
        ...


class Prover(Protocol[Pending]):
    """What proves the slices; ``residency.prover.WeightProver`` is one."""

    @property
    def slices(self) -> Sequence[SliceSize]:
        """Each weight is in exactly one."""
        ...

    def begin(self, index: int) -> Pending:
        """Begins to read a slice, and returns at once."""
        ...

    def finish(self, pending: Pending) -> None:
        """Waits for it. Raises SEAL_VERIFICATION_FAILED, naming the tensor that differs."""


@dataclass(frozen=True, slots=True)
class _Wish:
    """Somebody waits for a pass of which every slice began after ``since_s``."""

    since_s: float
    done: OnProof


@dataclass(frozen=True, slots=True)
class _Flight(Generic[Pending]):
    """A slice that is being read, and the pass it belongs to."""

    index: int
    began_s: float
    pass_began_s: float
    pending: Pending


class SealGuard(Generic[Pending, State]):
    """Owns the schedule of proofs, on the engine thread except where said. ``engine.guard`` is what it serves."""

    def __init__(
        self,
        prover: Prover[Pending],
        *,
        max_age_s: float,
        proved_s: float,
        verify_seal: Callable[[], None],
        check_residency: Callable[[State | None], None],
        on_pass: Callable[[float], None] = lambda _: None,
        on_late: Callable[[float], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A guard of weights that were proved whole by a pass that began at ``proved_s``.

        Args:
          prover: proves one slice at a time.
          max_age_s: ``--seal_max_age``: a proof this old does not let a job begin; 0: a whole pass before each job.
          proved_s: monotonic seconds at which the first whole pass began.
          verify_seal: raises SEAL_VERIFICATION_FAILED when the handle's seal does not hold.
          check_residency: raises POLICY_VIOLATION when a buffer is not where it must be.
          on_pass: called with the seconds each pass took, from its first slice to its last.
          on_late: called with the age of the oldest proof, when tokens have to wait for a new one.
          clock: monotonic seconds.
        """
        self._prover, self._clock = prover, clock
        self._verify_seal, self._check_residency = verify_seal, check_residency
        self._on_pass, self._on_late = on_pass, on_late
        self._max_age_s = max_age_s
        self._bound_s = max_age_s or LONGEST_AGE_S
        self._sizes = [max(1, one.size_bytes) for one in prover.slices]
        self._total = sum(self._sizes)
        self._begun_s = [proved_s] * len(self._sizes)
        self._proved_s = [proved_s] * len(self._sizes)
        self._oldest_s = proved_s
        self._next, self._due_s = 0, proved_s
        self._pass_began_s = proved_s
        self._in_flight: deque[_Flight[Pending]] = deque()
        self._wishes: list[_Wish] = []
        self._policy_due_s = clock() + POLICY_INTERVAL_S

    @property
    def detection_bound_s(self) -> float:
        """Seconds within which a changed bit stops the worker."""
        return self._bound_s

    def age_s(self) -> float:
        """Seconds since the oldest proof of any byte began. May be asked from any thread."""
        return max(0.0, self._clock() - self._oldest_s)

    # -- what the engine calls -----------------------------------------------------------------------------------

    def admit(self) -> None:
        """A job is about to begin: the seal must hold, and the proof be fresh."""
        self._verify_seal()
        if self._max_age_s == 0 or self.age_s() >= self._max_age_s:
            self._prove_since(self._clock())

    def turn(self, state: State | None) -> None:
        """Reads what is in flight; begins what is due, and at every turn what comes next when it is urgent."""
        while self._in_flight:
            self._finish()
        now = self._clock()
        if now >= self._policy_due_s:
            self._check_residency(state)
            self._policy_due_s = now + POLICY_INTERVAL_S
        room = max(self._sizes)  # several small slices may share a turn; none takes longer than the largest
        while (self._urgent(now) or now >= self._due_s) and self._sizes[self._next] <= room:
            room -= self._sizes[self._next]
            self._begin(now)

    def settle(self) -> None:
        """Tokens are about to leave: every byte must have been proved within the bound."""
        if (age := self.age_s()) >= self._bound_s:
            self._on_late(age)
            self._prove_since(self._clock() - self._bound_s * (1 - PACE))

    def suspect(self) -> None:
        """The model computed what it cannot: a whole proof, now, says whether the weights are to blame."""
        self._prove_since(self._clock())

    def wait_s(self) -> float:
        """Seconds until the next turn has something to do."""
        now = self._clock()
        if self._in_flight or self._urgent(now):
            return 0.0
        return max(0.0, min(self._due_s, self._policy_due_s) - now)

    def request(self, done: OnProof) -> None:
        """Wants a whole pass that begins now, made in slices between the steps."""
        self._wishes.append(_Wish(self._clock(), done))
        self._verify_seal()

    def close(self, reason: OrcdError) -> None:
        """No turn follows: whoever waits for a pass is told why there is none."""
        wishes, self._wishes = self._wishes, []
        self._in_flight.clear()
        for wish in wishes:
            wish.done(reason)

    # -- the schedule --------------------------------------------------------------------------------------------

    def _urgent(self, now: float) -> bool:
        return bool(self._wishes) or now - self._oldest_s >= URGENT * self._bound_s

    def _begin(self, now: float) -> None:
        index = self._next
        if index == 0:
            self._pass_began_s = now
        self._in_flight.append(_Flight(index, now, self._pass_began_s, self._prover.begin(index)))
        self._begun_s[index] = now
        self._next = (index + 1) % len(self._sizes)
        pause_s = self._sizes[index] / self._total * PACE * self._bound_s
        # From when it was due, so that turns that come late do not stretch the pass; but no burst after a long stall.
        self._due_s = max(self._due_s, now - (1 - PACE) * self._bound_s) + pause_s

    def _finish(self) -> None:
        flight = self._in_flight.popleft()
        index = flight.index
        try:
            self._prover.finish(flight.pending)
        except BaseException:
            self._begun_s[index] = self._proved_s[index]  # it was not proved, whatever the reason
            raise
        self._proved_s[index] = flight.began_s
        self._oldest_s = min(self._proved_s)
        if index == len(self._sizes) - 1:
            self._on_pass(self._clock() - flight.pass_began_s)
        for wish in [wish for wish in self._wishes if wish.since_s < self._oldest_s]:
            self._wishes.remove(wish)
            wish.done(None)

    def _prove_since(self, since_s: float) -> None:
        """Proves, without a step in between, every slice whose last proof began before ``since_s``."""
        while (missing := min(self._begun_s) < since_s) or self._in_flight:
            if missing and len(self._in_flight) < 2:
                self._begin(self._clock())
            else:
                self._finish()
