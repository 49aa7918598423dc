"""An engine over the weights of a sealed model, whose guard is expected to find something."""

from __future__ import annotations

import random
import threading
import time

import jax

from orcd_jax.engine.engine import Delivery, Engine, warm_up
from orcd_jax.engine.request import Ended, Failed, JobRequest, Tokens
from orcd_jax.engine.state import DecodeState
from orcd_jax.errors import OrcdError
from orcd_jax.residency.guard import SealGuard
from orcd_jax.residency.prover import Pending
from orcd_jax.worker.loader import SealedModel

WAIT_S = 120.0


class Trial:
    """An engine over the weights of a sealed model, with a guard of its own; it ends by what it finds."""

    def __init__(self, sealed: SealedModel, bound_s: float) -> None:
        resident = sealed.resident
        self.tokens: list[float] = []
        self.failures: list[OrcdError] = []
        self.fatal: OrcdError | None = None
        self.fatal_s = 0.0
        self._ended = threading.Event()
        guard: SealGuard[Pending, DecodeState] = SealGuard(
            resident.prover,
            max_age_s=bound_s,
            proved_s=time.monotonic(),
            verify_seal=lambda: None,
            check_residency=lambda _: None,
        )
        self.engine = Engine(
            resident.programs,
            resident.params,
            guard,
            token_bytes=resident.tokenizer.token_bytes,
            eos_ids=(),
            deliver=self._deliver,
            on_fatal=self._on_fatal,
        )
        self.engine.start(warm_up(resident.programs, resident.params))

    def _deliver(self, batch: list[Delivery]) -> None:
        for _, event in batch:
            if isinstance(event, Tokens):
                self.tokens.append(time.monotonic())
            elif isinstance(event, Failed):
                self.failures.append(event.error)
            elif isinstance(event, Ended):
                self._submit()  # the next one: the engine stays as busy as it was

    def _on_fatal(self, error: OrcdError) -> None:
        self.fatal_s, self.fatal = time.monotonic(), error
        self._ended.set()

    def load(self, jobs: int) -> None:
        """Keeps the engine busy with so many jobs until it ends."""
        request = JobRequest(job_id="j", prompt_ids=(5, 6, 7), max_tokens=500, ignore_eos=True)
        self._request = request
        for _ in range(jobs):
            self._submit()

    def _submit(self) -> None:
        self.engine.submit(self._request)

    def wait(self) -> OrcdError:
        assert self._ended.wait(WAIT_S), "never found"
        assert self.fatal is not None
        return self.fatal


def random_bit(array: jax.Array, chance: random.Random) -> int:
    """Any bit of an array, those of its first and last word likelier than others."""
    last = array.nbytes * 8 - 1
    return chance.choice([chance.randint(0, last), chance.randint(0, min(31, last)), last - chance.randint(0, 31)])
