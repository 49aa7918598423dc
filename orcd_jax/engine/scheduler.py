"""What runs next: admission, rows, pages and the choice between prefill and decode. Pure host code, no JAX.

No preemption: a job is admitted when a row and all the pages it can ever need are free, in order of arrival. Prefill
and decode alternate while both have work, so a long prompt stalls running streams by one call at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from orcd_jax.engine.kv_pages import KvPagePool
from orcd_jax.engine.request import JobRequest


@dataclass(slots=True, eq=False)
class ScheduledJob:
    """A job's place in the schedule.

    Attributes:
      row: its place in the decode program, once admitted.
      pages: its KV pages, all of them, once admitted.
      prefilled: prompt tokens whose prefill has been dispatched.
      dispatched: output tokens whose sampling has been dispatched.
      ended: set when the job will get no more steps; steps in flight ignore it.
    """

    request: JobRequest
    row: int = -1
    pages: tuple[int, ...] = ()
    prefilled: int = 0
    dispatched: int = 0
    ended: bool = False

    @property
    def in_prefill(self) -> bool:
        """Whether a part of the prompt has not been dispatched yet."""
        return self.prefilled < len(self.request.prompt_ids)


@dataclass(frozen=True, slots=True)
class BlockWork:
    """One prefill block: prompt tokens ``start … start + count`` of a job; ``last`` when it completes the prompt."""

    job: ScheduledJob
    start: int
    count: int
    last: bool


@dataclass(frozen=True, slots=True)
class PrefillStep:
    """One call of the prefill program; block ``i`` of the call is ``blocks[i]``."""

    blocks: tuple[BlockWork, ...]


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One call of the decode program, for these jobs' rows."""

    jobs: tuple[ScheduledJob, ...]


Step = PrefillStep | DecodeStep


@dataclass(slots=True)
class Scheduler:
    """Owns the rows, the page pool and the queue of waiting jobs."""

    rows: int
    block_tokens: int
    prefill_blocks: int
    page_tokens: int
    pool: KvPagePool
    _waiting: deque[ScheduledJob] = field(default_factory=deque)
    _running: dict[int, ScheduledJob] = field(default_factory=dict)  # by row, in order of admission
    _free_rows: list[int] = field(init=False)
    _decode_next: bool = False

    def __post_init__(self) -> None:
        self._free_rows = list(range(self.rows - 1, -1, -1))

    def submit(self, job: ScheduledJob) -> None:
        """Queues a job."""
        self._waiting.append(job)

    def remove(self, job: ScheduledJob) -> None:
        """Takes a job out, wherever it is; its row and pages are free for the next step. Harmless when repeated."""
        if job.ended:
            return
        job.ended = True
        if job.row >= 0:
            del self._running[job.row]
            self._free_rows.append(job.row)
            self.pool.release(job.pages)
        else:
            self._waiting.remove(job)

    def jobs(self) -> Iterator[ScheduledJob]:
        """All live jobs, running ones first."""
        yield from tuple(self._running.values())
        yield from tuple(self._waiting)

    @property
    def running(self) -> int:
        """Jobs that hold a row."""
        return len(self._running)

    def pages_needed(self, request: JobRequest) -> int:
        """Pages for the prompt and every token that may follow, but the last: its KV is never written."""
        tokens = len(request.prompt_ids) + request.max_tokens - 1
        return -(-tokens // self.page_tokens)

    def next_step(self) -> Step | None:
        """Admits what fits, then picks the next call; None when nothing can be dispatched now."""
        self._admit()
        blocks = self._prefill_blocks() if not self._decode_next else ()
        rows = tuple(j for j in self._running.values() if not j.in_prefill and j.dispatched < j.request.max_tokens)
        if not blocks and not rows:
            blocks = self._prefill_blocks()
        if blocks:
            self._decode_next = bool(rows)
            for work in blocks:
                work.job.prefilled += work.count
                work.job.dispatched += work.last
            return PrefillStep(blocks)
        self._decode_next = False
        if not rows:
            return None
        for job in rows:
            job.dispatched += 1
        return DecodeStep(rows)

    def _admit(self) -> None:
        while self._waiting and self._free_rows:
            need = self.pages_needed(self._waiting[0].request)
            if not self.pool.can_allocate(need):
                return
            job = self._waiting.popleft()
            job.row, job.pages = self._free_rows.pop(), self.pool.allocate(need)
            self._running[job.row] = job

    def _prefill_blocks(self) -> tuple[BlockWork, ...]:
        blocks: list[BlockWork] = []
        for job in self._running.values():
            prompt = len(job.request.prompt_ids)
            for start in range(job.prefilled, prompt, self.block_tokens):
                if len(blocks) == self.prefill_blocks:
                    return tuple(blocks)
                count = min(self.block_tokens, prompt - start)
                blocks.append(BlockWork(job, start, count, last=start + count == prompt))
        return tuple(blocks)
