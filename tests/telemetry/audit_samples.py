"""Small audit logs for tests, and a plain reader of their records that shares nothing with the code under test."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from orcd_jax.telemetry.audit_directory import AuditDirectory
from orcd_jax.telemetry.audit_record import AuditEvent

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def files(directory: Path) -> list[Path]:
    """The chain's files, oldest first."""
    return sorted(directory.glob("audit-*.jsonl"))


def records(directory: Path) -> list[dict[str, Any]]:
    """Every record, in order; fails on a line that is not whole JSON."""
    return [json.loads(line) for path in files(directory) for line in path.read_text(encoding="utf-8").splitlines()]


def events(directory: Path) -> list[str]:
    """What happened, without the log's own openings."""
    return [record["event"] for record in records(directory) if record["event"] != "log_opened"]


def note(directory: AuditDirectory, at: datetime = NOON, event: AuditEvent = AuditEvent.SEALED) -> None:
    """Appends one record."""
    directory.append(event, at, {"code": "BUSY"})


def write(log: Path, *times: datetime, **options: Any) -> None:
    """One start: opens the log, writes a record at each time, closes it."""
    directory = AuditDirectory(log, worker_id="w1", **options)
    for at in times:
        note(directory, at)
    directory.close()


def write_days(directory: Path, *, days: int = 3, records_a_day: int = 3) -> None:
    """A log of one file for each day, each with its opening and some records."""
    log = AuditDirectory(directory, worker_id="w1")
    for day in range(days):
        for number in range(records_a_day):
            at = NOON + timedelta(days=day, seconds=number)
            log.append(AuditEvent.DIGEST_RECOMPUTED, at, {"duration_ms": number, "tensor": "layers.0.mlp.down"})
    log.close()


def ticking(step: timedelta = timedelta(seconds=1)) -> Iterator[datetime]:
    """A clock that begins at noon and moves by one step at each look."""
    at = NOON
    while True:
        yield at
        at += step
