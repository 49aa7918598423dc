"""The step loop: one thread that owns the device state and is the only caller of the programs.

Between steps it gives the guard its turn, which proves the weights slice by slice; before tokens leave, the guard
settles. When the guard finds a changed bit, nothing that was made but not yet handed off leaves.

asyncio talks to it through one inbox, and it talks back through one batched hand-off a step. Step t + 1 is dispatched
before the tokens of step t are read: last tokens and positions live on the device, so the next step does not wait for
the host. The price is one idle row for one step after a job's end.

Whatever happens to the thread, every job that was ever submitted gets exactly one terminal event.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from orcd_jax.device.faults import is_out_of_memory, translate
from orcd_jax.engine.detokenizer import Detokenizer
from orcd_jax.engine.guard import Guard, OnProof
from orcd_jax.engine.kv_pages import KvPagePool
from orcd_jax.engine.prefill_call import PrefillCall, PrefillCallBuilder
from orcd_jax.engine.request import Ended, Event, Failed, FinishReason, JobRequest, SamplingParams, Tokens
from orcd_jax.engine.scheduler import DecodeStep, PrefillStep, ScheduledJob, Scheduler, Step
from orcd_jax.engine.state import DecodeState, EngineShape
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.models.registry import Params

TokensFuture = object

MAX_OOMS = 3
"""Times the device may run out of memory with no job ending well in between; then it is not worth another try."""


class StepPrograms(Protocol):
    """What the loop needs of ``programs.Programs``; a simulator can stand in for it."""

    shape: EngineShape

    def init(self) -> DecodeState: ...

    def prefill(self, params: Params, state: DecodeState, call: PrefillCall) -> tuple[DecodeState, TokensFuture]: ...

    def decode(
        self, params: Params, state: DecodeState, run: NDArray[np.bool_]
    ) -> tuple[DecodeState, TokensFuture]: ...

    def wipe(self, state: DecodeState) -> None: ...


@dataclass(slots=True, eq=False)
class Job:
    """A live job: its request, its place in the schedule, its text so far."""

    request: JobRequest
    detokenizer: Detokenizer
    submitted_s: float
    scheduled: ScheduledJob = field(init=False)
    unsent: list[int] = field(default_factory=list)
    produced: int = 0
    first_token_s: float = 0.0

    def __post_init__(self) -> None:
        self.scheduled = ScheduledJob(self.request)


Delivery = tuple[Job, Event]
Deliver = Callable[[list[Delivery]], None]


def warm_up(programs: StepPrograms, params: Params) -> DecodeState:
    """Makes a device state and runs every program of the step once on idle input.

    Raises:
      OrcdError: VRAM_OOM or a device error, when the programs do not run.
    """
    try:
        state = programs.init()
        call = PrefillCallBuilder(programs.shape, len(state.tables)).build()
        state, _ = programs.prefill(params, state, call)
        state, tokens = programs.decode(params, state, np.zeros((programs.shape.rows,), np.bool_))
        np.asarray(tokens)
    except Exception as error:
        raise translate(error) from error
    return state


class Engine:
    """Owns the engine thread, the device state and the schedule. Never touches asyncio: it calls ``deliver``.

    ``submit``, ``cancel`` and ``stop`` may be called from any thread; everything else runs on the engine thread.
    """

    def __init__(
        self,
        programs: StepPrograms,
        params: Params,
        guard: Guard,
        *,
        token_bytes: tuple[bytes, ...],
        eos_ids: Iterable[int],
        deliver: Deliver,
        on_fatal: Callable[[OrcdError], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepares the engine; ``start`` makes it run.

        Args:
          programs: compiled programs.
          params: the model's arrays, never modified.
          guard: proves the weights between steps; only the engine thread calls it.
          token_bytes: what each token id adds to the text.
          eos_ids: ids that end a job.
          deliver: called on the engine thread with a step's events of all jobs, in order; it must not raise.
          on_fatal: called once, on the engine thread, when the engine cannot go on; every live job has failed by then.
          clock: monotonic seconds.
        """
        self._programs, self._params, self._guard = programs, params, guard
        self._token_bytes, self._eos_ids = token_bytes, frozenset(eos_ids)
        self._deliver, self._on_fatal, self._clock = deliver, on_fatal, clock
        shape = programs.shape
        self._scheduler = Scheduler(
            rows=shape.rows,
            block_tokens=shape.block_tokens,
            prefill_blocks=shape.prefill_blocks,
            page_tokens=shape.page_tokens,
            pool=KvPagePool(shape.pages),
        )
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._jobs: dict[ScheduledJob, Job] = {}
        self._outbox: list[Delivery] = []
        self._state: DecodeState | None = None
        self._stopping = False
        self._ooms = 0
        self._turn_s: float | None = None  # when the present turn of the loop began; None while it waits for work
        self._door = threading.Lock()  # between submit and the end of the thread
        self._closed: OrcdError | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, state: DecodeState) -> None:
        """Starts the loop over a state that ``warm_up`` made, which is the engine's own from now on."""
        self._state = state
        self._thread.start()

    def kv_pages(self) -> tuple[int, int]:
        """KV pages that jobs hold, and all there are. May be asked from any thread."""
        total = self._programs.shape.pages
        return total - self._scheduler.pool.available, total

    def stalled_s(self) -> float:
        """Seconds since the loop last came round; 0 while it waits for work. May be asked from any thread."""
        began = self._turn_s
        return 0.0 if began is None else max(0.0, self._clock() - began)

    def prove(self, done: OnProof) -> None:
        """Wants a whole proof of the weights that begins now; ``done`` is called once, on the engine thread.

        Raises:
          OrcdError: why the engine has ended.
        """
        with self._door:
            if self._closed is not None:
                raise self._closed
            self._inbox.put(lambda: self._guard.request(done))

    def submit(self, request: JobRequest) -> Job:
        """Queues a validated job; its events come through ``deliver``.

        Raises:
          OrcdError: INVALID_PARAMS, when the job could never run on this engine; or why the engine has ended.
        """
        shape = self._programs.shape
        need, most = len(request.prompt_ids) + request.max_tokens, shape.max_context
        if need > most:
            raise OrcdError(
                ErrorCode.INVALID_PARAMS,
                f"the prompt has {len(request.prompt_ids)} tokens and max_tokens is {request.max_tokens}: "
                f"{need} together, over this worker's context of {most}; shorten one of them",
                field="max_tokens",
            )
        pages = self._scheduler.pages_needed(request)
        if pages > self._scheduler.pool.total:
            raise OrcdError(
                ErrorCode.INVALID_PARAMS,
                f"the job needs {pages} KV pages of {shape.page_tokens} tokens; this worker has "
                f"{self._scheduler.pool.total}: lower max_tokens",
                field="max_tokens",
            )
        if not request.prompt_ids or request.max_tokens < 1:
            raise OrcdError(ErrorCode.INVALID_PARAMS, "a job needs a prompt token and max_tokens ≥ 1", field="prompt")
        vocabulary = len(self._token_bytes)
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < vocabulary:
            raise OrcdError(
                ErrorCode.INVALID_PARAMS,
                f"a prompt token id is outside the vocabulary of {vocabulary}",
                field="prompt_token_ids",
            )
        _check_sampling(request.sampling)
        job = Job(request, Detokenizer(self._token_bytes, request.stop), self._clock())
        with self._door:
            if self._closed is not None:
                raise self._closed
            self._inbox.put(lambda: self._accept(job))
        return job

    def cancel(self, job: Job) -> None:
        """Ends a job in no step dispatched after this is seen: at most one step in flight ends silently."""
        error = OrcdError(ErrorCode.CANCELLED, "the job was cancelled")
        self._inbox.put(lambda: self._fail(job, error))

    def stop(self, timeout_s: float) -> bool:
        """Fails what still runs, ends the thread, zeroes and drops the device state. False when it did not end."""
        self._inbox.put(self._stop)
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # -- the engine thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            error = self._loop()
        except Exception as cause:  # a fault of the loop itself, or of whoever is handed the events
            error = translate(cause)
        self._close(error or OrcdError(ErrorCode.CANCELLED, "the worker stopped before the job ended"))
        if error is not None:
            self._on_fatal(error)

    def _loop(self) -> OrcdError | None:
        """Steps until it is told to stop (None) or cannot go on (why)."""
        in_flight: deque[tuple[Step, TokensFuture]] = deque()
        while not self._stopping:
            try:
                self._take_inbox(wait=not in_flight and not self._jobs)
                self._turn_s = self._clock()
                self._expire()
                self._guard.turn(self._state)
                step = self._scheduler.next_step()
                if step is not None:
                    in_flight.append((step, self._dispatch(step)))
                if in_flight and (step is None or len(in_flight) > 1):
                    self._finish(*in_flight.popleft())
                if self._outbox:
                    self._guard.settle()
            except Exception as cause:
                in_flight.clear()
                if (error := self._recover(cause)) is not None:
                    return error
            self._hand_off()
        return None

    def _close(self, reason: OrcdError) -> None:
        """Lets no more jobs in, then fails all there are, those still in the inbox included."""
        with self._door:
            self._closed = reason
        self._wipe()
        self._take_inbox(wait=False)
        self._guard.close(reason)
        for job in tuple(self._jobs.values()):
            self._fail(job, reason)
        with contextlib.suppress(Exception):  # it may be what ended the loop
            self._hand_off()

    def _wipe(self) -> None:
        """Zeroes what jobs left on the device. After a device error there may be nothing to be zeroed any more."""
        state, self._state = self._state, None
        if state is not None:
            with contextlib.suppress(Exception):
                self._programs.wipe(state)

    def _take_inbox(self, *, wait: bool) -> None:
        if wait:
            self._turn_s = None
            with contextlib.suppress(queue.Empty):
                message = self._inbox.get(timeout=self._guard.wait_s())
                self._turn_s = self._clock()  # it may make the device prove something
                message()
        while True:
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                return
            message()

    def _dispatch(self, step: Step) -> TokensFuture:
        state, self._state = self._state, None  # donated: gone if the call raises
        if state is None:
            raise OrcdError(ErrorCode.INTERNAL, "the engine has no device state")
        match step:
            case PrefillStep():
                self._state, tokens = self._programs.prefill(self._params, state, self._call(step))
            case DecodeStep():
                run = np.zeros((self._programs.shape.rows,), np.bool_)
                run[[job.row for job in step.jobs]] = True
                self._state, tokens = self._programs.decode(self._params, state, run)
        if (copy := getattr(tokens, "copy_to_host_async", None)) is not None:
            copy()
        return tokens

    def _call(self, step: PrefillStep) -> PrefillCall:
        builder = PrefillCallBuilder(self._programs.shape, 1)
        for work in step.blocks:
            request = work.job.request
            builder.add(
                request.prompt_ids[work.start : work.start + work.count],
                work.start,
                work.job.pages,
                row=work.job.row if work.last else None,
                sampling=request.sampling,
            )
        return builder.build()

    def _finish(self, step: Step, future: TokensFuture) -> None:
        tokens = np.asarray(future).tolist()
        match step:
            case PrefillStep():
                results = [(work.job, tokens[i]) for i, work in enumerate(step.blocks) if work.last]
            case DecodeStep():
                results = [(job, tokens[job.row]) for job in step.jobs]
        now = self._clock()
        for scheduled, token in results:
            if not scheduled.ended:
                self._advance(self._jobs[scheduled], token, now)

    def _advance(self, job: Job, token: int, now: float) -> None:
        """Adds one token to a job and ends it when the token, its text or its number says so."""
        request = job.request
        if token < 0:
            self._guard.suspect()
            self._fail(job, OrcdError(ErrorCode.INTERNAL, "the model computed values that are not numbers"))
            return
        if job.produced == 0:
            job.first_token_s = now
        job.produced += 1
        job.unsent.append(token)
        text, reason = "", None
        if token in self._eos_ids and not request.ignore_eos:
            reason = FinishReason.EOS
        elif token in request.stop_ids:
            reason = FinishReason.STOP
        else:
            text = job.detokenizer.push(token)
            if job.detokenizer.stopped:
                reason = FinishReason.STOP
        if reason is None and job.produced == request.max_tokens:
            reason = FinishReason.LENGTH
        complete = job.detokenizer.stopped
        if reason is not None and not complete:
            text += job.detokenizer.flush()
            if job.detokenizer.stopped:  # the last bytes became the end of a stop string
                reason = FinishReason.STOP
        if text or reason is not None:
            self._send(job, Tokens(job.produced - len(job.unsent), tuple(job.unsent), text))
            job.unsent.clear()
        if reason is not None:
            ended = Ended(
                finish_reason=reason,
                tokens_in=len(request.prompt_ids),
                tokens_out=job.produced,
                decode_time_ms=(now - job.first_token_s) * 1e3,
                time_to_first_token_ms=(job.first_token_s - job.submitted_s) * 1e3,
            )
            self._ooms = 0
            self._end(job, ended)

    def _accept(self, job: Job) -> None:
        self._jobs[job.scheduled] = job
        self._scheduler.submit(job.scheduled)
        if self._closed is None:  # else it only waits to be told why
            self._guard.admit()

    def _expire(self) -> None:
        now = self._clock()
        for job in tuple(self._jobs.values()):
            if job.request.deadline_s is not None and now >= job.request.deadline_s:
                self._fail(job, OrcdError(ErrorCode.TIMEOUT, f"the job's deadline passed after {job.produced} tokens"))

    def _fail(self, job: Job, error: OrcdError) -> None:
        if job.scheduled in self._jobs:
            self._end(job, Failed(error))

    def _end(self, job: Job, event: Event) -> None:
        self._scheduler.remove(job.scheduled)
        del self._jobs[job.scheduled]
        self._send(job, event)

    def _send(self, job: Job, event: Event) -> None:
        self._outbox.append((job, event))

    def _hand_off(self) -> None:
        if self._outbox:
            batch, self._outbox = self._outbox, []
            self._deliver(batch)

    def _stop(self) -> None:
        self._stopping = True

    def _recover(self, cause: Exception) -> OrcdError | None:
        """Fails every live job. After running out of memory, goes on with a fresh state; else says why it cannot."""
        error = translate(cause)
        self._take_back(error)
        for job in tuple(self._jobs.values()):
            self._fail(job, error)
        self._state = None
        # The failed call's frames hold the state it was given: a new one beside it would need twice the memory.
        traceback.clear_frames(cause.__traceback__)
        self._ooms += 1
        if not is_out_of_memory(error) or self._ooms >= MAX_OOMS:
            return error
        try:
            self._state = self._programs.init()
        except Exception as again:
            return translate(again)
        return None

    def _take_back(self, error: OrcdError) -> None:
        """Nothing leaves that the guard did not settle: jobs whose end was not yet handed off fail instead."""
        ended = dict.fromkeys(job for job, event in self._outbox if not isinstance(event, Tokens))
        self._outbox = [(job, Failed(error)) for job in ended]


def _check_sampling(params: SamplingParams) -> None:
    """Raises INVALID_PARAMS for what the device's arrays cannot hold: on the engine thread it would end every job."""
    allowed = (
        0 <= params.temperature < float("inf")
        and 0 <= params.top_k < 2**31
        and 0 < params.top_p <= 1
        and 0 <= params.min_p <= 1
        and 0 <= params.seed < 2**64
    )
    if not allowed:
        raise OrcdError(ErrorCode.INVALID_PARAMS, "a sampling parameter is out of range", field="sampling")
