"""The audit log: what happened to the model, its proofs and its guests, as chained records on disk (WORKER-4160–4163).

    audit = AuditLog(directory, worker_id="gpu-3", failure_policy="stop", on_failure=drain)
    audit.record(AuditEvent.SEALED, model_ref=…, digest=…)

Callers never wait for the disk: they add to a bounded buffer, and one thread chains, writes and flushes. What cannot be
kept is counted, and the count joins the chain. ``docs/audit.md`` has the format and what it proves.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from orcd_jax.telemetry.audit_chain import AuditReport, ChainBreak, verify_audit
from orcd_jax.telemetry.audit_directory import MAX_FILE_BYTES, AuditDirectory
from orcd_jax.telemetry.audit_record import GENESIS, AuditEvent, Head, Value, known_fields
from orcd_jax.telemetry.log import EventCode, get_logger, neutral, where

__all__ = [
    "CRITICAL",
    "SAMPLED",
    "Audit",
    "AuditEvent",
    "AuditLog",
    "AuditReport",
    "ChainBreak",
    "Head",
    "NoAudit",
    "verify_audit",
]

Fsync = Literal["always", "critical", "never"]
FailurePolicy = Literal["continue", "stop"]

CRITICAL = frozenset({AuditEvent.VERIFICATION_FAILED, AuditEvent.POLICY_VIOLATION})
"""Flushed onto the disk as soon as the writer has them, unless fsync is ``never``."""

SAMPLED = frozenset({AuditEvent.AUTH_SUCCEEDED, AuditEvent.AUTH_LIMITED, AuditEvent.DIGEST_AGE_CHECKED})
"""Recorded at most once in :data:`SAMPLE_INTERVAL_S` for each token; the record says for how many it stands."""

SAMPLE_INTERVAL_S = 60.0
BUFFERED_RECORDS = 4096
RESERVED_RECORDS = 256
"""Places in the buffer besides, for critical events: a flood of others cannot push them out."""

CLOSE_TIMEOUT_S = 5.0
_MOST_SAMPLED = 4096


class Audit(Protocol):
    """Where audit events go. Never raises, never blocks on a disk, callable from any thread."""

    def record(self, event: AuditEvent, **fields: Value | None) -> None:
        """Adds one event; a field that is not in ``audit_record.FIELDS``, or None, is left out."""

    def close(self) -> None:
        """Writes what is left, within a bound."""


class NoAudit:
    """The audit of a worker that keeps none."""

    head = GENESIS
    written = 0
    lost = 0

    def record(self, event: AuditEvent, **fields: Value | None) -> None:
        """Does nothing."""

    def flush(self, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """There is nothing to wait for."""
        return True

    def close(self) -> None:
        """Does nothing."""


class AuditLog:
    """Owns an audit directory and the one thread that writes it.

    Args:
      directory: see :class:`AuditDirectory`, which opens it.
      worker_id: on every record.
      fsync: after each batch that the writer takes (``always``), after a batch with a critical event (``critical``), or
        left to the system (``never``).
      failure_policy: when a record is lost or a flush fails: ``continue`` counts and goes on; ``stop`` does so too and
        calls ``on_failure``, once.
      on_failure: called from any thread, with the reason; must not block.
      max_file_bytes: a new file is begun when one has reached it.
      buffered_records: how many may wait for the writer.
      now: the wall clock, aware.
      monotonic: seconds, for sampling.

    Raises:
      OrcdError: as :class:`AuditDirectory` says.
    """

    def __init__(
        self,
        directory: Path,
        *,
        worker_id: str,
        fsync: Fsync = "critical",
        failure_policy: FailurePolicy = "continue",
        on_failure: Callable[[str], None] = lambda _: None,
        max_file_bytes: int = MAX_FILE_BYTES,
        buffered_records: int = BUFFERED_RECORDS,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fsync = fsync
        self._failure_policy = failure_policy
        self._on_failure = on_failure
        self._room = buffered_records
        self._now = now
        self._changed = threading.Condition()  # guards all that follows but the directory, which is the writer's
        self._sampler = _Sampler(monotonic)
        self._queue: deque[_Entry] = deque()
        self._waiting = 0  # accepted, and neither written nor lost yet: in the queue or in the writer's hands
        self._accepted = 0
        self._closing = False
        self._lost = 0
        self._unreported = 0  # lost, and not on the chain yet
        self._failures = 0  # since it last worked
        self._told = False
        self._directory = AuditDirectory(
            directory, worker_id=neutral(worker_id, 256), durable=fsync != "never", max_file_bytes=max_file_bytes
        )
        self._opened_at = self._directory.head.seq
        self._writer = threading.Thread(target=self._write_all, name="audit", daemon=True)
        self._writer.start()

    @property
    def head(self) -> Head:
        """The newest record on the chain. Published elsewhere, it shows later that nothing before it is gone."""
        return self._directory.head

    @property
    def written(self) -> int:
        """Records put on the chain since the start, the log's own included."""
        return self._directory.head.seq - self._opened_at

    @property
    def lost(self) -> int:
        """Records that were taken or offered since the start and never written."""
        return self._lost

    def record(self, event: AuditEvent, **fields: Value | None) -> None:
        """Takes one event, which the log's own thread writes at once; see :class:`Audit`."""
        kept = known_fields(fields)
        with self._changed:
            if event in SAMPLED:
                times = self._sampler.stands_for(event, str(kept.get("token_fingerprint", "")))
                if not times:
                    return
                kept["times"] = times
            fits = self._waiting < self._room + (RESERVED_RECORDS if event in CRITICAL else 0)
            if fits and not self._closing:
                self._queue.append(_Entry(event, self._now(), kept))
                self._accepted += 1
                self._waiting += 1
                self._changed.notify_all()
            else:
                self._lose(1)
        if not fits:
            self._failed(f"its buffer of {self._room} records is full")

    def flush(self, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """Waits until everything recorded so far is written, and on the disk where ``fsync`` says so, or lost.

        Blocks: not for an event loop.

        Returns:
          Whether that was so in time.
        """
        with self._changed:
            due = self._accepted
            return self._changed.wait_for(lambda: self._accepted - self._waiting >= due, timeout_s)

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Writes what is left and gives the directory free; a disk that hangs is left to itself after the timeout."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._writer.join(timeout_s)

    def _lose(self, count: int) -> None:
        self._lost += count
        self._unreported += count

    def _failed(self, reason: str) -> None:
        with self._changed:
            self._failures += 1
            first = self._failures == 1
            tell = self._failure_policy == "stop" and not self._told
            self._told = self._told or tell
        if first:
            human = f"The audit log cannot be written or flushed ({reason}); what is lost is counted."
            get_logger().error(EventCode.AUDIT, human=human, reason=reason, records_lost=self._lost)
        if tell:
            try:
                self._on_failure(reason)
            except Exception as error:  # whoever is told must not end the writer
                human = "The worker could not be told that its audit log fails."
                get_logger().error(EventCode.AUDIT, human=human, where=where(error))

    # -- what only the writer's thread calls ---------------------------------------------------------------------------

    def _write_all(self) -> None:
        while batch := self._next_batch():
            failures = self._failures
            for entry in batch:
                with self._tolerated(loses=1):
                    self._write(entry)
            critical = any(entry.event in CRITICAL for entry in batch)
            if self._fsync == "always" or (self._fsync == "critical" and critical):
                with self._tolerated():
                    self._directory.sync()
            self._settle(len(batch), worked=self._failures == failures)
        with self._tolerated():
            self._finish()

    def _next_batch(self) -> list[_Entry]:
        """Waits for entries; none when the log is closed and all are written."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            batch = list(self._queue)
            self._queue.clear()
            return batch

    def _write(self, entry: _Entry) -> None:
        self._report_losses(entry.at)
        self._directory.append(entry.event, entry.at, entry.fields)

    def _report_losses(self, at: datetime) -> None:
        if lost := self._unreported:
            self._directory.append(AuditEvent.RECORDS_LOST, at, {"records": lost})
            with self._changed:
                self._unreported -= lost

    def _settle(self, count: int, *, worked: bool) -> None:
        with self._changed:
            self._waiting -= count
            again = worked and self._failures > 0
            if again:
                self._failures = 0
            self._changed.notify_all()
        if again:
            human = f"The audit log is written again; {self._lost} records were lost since the start."
            get_logger().info(EventCode.AUDIT, human=human, records_lost=self._lost)

    def _finish(self) -> None:
        try:
            self._report_losses(self._now())
            if self._fsync != "never":
                self._directory.sync()
        finally:
            self._directory.close()

    @contextmanager
    def _tolerated(self, *, loses: int = 0) -> Iterator[None]:
        """Whatever fails inside is counted and answered by the policy; the thread goes on."""
        try:
            yield
        except Exception as error:
            with self._changed:
                self._lose(loses)
            reason = error.strerror if isinstance(error, OSError) and error.strerror else where(error)
            self._failed(reason)


class _Entry(NamedTuple):
    event: AuditEvent
    at: datetime
    fields: dict[str, Value]


class _Sampler:
    """Lets one of many through: the first, and then at most one in each interval, for each event and token."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._kept: dict[tuple[AuditEvent, str], tuple[float, int]] = {}  # when one was let through, how many since

    def stands_for(self, event: AuditEvent, token: str) -> int:
        """How many occurrences a record made now stands for, this one included; 0: none is to be made."""
        key, now = (event, token), self._monotonic()
        at, since = self._kept.get(key, (-math.inf, 0))
        if now - at < SAMPLE_INTERVAL_S:
            self._kept[key] = (at, since + 1)
            return 0
        if len(self._kept) >= _MOST_SAMPLED:
            self._kept.clear()  # bounded: what is forgotten is recorded again
        self._kept[key] = (now, 0)
        return since + 1
