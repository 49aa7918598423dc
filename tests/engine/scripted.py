"""An engine over programs that do what a test tells them to, and what each job is told."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import numpy as np

from orcd_jax.engine.engine import Delivery, Engine, Job, warm_up
from orcd_jax.engine.guard import Guard
from orcd_jax.engine.prefill_call import PrefillCall
from orcd_jax.engine.request import Ended, Event, Failed, JobRequest, Tokens
from orcd_jax.engine.state import DecodeState, EngineShape, zero_state
from orcd_jax.errors import OrcdError
from tests.engine.guards import Unguarded
from tests.engine.tiny import TINY

SHAPE = EngineShape(rows=2, block_tokens=8, prefill_blocks=2, page_tokens=4, pages=32, pages_per_job=16)
EOS = 0
BYTES = (b"", *(bytes([c]) for c in range(1, 128)))
WAIT_S = 20.0


@dataclass
class ScriptedPrograms:
    """Stands in for the device: a row's tokens continue its prompt's last token, letter by letter.

    ``gate`` holds back every step until released, so that a test decides what happens between steps.
    """

    shape: EngineShape = SHAPE
    fail_at: int = -1
    fail_from: int = 10**9
    failure: Exception | None = None
    gate: threading.Semaphore | None = None
    not_a_number_after: int = -1
    calls: int = 0
    inits: int = 0
    at: dict[int, int] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    wiped: list[DecodeState] = field(default_factory=list)
    pages: list[weakref.ref[jax.Array]] = field(default_factory=list)
    pages_alive_at_init: list[bool] = field(default_factory=list)

    def init(self) -> DecodeState:
        self.inits += 1
        self.pages_alive_at_init = [page() is not None for page in self.pages]
        state = zero_state(TINY, self.shape)
        self.pages = [weakref.ref(page) for page in jax.tree.leaves(state.kv)]
        return state

    def _step(self) -> None:
        self.calls += 1
        if self.calls > 2 and self.gate is not None:  # the first two are the warm-up
            assert self.gate.acquire(timeout=WAIT_S)
        if (self.calls == self.fail_at or self.calls >= self.fail_from) and self.failure is not None:
            raise self.failure

    def prefill(self, params: object, state: DecodeState, call: PrefillCall) -> tuple[DecodeState, object]:
        self._step()
        out = np.zeros((self.shape.prefill_blocks,), np.int32)
        for block, (count, row) in enumerate(zip(call.count, call.row, strict=True)):
            if count and row < self.shape.rows:
                self.at[int(row)] = int(call.tokens[block, count - 1]) + 1
                out[block] = self.at[int(row)]
        return state, out

    def wipe(self, state: DecodeState) -> None:
        self.wiped.append(state)

    def decode(self, params: object, state: DecodeState, run: np.ndarray) -> tuple[DecodeState, object]:
        self._step()
        out = np.zeros((self.shape.rows,), np.int32)
        for row in np.flatnonzero(run):
            self.at[int(row)] += 1
            out[row] = -1 if self.at[int(row)] == self.not_a_number_after + 1 else self.at[int(row)] % 128
        self.log.append("decode")
        return state, Future(out, self.log)


class Future:
    """Tokens on their way to the host; notes when they are read."""

    def __init__(self, tokens: np.ndarray, log: list[str]) -> None:
        self._tokens, self._log = tokens, log

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        self._log.append("read")
        return self._tokens


class Harness:
    """Runs an engine over scripted programs and collects what each job is told."""

    def __init__(
        self,
        programs: ScriptedPrograms,
        clock: Callable[[], float] = lambda: 0.0,
        token_bytes: tuple[bytes, ...] = BYTES,
        guard: Guard | None = None,
    ) -> None:
        guard = guard or Unguarded()
        self.programs = programs
        self.events: dict[Job, list[Event]] = {}
        self.fatal: list[OrcdError] = []
        self._changed = threading.Condition()
        self.engine = Engine(
            programs,
            {},
            guard,
            token_bytes=token_bytes,
            eos_ids=[EOS],
            deliver=self._deliver,
            on_fatal=self._on_fatal,
            clock=clock,
        )
        self.engine.start(warm_up(programs, {}))

    def _deliver(self, batch: list[Delivery]) -> None:
        with self._changed:
            for job, event in batch:
                self.events.setdefault(job, []).append(event)
            self._changed.notify_all()

    def _on_fatal(self, error: OrcdError) -> None:
        with self._changed:
            self.fatal.append(error)
            self._changed.notify_all()

    def wait(self, predicate: Callable[[], bool]) -> None:
        with self._changed:
            deadline = time.monotonic() + WAIT_S
            while not predicate():  # what the programs count changes without a notice
                assert time.monotonic() < deadline, (self.events, self.fatal)
                self._changed.wait(0.01)

    def finish(self, job: Job) -> list[Event]:
        self.wait(lambda: any(isinstance(e, Ended | Failed) for e in self.events.get(job, [])))
        return self.events[job]

    def run(self, prompt: str, max_tokens: int = 5, **options: object) -> list[Event]:
        return self.finish(self.engine.submit(request(prompt, max_tokens, **options)))


def request(prompt: str, max_tokens: int = 5, **options: object) -> JobRequest:
    return JobRequest(job_id="j", prompt_ids=tuple(prompt.encode()), max_tokens=max_tokens, **options)  # type: ignore[arg-type]


def text(events: list[Event]) -> str:
    return "".join(e.text for e in events if isinstance(e, Tokens))


def ids(events: list[Event]) -> list[int]:
    return [i for e in events if isinstance(e, Tokens) for i in e.ids]
