"""The audit log as the worker uses it: never in the way, bounded, and honest about what it could not keep."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog

from orcd_jax.telemetry import audit as audit_module
from orcd_jax.telemetry.audit import Audit, AuditEvent, AuditLog, Head, NoAudit, verify_audit
from orcd_jax.telemetry.audit_directory import AuditDirectory
from tests.telemetry.audit_samples import NOON, events, files, records, ticking

DEADLINE_S = 30.0


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Where a log may be made."""
    return tmp_path / "audit"


@pytest.fixture(autouse=True)
def said() -> Iterator[list[Any]]:
    """What the worker's own log says meanwhile."""
    with structlog.testing.capture_logs() as lines:
        yield lines


Open = Callable[..., AuditLog]


@pytest.fixture
def opened(log: Path) -> Iterator[Open]:
    """Opens audit logs, and closes them at the end."""
    made: list[AuditLog] = []

    def open_log(**options: Any) -> AuditLog:
        made.append(AuditLog(log, worker_id="w1", **options))
        return made[-1]

    yield open_log
    for each in made:
        each.close()


class Disk:
    """Stands before the directory's own writing: it may fail, or hang until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fails: Exception | None = None
        self.sync_fails: Exception | None = None
        self.hangs = threading.Event()
        self.is_reached = threading.Event()
        self.hangs.set()
        append, sync = AuditDirectory.append, AuditDirectory.sync

        def slow_append(directory: AuditDirectory, *rest: Any) -> None:
            self.is_reached.set()
            assert self.hangs.wait(DEADLINE_S)
            if self.fails is not None:
                raise self.fails
            append(directory, *rest)

        def failing_sync(directory: AuditDirectory) -> None:
            if self.sync_fails is not None:
                raise self.sync_fails
            sync(directory)

        monkeypatch.setattr(AuditDirectory, "append", slow_append)
        monkeypatch.setattr(AuditDirectory, "sync", failing_sync)

    def hang(self) -> None:
        self.is_reached.clear()
        self.hangs.clear()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# -- records -----------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4160")
def test_a_record_has_number_time_event_worker_and_its_fields(log: Path, opened: Open) -> None:
    clock = ticking()
    audit = opened(now=lambda: next(clock))
    audit.record(AuditEvent.SEALED, model_ref="tiny\n\x1b[2J", pinned=True, vram_bytes=7, digest=None)
    audit.close()
    opening, sealed = records(log)
    assert sealed.pop("hash")
    assert sealed.pop("prev") == opening["hash"]
    assert sealed == {
        "seq": 2,
        "ts": "2026-03-01T12:00:00.000000Z",
        "event": "sealed",
        "worker_id": "w1",
        "model_ref": "tiny??[2J",
        "pinned": True,
        "vram_bytes": 7,
    }


@pytest.mark.requirement("WORKER-4160")
def test_no_secret_and_no_text_of_a_user_reaches_the_files(log: Path, opened: Open) -> None:
    audit = opened()
    secrets: dict[str, Any] = {"prompt": "SECRET", "output": "SECRET", "token": "SECRET", "key": "SECRET"}
    audit.record(AuditEvent.AUTH_FAILED, peer="127.0.0.1", **secrets)
    audit.close()
    assert events(log) == ["auth_failed"]
    assert all(b"SECRET" not in path.read_bytes() for path in log.iterdir())


@pytest.mark.requirement("WORKER-4160")
def test_every_event_is_recorded_in_the_order_it_was_given(log: Path, opened: Open) -> None:
    audit = opened()
    for event in AuditEvent:
        audit.record(event)
    audit.close()
    assert records(log)[0]["event"] == "log_opened"
    assert [record["event"] for record in records(log)[1:]] == [str(event) for event in AuditEvent]


@pytest.mark.requirement("WORKER-4161")
def test_threads_that_record_at_once_make_one_unbroken_chain(log: Path, opened: Open) -> None:
    audit = opened(max_file_bytes=20_000)

    def work() -> None:
        for number in range(200):
            audit.record(AuditEvent.DIGEST_RECOMPUTED, count=number)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    audit.close()
    report = verify_audit(log)
    assert (report.broken, report.records - report.files, audit.lost) == (None, 800, 0)
    assert audit.written == report.records


@pytest.mark.requirement("WORKER-4160")
def test_sampled_events_are_let_through_once_in_a_while_for_each_token(log: Path, opened: Open) -> None:
    looks = iter([0.0, 1.0, 59.9, 60.0, 61.0, 500.0])
    audit = opened(monotonic=lambda: next(looks, 501.0))
    for _ in range(6):
        audit.record(AuditEvent.AUTH_SUCCEEDED, token_fingerprint="aaaa")
        audit.record(AuditEvent.AUTH_FAILED)
    audit.record(AuditEvent.AUTH_SUCCEEDED, token_fingerprint="bbbb")
    audit.record(AuditEvent.DIGEST_AGE_CHECKED, age_ms=4)
    audit.close()
    written = records(log)
    succeeded = [(r["token_fingerprint"], r["times"]) for r in written if r["event"] == "auth_succeeded"]
    assert succeeded == [("aaaa", 1), ("aaaa", 3), ("aaaa", 2), ("bbbb", 1)]
    assert [r["times"] for r in written if r["event"] == "digest_age_checked"] == [1]
    assert events(log).count("auth_failed") == 6


def test_what_sampling_remembers_is_bounded(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module, "_MOST_SAMPLED", 10)
    audit = opened(monotonic=lambda: 0.0)
    for number in range(35):
        audit.record(AuditEvent.AUTH_SUCCEEDED, token_fingerprint=str(number))
    assert len(audit._sampler._kept) <= 10


@pytest.mark.requirement("WORKER-4162")
def test_the_head_is_the_newest_record_and_goes_on_after_a_restart(log: Path, opened: Open) -> None:
    audit = opened()
    assert audit.head == Head(0, "0" * 64)
    audit.record(AuditEvent.SEALED)
    assert audit.flush(DEADLINE_S)
    assert audit.head == verify_audit(log).head == Head(2, records(log)[-1]["hash"])
    audit.close()
    again = opened()
    assert again.head == audit.head
    assert again.written == 0
    again.record(AuditEvent.WORKER_STOPPED)
    again.close()
    assert (again.head.seq, again.written) == (4, 2)
    assert verify_audit(log, audit.head).broken is None


@pytest.mark.requirement("WORKER-4161")
def test_a_clock_that_goes_back_over_midnight_keeps_the_order(log: Path, opened: Open) -> None:
    times = [NOON, NOON - timedelta(days=1), NOON - timedelta(seconds=1), NOON + timedelta(days=90), NOON]
    clock = iter(times)
    audit = opened(now=lambda: next(clock, NOON))
    for number in range(len(times)):
        audit.record(AuditEvent.DIGEST_RECOMPUTED, count=number)
    audit.close()
    assert [r["count"] for r in records(log) if "count" in r] == [0, 1, 2, 3, 4]
    assert len(files(log)) == 5
    assert verify_audit(log).broken is None


@pytest.mark.requirement("WORKER-4160")
def test_no_audit_has_the_same_interface_and_does_nothing(tmp_path: Path, opened: Open) -> None:
    none = NoAudit()
    kinds: list[Audit] = [none, opened()]
    for kind in kinds:
        kind.record(AuditEvent.SEALED, model_ref="tiny")
        kind.close()
    assert (none.head, none.written, none.lost, none.flush()) == (Head(0, "0" * 64), 0, 0, True)


# -- never in the way --------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4163")
def test_a_disk_that_hangs_blocks_nobody_and_the_buffer_is_bounded(
    log: Path, opened: Open, disk: Disk, said: list[Any]
) -> None:
    audit = opened(buffered_records=10)
    disk.hang()
    audit.record(AuditEvent.LOAD_STARTED)
    assert disk.is_reached.wait(DEADLINE_S)
    for _ in range(50):
        audit.record(AuditEvent.AUTH_FAILED)
    assert audit.lost == 41  # one is in the writer's hands, nine wait
    assert not audit.flush(0.01)
    assert [line["records_lost"] for line in said] == [1]
    disk.hangs.set()
    assert audit.flush(DEADLINE_S)
    audit.record(AuditEvent.LOAD_COMPLETED)
    audit.close()
    assert events(log)[0] == "load_started"
    assert events(log).count("auth_failed") == 9
    assert events(log)[-1] == "load_completed"
    report = verify_audit(log)
    assert (report.broken, report.lost) == (None, 41)


@pytest.mark.requirement("WORKER-4163")
def test_a_flood_cannot_push_out_a_critical_event(
    log: Path, opened: Open, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_module, "RESERVED_RECORDS", 5)
    audit = opened(buffered_records=10)
    disk.hang()
    for _ in range(20):
        audit.record(AuditEvent.AUTH_FAILED)
    for number in range(7):
        audit.record(AuditEvent.VERIFICATION_FAILED, tensor=f"t{number}")
    assert audit.lost == 10 + 2
    disk.hangs.set()
    audit.close()
    assert [r["tensor"] for r in records(log) if "tensor" in r] == ["t0", "t1", "t2", "t3", "t4"]


@pytest.mark.requirement("WORKER-4163")
def test_close_gives_up_on_a_disk_that_hangs(opened: Open, disk: Disk) -> None:
    audit = opened()
    disk.hang()
    audit.record(AuditEvent.SEALED)
    assert disk.is_reached.wait(DEADLINE_S)
    audit.close(timeout_s=0.01)
    assert not audit.flush(0)
    disk.hangs.set()


def test_what_comes_after_close_is_counted_as_lost(log: Path, opened: Open) -> None:
    audit = opened()
    audit.close()
    audit.close()
    audit.record(AuditEvent.SEALED)
    assert (audit.lost, list(log.iterdir())) == (1, [])


# -- what happens when it cannot be written ----------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4163")
@pytest.mark.parametrize("fails", [FULL, OSError(errno.EIO, "Input/output error"), RuntimeError("a bug: SECRET")])
def test_continue_counts_what_is_lost_and_says_so_on_the_chain(
    log: Path, opened: Open, disk: Disk, said: list[Any], fails: Exception
) -> None:
    told: list[str] = []
    audit = opened(on_failure=told.append)
    audit.record(AuditEvent.LOAD_STARTED)
    assert audit.flush(DEADLINE_S)
    disk.fails = fails
    for _ in range(3):
        audit.record(AuditEvent.AUTH_FAILED)
        assert audit.flush(DEADLINE_S)
    assert audit.lost == 3
    disk.fails = None
    audit.record(AuditEvent.LOAD_COMPLETED)
    audit.close()
    assert events(log) == ["load_started", "records_lost", "load_completed"]
    assert [r["records"] for r in records(log) if r["event"] == "records_lost"] == [3]
    assert (verify_audit(log).lost, told) == (3, [])
    assert [(line["log_level"], line["event"], line["records_lost"]) for line in said] == [
        ("error", "audit", 1),
        ("info", "audit", 3),
    ]
    assert "SECRET" not in str(said)


@pytest.mark.requirement("WORKER-4163")
def test_what_was_lost_last_is_noted_when_the_log_is_closed(log: Path, opened: Open, disk: Disk) -> None:
    audit = opened()
    disk.fails = FULL
    audit.record(AuditEvent.SEALED)
    assert audit.flush(DEADLINE_S)
    disk.fails = None
    audit.close()
    assert events(log) == ["records_lost"]


@pytest.mark.requirement("WORKER-4163")
def test_stop_tells_the_worker_once_and_goes_on_trying(log: Path, opened: Open, disk: Disk) -> None:
    told: list[str] = []
    audit = opened(failure_policy="stop", on_failure=told.append)
    disk.fails = FULL
    for _ in range(3):
        audit.record(AuditEvent.SEALED)
        assert audit.flush(DEADLINE_S)
    disk.fails = None
    audit.record(AuditEvent.WORKER_STOPPED)
    audit.close()
    assert told == ["No space left on device"]
    assert events(log) == ["records_lost", "worker_stopped"]


@pytest.mark.requirement("WORKER-4163")
@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_a_full_buffer_follows_the_policy_even_while_the_disk_hangs(opened: Open, disk: Disk, policy: str) -> None:
    told: list[str] = []
    audit = opened(failure_policy=policy, on_failure=told.append, buffered_records=1)
    disk.hang()
    for _ in range(3):
        audit.record(AuditEvent.SEALED)
    assert told == (["its buffer of 1 records is full"] if policy == "stop" else [])
    disk.hangs.set()


@pytest.mark.requirement("WORKER-4163")
@pytest.mark.parametrize(("policy", "calls"), [("continue", 0), ("stop", 1)])
def test_a_flush_that_fails_follows_the_policy_and_loses_no_record(
    log: Path, opened: Open, disk: Disk, policy: str, calls: int
) -> None:
    told: list[str] = []
    audit = opened(failure_policy=policy, on_failure=told.append)
    disk.sync_fails = OSError(errno.EIO, "Input/output error")
    audit.record(AuditEvent.VERIFICATION_FAILED)
    assert audit.flush(DEADLINE_S)
    disk.sync_fails = None
    audit.close()
    assert (len(told), audit.lost, events(log)) == (calls, 0, ["verification_failed"])


@pytest.mark.requirement("WORKER-4163")
def test_whoever_is_told_may_fail_and_may_record(log: Path, opened: Open, disk: Disk) -> None:
    def told(_: str) -> None:
        disk.fails = None
        audit.record(AuditEvent.WORKER_STOPPED)
        raise RuntimeError("not now")

    audit = opened(failure_policy="stop", on_failure=told)
    disk.fails = FULL
    audit.record(AuditEvent.SEALED)
    assert audit.flush(DEADLINE_S)
    audit.close()
    assert events(log) == ["records_lost", "worker_stopped"]


# -- onto the disk -----------------------------------------------------------------------------------------------------


Synced = list[tuple[str, list[str]]]


@pytest.fixture
def synced(log: Path, monkeypatch: pytest.MonkeyPatch) -> Synced:
    """For each time a file was forced onto the disk: its name, and the events that were in the log then."""
    seen: Synced = []
    fsync = os.fsync

    def spy(fd: int) -> None:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        if path.suffix == ".jsonl":
            seen.append((path.name, events(log)))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", spy)
    return seen


@pytest.mark.requirement("WORKER-4163")
@pytest.mark.parametrize(
    ("fsync", "expected"),
    [
        ("always", [["load_started"], ["load_started", "verification_failed"]]),
        ("critical", [["load_started", "verification_failed"]]),
        ("never", []),
    ],
)
def test_the_policy_says_what_is_forced_onto_the_disk_at_once(
    log: Path, opened: Open, synced: Synced, fsync: str, expected: list[list[str]]
) -> None:
    audit = opened(fsync=fsync)
    for event in (AuditEvent.LOAD_STARTED, AuditEvent.VERIFICATION_FAILED):
        audit.record(event)
        assert audit.flush(DEADLINE_S)
    assert [held for _, held in synced if held] == expected  # besides the opening of the file
    synced.clear()
    audit.record(AuditEvent.SEALED)
    audit.close()
    held_at_last = [held for _, held in synced[-1:]]
    assert (held_at_last == [["load_started", "verification_failed", "sealed"]]) == (fsync != "never")


@pytest.mark.requirement("WORKER-4163")
@pytest.mark.parametrize("event", [AuditEvent.VERIFICATION_FAILED, AuditEvent.POLICY_VIOLATION])
def test_a_critical_event_is_on_the_disk_when_flush_returns(
    log: Path, opened: Open, synced: Synced, event: AuditEvent
) -> None:
    audit = opened()
    audit.record(event)
    assert audit.flush(DEADLINE_S)
    assert synced[-1][1] == [str(event)]


@pytest.mark.requirement("WORKER-4161")
@pytest.mark.parametrize("fsync", ["critical", "never"])
def test_a_finished_file_is_forced_onto_the_disk_before_the_next_is_begun(
    log: Path, opened: Open, synced: Synced, fsync: str
) -> None:
    times = iter([NOON, NOON + timedelta(days=1)])
    audit = opened(fsync=fsync, now=lambda: next(times, NOON))
    audit.record(AuditEvent.SEALED)
    audit.record(AuditEvent.LOAD_STARTED)
    assert audit.flush(DEADLINE_S)
    assert ((files(log)[0].name, ["sealed"]) in synced) == (fsync == "critical")
    assert len(files(log)) == 2
