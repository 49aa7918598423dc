"""Streams of jobs over the worker's own engine: how long its steps take, with proofs between them or without."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import jax

from orcd_jax.checkpoint.manifest import Manifest
from orcd_jax.engine.engine import Delivery, Engine, warm_up
from orcd_jax.engine.guard import Guard, OnProof
from orcd_jax.engine.programs import Programs
from orcd_jax.engine.request import Ended, Failed, JobRequest, Tokens
from orcd_jax.engine.state import DecodeState, EngineShape
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.models.registry import Params
from orcd_jax.residency import policy
from orcd_jax.residency.guard import SealGuard
from orcd_jax.residency.keys import SealKey
from orcd_jax.residency.prover import Pending, Slice, WeightProver
from orcd_jax.residency.seal import SealRecord, seal, verify
from tools.bench_report import BenchError

STALL_S = 60.0
"""An engine that does not come round for so long gives no figure any more."""

Enough = Callable[[int, float], bool]
"""Whether a window is long enough: of its steps and seconds so far."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model on a device, with what runs and proves it."""

    manifest: Manifest
    params: Params
    device: jax.Device
    prover: WeightProver


@dataclass(frozen=True, kw_only=True)
class Window:
    """What an engine did between two hand-offs, all of its streams busy.

    Attributes:
      stamps_s: when each step's tokens were handed off; the first begins the window.
      tokens: of all streams, handed off after the first.
      proved_bytes: whose proof began meanwhile.
      late: how often tokens had to wait for a proof.
    """

    stamps_s: tuple[float, ...]
    tokens: int
    proved_bytes: int
    late: int

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.stamps_s[-1] - self.stamps_s[0]

    @property
    def token_s(self) -> float:
        """Seconds for each token of any stream."""
        return self.seconds / self.tokens

    @property
    def steps_s(self) -> list[float]:
        """Seconds from each hand-off to the next."""
        return [after - before for before, after in zip(self.stamps_s, self.stamps_s[1:], strict=False)]


class BenchGuard(Guard, Protocol):
    """A guard that counts what it does, and may serve one engine after another."""

    proved_bytes: int
    late: int

    def resume(self) -> None:
        """An engine is about to begin."""


class Unguarded:
    """Proves nothing and lets everything pass: the engine without its guard."""

    def __init__(self) -> None:
        self.proved_bytes = self.late = 0

    def resume(self) -> None: ...

    def admit(self) -> None: ...

    def turn(self, state: DecodeState | None) -> None: ...

    def settle(self) -> None: ...

    def suspect(self) -> None: ...

    def wait_s(self) -> float:
        return 3600.0

    def request(self, done: OnProof) -> None:
        done(None)

    def close(self, reason: OrcdError) -> None: ...


class Stopwatch:
    """A clock that runs only when it is told to."""

    def __init__(self) -> None:
        self._ran_s = 0.0
        self._since_s: float | None = None

    def __call__(self) -> float:
        since = self._since_s
        return self._ran_s if since is None else self._ran_s + time.monotonic() - since

    def start(self) -> None:
        self._since_s = time.monotonic()

    def stop(self) -> None:
        self._ran_s, self._since_s = self(), None


class Scrub(SealGuard[Pending, DecodeState]):
    """The worker's guard. Its time stands still between its engines, so that each goes on with the pass of the last.

    Attributes:
      oldest_s: the greatest age of any byte's proof when tokens left.
    """

    def __init__(self, served: Served, max_age_s: float) -> None:
        """A guard of weights that have just been proved whole, with a seal of its own.

        Args:
          served: the weights, and what proves them.
          max_age_s: ``--seal_max_age``.
        """
        self.proved_bytes = self.late = 0
        self.oldest_s = 0.0
        self._stopwatch = Stopwatch()
        key = SealKey()
        record = SealRecord(
            shard_id="bench",
            digest=served.manifest.digest,
            sealed_at_ms=time.time_ns() // 1_000_000,
            device_uuid="",
            executable_fingerprint="0" * 64,
        )
        sealed = seal(key, record)
        super().__init__(
            _Counted(served.prover, self),
            max_age_s=max_age_s,
            proved_s=self._stopwatch(),
            verify_seal=lambda: verify(key, sealed),
            check_residency=lambda state: check_residency(served, state),
            on_late=self._count_late,
            clock=self._stopwatch,
        )

    def resume(self) -> None:
        """An engine is about to begin: time goes on."""
        self._stopwatch.start()

    def settle(self) -> None:
        super().settle()
        self.oldest_s = max(self.oldest_s, self.age_s())

    def close(self, reason: OrcdError) -> None:
        """The engine has ended: what is in flight is proved, for the next one's sake, and time stands still."""
        self._stopwatch.stop()
        if reason.code is not ErrorCode.CANCELLED:
            super().close(reason)
            return
        while self.wait_s() == 0.0:
            self.turn(None)

    def _count_late(self, _: float) -> None:
        self.late += 1


