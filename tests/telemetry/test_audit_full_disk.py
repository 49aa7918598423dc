"""An audit directory whose disk is full or fails: whole lines only, and a chain that goes on."""

from __future__ import annotations

import errno
import os
from datetime import timedelta
from pathlib import Path

import pytest

from orcd_jax.telemetry.audit_chain import verify_audit
from orcd_jax.telemetry.audit_directory import AuditDirectory
from tests.telemetry.audit_samples import NOON, events, files, note, write, write_days


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Where a log may be made."""
    return tmp_path / "audit"


class Disk:
    """A disk below ``log`` with room for so many more bytes: a write that does not fit is cut, the next one fails."""

    def __init__(self, log: Path, room: int) -> None:
        self.log = log
        self.room = room
        self.can_shorten = True
        self._write, self._truncate = os.write, os.ftruncate

    def write(self, fd: int, content: bytes) -> int:
        if not Path(f"/proc/self/fd/{fd}").readlink().is_relative_to(self.log):
            return self._write(fd, content)
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = self._write(fd, content[: self.room])
        self.room -= done
        return done

    def ftruncate(self, fd: int, size: int) -> None:
        if not self.can_shorten:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._truncate(fd, size)


@pytest.fixture
def disk(log: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk(log, room=10**9)
    monkeypatch.setattr(os, "write", made.write)
    monkeypatch.setattr(os, "ftruncate", made.ftruncate)
    return made


@pytest.mark.requirement("WORKER-4163")
@pytest.mark.parametrize("room", [0, 1, 150, 279, 280, 281, 500, 560, 700, 1100])
def test_a_full_disk_leaves_whole_lines_and_the_chain_goes_on(log: Path, disk: Disk, room: int) -> None:
    disk.room = room
    directory = AuditDirectory(log, worker_id="w1")
    kept = failed = 0
    for _ in range(6):
        try:
            note(directory)
            kept += 1
        except OSError:
            failed += 1
        assert all(path.read_bytes().endswith(b"\n") or not path.stat().st_size for path in log.iterdir())
    assert failed
    disk.room = 10**9
    note(directory)
    directory.close()
    assert events(log) == ["sealed"] * (kept + 1)
    report = verify_audit(log)
    assert (report.broken, report.records) == (None, kept + 2)


@pytest.mark.requirement("WORKER-4163")
@pytest.mark.parametrize("room", [100, 400])
def test_half_a_line_that_could_not_be_cut_off_is_cut_off_later(log: Path, disk: Disk, room: int) -> None:
    directory = AuditDirectory(log, worker_id="w1")
    disk.room, disk.can_shorten = room, False
    for _ in range(3):
        with pytest.raises(OSError, match=r"No space|Input/output"):
            note(directory)
        disk.room = 10**9  # there is room, but the half line is still in the way
    disk.can_shorten = True
    note(directory)
    directory.close()
    assert events(log) == ["sealed"]
    assert verify_audit(log).broken is None


@pytest.mark.requirement("WORKER-4163")
def test_half_a_line_that_was_never_cut_off_is_set_aside_at_the_next_start(log: Path, disk: Disk) -> None:
    directory = AuditDirectory(log, worker_id="w1")
    note(directory)
    disk.room, disk.can_shorten = 100, False
    with pytest.raises(OSError, match="No space"):
        note(directory)
    directory.close()
    disk.room, disk.can_shorten = 10**9, True
    write(log, NOON)
    assert events(log) == ["sealed", "log_recovered", "sealed"]
    assert verify_audit(log).broken is None


@pytest.mark.requirement("WORKER-4163")
def test_a_new_file_that_cannot_be_begun_changes_nothing(log: Path, disk: Disk) -> None:
    directory = AuditDirectory(log, worker_id="w1")
    note(directory)
    disk.room = 10
    for _ in range(3):
        with pytest.raises(OSError, match="No space"):
            note(directory, NOON + timedelta(days=1))
    disk.room = 10**9
    note(directory, NOON + timedelta(days=2))
    directory.close()
    assert verify_audit(log).broken is None
    assert [path.name for path in files(log)] == ["audit-000000000001.jsonl", "audit-000000000003.jsonl"]


@pytest.mark.requirement("WORKER-4163")
def test_a_recovery_that_fails_is_tried_again_and_leaves_nothing_behind(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_days(log, days=1)
    newest = files(log)[0]
    newest.write_bytes(before := newest.read_bytes()[:-3])
    directory = AuditDirectory(log, worker_id="w1")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfileobj", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space")))
        for _ in range(2):
            with pytest.raises(OSError, match="No space"):
                note(directory)
        assert list(log.iterdir()) == [newest]
        assert newest.read_bytes() == before
    note(directory)
    directory.close()
    assert events(log)[-2:] == ["log_recovered", "sealed"]
    assert verify_audit(log).broken is None
