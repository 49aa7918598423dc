"""One writer, private files, rotation whatever the clock does, and a chain that goes on after a crash."""

from __future__ import annotations

import itertools
import os
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.telemetry.audit_chain import verify_audit
from orcd_jax.telemetry.audit_directory import AuditDirectory
from tests.telemetry.audit_samples import NOON, events, files, note, records, write, write_days

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Where a log may be made."""
    return tmp_path / "audit"


def code_of(log: Path) -> ErrorCode:
    with pytest.raises(OrcdError) as refused:
        AuditDirectory(log, worker_id="w1")
    return refused.value.code


# -- whose it is -------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4161")
def test_directory_and_files_are_the_owners_alone(log: Path) -> None:
    before = os.umask(0)
    try:
        write(log, NOON)
    finally:
        os.umask(before)
    assert stat.S_IMODE(log.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in log.iterdir()] == [0o600]


@pytest.mark.requirement("WORKER-4161")
@pytest.mark.parametrize("mode", [0o701, 0o710, 0o740, 0o770, 0o755, 0o704])
def test_a_directory_others_can_use_is_refused(log: Path, mode: int) -> None:
    log.mkdir()
    log.chmod(mode)
    assert code_of(log) is ErrorCode.POLICY_VIOLATION
    assert list(log.iterdir()) == []


@pytest.mark.requirement("WORKER-4161")
def test_a_directory_of_another_user_is_refused(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log.mkdir(mode=0o700)
    another = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: another)
    assert code_of(log) is ErrorCode.POLICY_VIOLATION


@pytest.mark.requirement("WORKER-4161")
def test_no_link_is_followed(log: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    log.symlink_to(tmp_path / "real")
    assert code_of(log) is ErrorCode.POLICY_VIOLATION
    victim = tmp_path / "victim"
    victim.write_bytes(b"")
    (tmp_path / "real" / "audit-000000000001.jsonl").symlink_to(victim)
    assert code_of(tmp_path / "real") is ErrorCode.POLICY_VIOLATION


@pytest.mark.requirement("WORKER-4161")
def test_a_link_that_appears_later_is_not_written_through(log: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"")
    directory = AuditDirectory(log, worker_id="w1")
    (log / "audit-000000000001.jsonl").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        note(directory)
    (log / "audit-000000000001.jsonl").unlink()
    (log / "audit-000000000001.jsonl").write_bytes(b"someone else's\n")
    with pytest.raises(FileExistsError):
        note(directory)
    directory.close()
    assert victim.read_bytes() == b""
    assert files(log)[0].read_bytes() == b"someone else's\n"


@pytest.mark.requirement("WORKER-4161")
def test_a_missing_parent_and_a_plain_file_are_refused(log: Path) -> None:
    assert code_of(log / "deeper") is ErrorCode.INVALID_PARAMS
    log.write_bytes(b"")
    assert code_of(log) is ErrorCode.POLICY_VIOLATION


@pytest.mark.requirement("WORKER-4161")
def test_the_files_are_opened_to_append_and_not_inherited(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = []
    open_ = os.open

    def spy(path: Any, how: int, *rest: Any, **named: Any) -> int:
        flags.append(how)
        return open_(path, how, *rest, **named)

    monkeypatch.setattr(os, "open", spy)
    write(log, NOON)
    write(log, NOON)
    assert len(flags) >= 4
    assert all(how & os.O_CLOEXEC and how & os.O_NOFOLLOW for how in flags)
    assert [how for how in flags if how & os.O_CREAT and how & os.O_APPEND] == [
        how for how in flags if how & os.O_CREAT
    ]


# -- one writer --------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4161")
def test_a_second_process_is_refused_until_the_first_is_gone(log: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from orcd_jax.telemetry.audit_directory import AuditDirectory;"
        "AuditDirectory(Path(sys.argv[1]), worker_id='w2'); print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(log)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(OrcdError, match="another process writes this audit directory") as refused:
            AuditDirectory(log, worker_id="w1")
        holder.kill()
    assert refused.value.code is ErrorCode.BUSY
    write(log, NOON)
    assert events(log) == ["sealed"]


@pytest.mark.requirement("WORKER-4161")
def test_a_refused_or_closed_directory_is_let_go(log: Path) -> None:
    first = AuditDirectory(log, worker_id="w1")
    assert code_of(log) is ErrorCode.BUSY
    first.close()
    write(log, NOON)
    damage(files(log)[0])
    assert code_of(log) is ErrorCode.POLICY_VIOLATION
    assert code_of(log) is ErrorCode.POLICY_VIOLATION  # not BUSY: nothing is left open


# -- rotation and clocks -----------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4161")
def test_a_new_utc_day_is_a_new_file(log: Path) -> None:
    midnight = datetime(2026, 3, 2, tzinfo=UTC)
    write(log, midnight - timedelta(microseconds=1), midnight, midnight + timedelta(hours=23))
    assert [path.name for path in files(log)] == ["audit-000000000001.jsonl", "audit-000000000003.jsonl"]
    assert [record["ts"] for record in records(log) if record["event"] == "sealed"] == [
        "2026-03-01T23:59:59.999999Z",
        "2026-03-02T00:00:00.000000Z",
        "2026-03-02T23:00:00.000000Z",
    ]


@pytest.mark.requirement("WORKER-4161")
def test_a_full_file_is_followed_by_a_new_one(log: Path) -> None:
    write(log, *[NOON] * 60, max_file_bytes=2000)
    sizes = [path.stat().st_size for path in files(log)]
    assert len(sizes) > 5
    assert all(2000 <= size < 2500 for size in sizes[:-1])
    assert events(log) == ["sealed"] * 60
    assert verify_audit(log).broken is None


@pytest.mark.requirement("WORKER-4161")
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    jumps=st.lists(
        st.one_of(st.timedeltas(timedelta(-800), timedelta(800)), st.just(timedelta(seconds=-1))), max_size=20
    )
)
def test_a_clock_that_jumps_breaks_neither_order_nor_rotation(
    tmp_path_factory: pytest.TempPathFactory, jumps: list[timedelta]
) -> None:
    log = tmp_path_factory.mktemp("clock") / "audit"
    times = [NOON]
    for jump in jumps:
        times.append(times[-1] + jump)
    write(log, *times, durable=False)
    written = records(log)
    assert [record["seq"] for record in written] == list(range(1, len(written) + 1))
    assert [datetime.fromisoformat(r["ts"]) for r in written if r["event"] == "sealed"] == times
    changes = sum(a.date() != b.date() for a, b in itertools.pairwise(times))
    assert len(files(log)) == 1 + changes
    assert verify_audit(log).broken is None


@pytest.mark.requirement("WORKER-4161")
def test_the_chain_goes_on_over_restarts_also_when_the_clock_went_back(log: Path) -> None:
    for days in (0, -400, 0, 400, -1):
        write(log, NOON + timedelta(days=days))
    report = verify_audit(log)
    assert (report.broken, report.files, report.records) == (None, 5, 10)
    openings = [record for record in records(log) if record["event"] == "log_opened"]
    assert [opening.get("continues") for opening in openings] == [None, *(path.name for path in files(log)[:-1])]


# -- what is checked at start ------------------------------------------------------------------------------------------


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"BUSY", b"NOT_READY", 1).replace(b"down", b"gate", 1))


@pytest.mark.requirement("WORKER-4163")
@pytest.mark.parametrize("file", [-1, -2])
def test_a_break_in_the_newest_two_files_is_refused_and_nothing_is_touched(log: Path, file: int) -> None:
    write_days(log)
    damage(files(log)[file])
    before = {path: path.read_bytes() for path in log.iterdir()}
    with pytest.raises(OrcdError, match=r"not an unbroken chain: audit-.* line 2: .*Keep the directory") as refused:
        AuditDirectory(log, worker_id="w1")
    assert refused.value.code is ErrorCode.POLICY_VIOLATION
    assert {path: path.read_bytes() for path in log.iterdir()} == before


@pytest.mark.requirement("WORKER-4163")
def test_an_unfinished_line_before_the_newest_file_is_no_crash_and_is_refused(log: Path) -> None:
    write_days(log)
    middle = files(log)[1]
    middle.write_bytes(middle.read_bytes()[:-5])
    newest = files(log)[2].read_bytes()
    assert code_of(log) is ErrorCode.POLICY_VIOLATION
    assert files(log)[2].read_bytes() == newest


@pytest.mark.requirement("WORKER-4163")
def test_a_start_checks_a_bounded_part_and_the_verifier_all(log: Path) -> None:
    write_days(log)
    damage(files(log)[0])
    write(log, NOON)
    broken = verify_audit(log).broken
    assert broken is not None
    assert (broken.file, broken.why) == ("audit-000000000001.jsonl", "edited")


@pytest.mark.requirement("WORKER-4163")
def test_a_newest_file_that_does_not_continue_the_one_before_is_refused(log: Path) -> None:
    write_days(log)
    files(log)[1].unlink()
    assert code_of(log) is ErrorCode.POLICY_VIOLATION


@pytest.mark.requirement("WORKER-4161")
def test_empty_files_of_starts_that_could_not_write_are_passed_over(log: Path) -> None:
    write_days(log, days=1)
    for name in ("audit-000000000005.jsonl", "audit-000000000006.jsonl", "audit-000000000007.jsonl"):
        (log / name).touch(mode=0o600)
    write(log, NOON)
    report = verify_audit(log)
    assert (report.broken, report.files, report.records) == (None, 2, 6)
    assert records(log)[4]["continues"] == "audit-000000000001.jsonl"


# -- an unfinished last line -------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4163")
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(cut=st.integers(1, 700))
def test_an_unfinished_last_line_is_set_aside_and_noted(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    log = tmp_path_factory.mktemp("torn") / "audit"
    write_days(log, days=2, records_a_day=2)
    newest = files(log)[-1]
    whole = newest.read_bytes()
    newest.write_bytes(kept := whole[:-cut])
    torn = kept[kept.rfind(b"\n") + 1 :]
    write(log, NOON, NOON + timedelta(days=1), durable=False)
    assert verify_audit(log).broken is None
    noted = [record for record in records(log) if record["event"] == "log_recovered"]
    if not torn:
        assert (noted, list(log.glob("torn-*"))) == ([], [])
        return
    (aside,) = log.glob("torn-*")
    assert aside.read_bytes() == torn
    assert stat.S_IMODE(aside.stat().st_mode) == 0o600
    assert [(n["file"], n["aside"], n["bytes"]) for n in noted] == [(newest.name, aside.name, len(torn))]
    assert events(log)[-3:] == ["log_recovered", "sealed", "sealed"]


@pytest.mark.requirement("WORKER-4163")
def test_a_file_whose_first_line_is_unfinished_is_begun_again_under_its_name(log: Path) -> None:
    write_days(log, days=1)
    torn = log / "audit-000000000005.jsonl"
    for _ in range(2):  # the second time, what the first start wrote is torn too
        torn.write_bytes(b'{"event":"log_op')
        write(log, NOON)
    assert verify_audit(log).broken is None
    assert sorted(path.name for path in log.glob("torn-*")) == ["torn-000000000005", "torn-000000000005.1"]


@pytest.mark.requirement("WORKER-4163")
def test_a_chain_of_which_no_record_is_left_to_continue_is_refused(log: Path) -> None:
    log.mkdir(mode=0o700)
    (log / "audit-000000000005.jsonl").write_bytes(b'{"event":"log_op')
    assert code_of(log) is ErrorCode.POLICY_VIOLATION


@pytest.mark.requirement("WORKER-4163")
def test_nothing_is_written_before_the_first_record(log: Path) -> None:
    write_days(log, days=1)
    newest = files(log)[0]
    newest.write_bytes(newest.read_bytes()[:-3])
    before = newest.read_bytes()
    write(log)
    assert newest.read_bytes() == before
    assert list(log.iterdir()) == [newest]