class _Counted:
    """A prover whose guard counts the bytes of which a proof begins."""

    def __init__(self, prover: WeightProver, guard: Scrub) -> None:
        self._prover, self._guard = prover, guard

    @property
    def slices(self) -> Sequence[Slice]:
        return self._prover.slices

    def begin(self, index: int) -> Pending:
        self._guard.proved_bytes += self._prover.slices[index].size_bytes
        return self._prover.begin(index)

    def finish(self, pending: Pending) -> None:
        self._prover.finish(pending)


def check_residency(served: Served, state: DecodeState | None) -> None:
    """Raises POLICY_VIOLATION when a weight or a buffer of the state is not in the device's own memory."""
    policy.check_arrays(served.params.items(), served.device)
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    policy.check_arrays(((f"state{jax.tree_util.keystr(path)}", leaf) for path, leaf in leaves), served.device)


class Streams:
    """One engine and the jobs that keep it busy: a stream begins its next job when one has ended.

    Everything is submitted before the engine starts, so each run of the same sizes does the same steps in the same
    order, whatever guards it.
    """

    def __init__(self, served: Served, programs: Programs, *, prompt_tokens: int) -> None:
        """Streams that fill every row of ``programs``.

        Args:
          served: the model.
          programs: compiled for as many rows as there are streams.
          prompt_tokens: of each job; its answer takes what is left of the context.
        """
        shape: EngineShape = programs.shape
        vocabulary = served.manifest.config.vocab_size
        self._served, self._programs = served, programs
        self._requests = [
            JobRequest(
                job_id=f"stream-{stream}",
                prompt_ids=tuple((7 * at + stream) % vocabulary for at in range(prompt_tokens)),
                max_tokens=shape.max_context - prompt_tokens,
                ignore_eos=True,
            )
            for stream in range(shape.rows)
        ]
        self._token_bytes = (b"x",) * vocabulary  # every token is text at once, so that every step is handed off

    def run(self, guard: BenchGuard, enough: Enough) -> Window:
        """Serves the streams with a fresh engine until the window is long enough. Blocks.

        Raises:
          OrcdError: why the engine ended.
          BenchError: it hangs.
        """
        gc.collect()
        served = self._served
        run = _Run(len(self._requests), guard, enough)
        engine = Engine(
            self._programs,
            served.params,
            guard,
            token_bytes=self._token_bytes,
            eos_ids=(),
            deliver=run.deliver,
            on_fatal=run.fail,
        )
        run.submit = engine.submit
        state = warm_up(self._programs, served.params)
        for request in self._requests:
            engine.submit(request)
        guard.resume()
        engine.start(state)
        while not run.over.wait(1.0):
            if engine.stalled_s() > STALL_S:
                raise BenchError(f"the engine has been in one step for over {STALL_S:g} s")
        if not engine.stop(STALL_S):
            raise BenchError(f"the engine did not stop within {STALL_S:g} s")
        return run.window()


class _Run:
    """What one engine hands off. Its methods run on the engine thread; ``window`` after it."""

    def __init__(self, streams: int, guard: BenchGuard, enough: Enough) -> None:
        self.over = threading.Event()
        self.submit: Callable[[JobRequest], object] = lambda _: None
        self._streams, self._guard, self._enough = streams, guard, enough
        self._begun: set[str] = set()
        self._stamps_s: list[float] = []
        self._tokens = 0
        self._before = self._counted()
        self._after = self._before
        self._error: OrcdError | None = None

    def deliver(self, batch: list[Delivery]) -> None:
        now = time.perf_counter()
        if self.over.is_set():
            return
        tokens = 0
        for job, event in batch:
            if isinstance(event, Tokens):
                tokens += len(event.ids)
                self._begun.add(job.request.job_id)
            elif isinstance(event, Ended):
                self.submit(job.request)
            elif isinstance(event, Failed):
                self.fail(event.error)
                return
        if tokens and len(self._begun) == self._streams:
            self._step(now, tokens)

    def _step(self, now: float, tokens: int) -> None:
        if not self._stamps_s:
            self._before = self._counted()
        else:
            self._tokens += tokens
        self._stamps_s.append(now)
        steps = len(self._stamps_s) - 1
        if steps and self._enough(steps, now - self._stamps_s[0]):
            self._after = self._counted()
            self.over.set()

    def fail(self, error: OrcdError) -> None:
        if not self.over.is_set():
            self._error = error
            self.over.set()

    def window(self) -> Window:
        if self._error is not None:
            raise self._error
        (proved, late), (proved_before, late_before) = self._after, self._before
        return Window(
            stamps_s=tuple(self._stamps_s),
            tokens=self._tokens,
            proved_bytes=proved - proved_before,
            late=late - late_before,
        )

    def _counted(self) -> tuple[int, int]:
        return self._guard.proved_bytes, self._guard.late
