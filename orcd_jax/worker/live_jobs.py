"""The table of live jobs: whose they are, which slots are taken, and when the last call has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from orcd_jax.engine.engine import Delivery, Engine, Job
from orcd_jax.engine.stream import JobStream
from orcd_jax.errors import ErrorCode, OrcdError

RETRY_AFTER_MS = 250


@dataclass(slots=True, eq=False)
class LiveJob:
    """A job between its admission and the end of its call.

    Attributes:
      owner: identity it belongs to.
      job: the engine's side of it, once its prompt is tokenised.
      engine: where that runs.
    """

    owner: str
    job_id: str
    stream: JobStream = field(default_factory=JobStream)
    job: Job | None = None
    engine: Engine | None = None

    def cancel(self) -> None:
        """Tells the engine that nobody wants the job any more."""
        if self.engine is not None and self.job is not None:
            self.engine.cancel(self.job)


class LiveJobs:
    """Owns the slots. Lives on the event loop.

    A slot is taken before anything is done for a job, so that no more prompts are tokenised than can run; it is free as
    soon as the job is over. A call ends later, when its reader has everything.
    """

    def __init__(self, slots: int, on_change: Callable[[], None]) -> None:
        """An empty table; ``on_change`` is called when slots are taken or freed."""
        self._slots, self._on_change = slots, on_change
        self._table: dict[tuple[str, str], LiveJob] = {}
        self._stream_of: dict[Job, JobStream] = {}
        self._calls = 0
        self.idle = asyncio.Event()
        self.idle.set()

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[LiveJob]:
        return iter(tuple(self._table.values()))

    def admit(self, owner: str, job_id: str) -> LiveJob:
        """Takes a slot for a call, which must ``leave`` in the end.

        Raises:
          OrcdError: INVALID_PARAMS, when the owner has a live job of this name; BUSY, when no slot is free.
        """
        if (owner, job_id) in self._table:
            raise OrcdError(
                ErrorCode.INVALID_PARAMS, "a job with this job_id is running; choose another", field="job_id"
            )
        if len(self._table) >= self._slots:
            raise OrcdError(
                ErrorCode.BUSY,
                f"all {self._slots} slots are taken; retry later or use another worker",
                retry_after_ms=RETRY_AFTER_MS,
            )
        live = self._table[owner, job_id] = LiveJob(owner, job_id)
        self._calls += 1
        self.idle.clear()
        self._on_change()
        return live

    def find(self, owner: str, job_id: str) -> LiveJob | None:
        """The live job of this owner, if there is one."""
        return self._table.get((owner, job_id))

    def attach(self, live: LiveJob, engine: Engine, job: Job) -> None:
        """Directs the engine's events of ``job`` to the live job's stream."""
        live.job, live.engine = job, engine
        self._stream_of[job] = live.stream

    def deliver(self, batch: list[Delivery]) -> None:
        """Takes the engine's events of one step; those of jobs that are over are dropped."""
        for job, event in batch:
            if (stream := self._stream_of.get(job)) is not None:
                stream.put(event)

    def release(self, live: LiveJob) -> None:
        """Frees the slot and the name of a job that is over. Harmless when repeated."""
        if live.job is not None:
            self._stream_of.pop(live.job, None)
        if self._table.get((live.owner, live.job_id)) is live:  # the name may be another job's by now
            del self._table[live.owner, live.job_id]
            self._on_change()

    def leave(self, live: LiveJob) -> None:
        """Ends the call of a job; once for each ``admit``."""
        self.release(live)
        self._calls -= 1
        if self._calls == 0:
            self.idle.set()
