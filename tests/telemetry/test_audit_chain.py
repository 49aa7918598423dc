"""An audit log that was touched in any way is found out, and it is said where and how."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.telemetry.audit_chain import AuditReport, verify_audit
from orcd_jax.telemetry.audit_record import GENESIS, AuditEvent, Head, chained
from tests.telemetry.audit_samples import NOON, files, records, write_days

Lines = list[list[bytes]]
LINES_A_FILE = 4
FILES = 3
TOTAL = FILES * LINES_A_FILE


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken log of three files with four records each."""
    directory = tmp_path_factory.mktemp("audit") / "log"
    write_days(directory)
    return directory


def lines_of(directory: Path) -> Lines:
    return [path.read_bytes().splitlines(keepends=True) for path in files(directory)]


def verified(sample: Path, change: Callable[[Lines], None], expected: Head | None = None) -> AuditReport:
    """The report on a copy of the log whose lines were changed."""
    lines = lines_of(sample)
    change(lines)
    with tempfile.TemporaryDirectory() as scratch:
        for path, content in zip(files(sample), lines, strict=True):
            Path(scratch, path.name).write_bytes(b"".join(content))
        return verify_audit(Path(scratch), expected)


def why(report: AuditReport) -> tuple[str, int, str] | None:
    broken = report.broken
    return None if broken is None else (broken.file[-6 - 2 : -6], broken.line, broken.why)


def place(number: int) -> tuple[int, int]:
    return divmod(number, LINES_A_FILE)


# -- what holds --------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4161")
def test_an_untouched_log_is_whole(sample: Path) -> None:
    report = verify_audit(sample)
    newest = records(sample)[-1]
    assert report.broken is None
    assert (report.files, report.records, report.first_seq, report.lost) == (FILES, TOTAL, 1, 0)
    assert report.head == Head(TOTAL, newest["hash"])
    assert (report.first_ts, report.last_ts) == ("2026-03-01T12:00:00.000000Z", "2026-03-03T12:00:02.000000Z")


@pytest.mark.requirement("WORKER-4161")
def test_the_chain_is_what_the_documentation_says(sample: Path) -> None:
    prev = "0" * 64
    for seq, record in enumerate(records(sample), 1):
        digest = record.pop("hash")
        assert (record["seq"], record["prev"]) == (seq, prev)
        text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        assert hashlib.sha256(text.encode()).hexdigest() == digest
        prev = digest


@pytest.mark.requirement("WORKER-4161")
def test_the_first_record_of_a_file_repeats_where_it_continues(sample: Path) -> None:
    first, second, _ = files(sample)
    opening = json.loads(second.read_text(encoding="utf-8").splitlines()[0])
    before = json.loads(first.read_text(encoding="utf-8").splitlines()[-1])
    assert (opening["event"], opening["continues"], opening["prev"]) == ("log_opened", first.name, before["hash"])


# -- what is found -----------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4162")
@settings(deadline=None)
@given(number=st.integers(0, TOTAL - 1), at=st.integers(0), byte=st.integers(0, 255))
def test_any_edited_byte_is_found(sample: Path, number: int, at: int, byte: int) -> None:
    file, line = place(number)
    position = 0

    def edit(lines: Lines) -> None:
        nonlocal position
        old = lines[file][line]
        position = at % len(old)
        assume(old[position] != byte)
        lines[file][line] = old[:position] + bytes([byte]) + old[position + 1 :]

    report = verified(sample, edit)
    assert report.broken is not None
    assert report.records == number


@pytest.mark.requirement("WORKER-4162")
@settings(deadline=None)
@given(number=st.integers(0, TOTAL - 2))
def test_any_removed_line_is_found(sample: Path, number: int) -> None:
    file, line = place(number)
    report = verified(sample, lambda lines: lines[file].__delitem__(line))
    assert report.broken is not None
    assert (report.broken.why, report.broken.seq) == ("removed", number + 1)


@pytest.mark.requirement("WORKER-4162")
@settings(deadline=None)
@given(pair=st.lists(st.integers(0, TOTAL - 1), min_size=2, max_size=2, unique=True))
def test_any_two_swapped_lines_are_found(sample: Path, pair: list[int]) -> None:
    (f, i), (g, j) = (place(number) for number in pair)

    def swap(lines: Lines) -> None:
        lines[f][i], lines[g][j] = lines[g][j], lines[f][i]

    report = verified(sample, swap)
    assert report.broken is not None
    assert (report.broken.why, report.broken.seq) == ("reordered", min(pair) + 1)


@pytest.mark.requirement("WORKER-4162")
@settings(deadline=None)
@given(before=st.integers(0, TOTAL), copied=st.integers(0, TOTAL - 1))
def test_any_line_that_is_there_twice_is_found(sample: Path, before: int, copied: int) -> None:
    file, line = place(before) if before < TOTAL else (FILES - 1, LINES_A_FILE)

    def insert(lines: Lines) -> None:
        source_file, source_line = place(copied)
        lines[file].insert(line, lines[source_file][source_line])

    assert verified(sample, insert).broken is not None


@pytest.mark.requirement("WORKER-4162")
@settings(deadline=None)
@given(before=st.integers(0, TOTAL), garbage=st.binary(max_size=200))
def test_any_inserted_garbage_is_found(sample: Path, before: int, garbage: bytes) -> None:
    file, line = place(before) if before < TOTAL else (FILES - 1, LINES_A_FILE)
    report = verified(sample, lambda lines: lines[file].insert(line, garbage.replace(b"\n", b" ") + b"\n"))
    assert report.broken is not None
    assert report.records == before


@pytest.mark.requirement("WORKER-4162")
@settings(deadline=None)
@given(number=st.integers(0, TOTAL - 2))
def test_a_forged_record_with_a_right_hash_and_link_is_found(sample: Path, number: int) -> None:
    """Someone who can compute hashes, but does not rewrite all that follows."""
    file, line = place(number)

    def forge(lines: Lines) -> None:
        old = json.loads(lines[file][line])
        lines[file][line], _ = chained(Head(old["seq"] - 1, old["prev"]), AuditEvent.SEALED, NOON, "w1", {})

    report = verified(sample, forge)
    assert report.broken is not None
    assert (report.broken.why, report.records) == ("edited", number + 1)


@pytest.mark.requirement("WORKER-4162")
@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda lines: lines[1].__setitem__(2, lines[1][2].replace(b"down", b"gate")), ("05", 3, "edited")),
        (lambda lines: lines[1].__setitem__(2, lines[1][2].replace(b',"seq"', b', "seq"')), ("05", 3, "edited")),
        (lambda lines: lines[1].__delitem__(2), ("05", 3, "removed")),
        (lambda lines: lines[0].pop(), ("05", 1, "removed")),
        (lambda lines: lines[1].clear(), ("09", 1, "removed")),
        (lambda lines: lines[1].insert(2, lines[1][0]), ("05", 3, "inserted")),
        (lambda lines: lines[1].insert(2, lines[2][3]), ("05", 3, "inserted")),
        (lambda lines: lines[1].insert(2, b"{}\n"), ("05", 3, "inserted")),
        (lambda lines: lines[2].append(lines[2][3]), ("09", 5, "inserted")),
        (lambda lines: lines[1].insert(1, lines[1].pop(3)), ("05", 2, "reordered")),
        (lambda lines: lines[0].__setitem__(3, lines[0][3][:-1]), ("01", 4, "truncated")),
        (lambda lines: lines[2].__setitem__(3, lines[2][3][:-9]), ("09", 4, "truncated")),
        (lambda lines: lines[2].append(b"\0" * 4096), ("09", 5, "truncated")),
    ],
)
def test_a_break_is_named_with_its_file_and_line(
    sample: Path, change: Callable[[Lines], None], found: tuple[str, int, str]
) -> None:
    assert why(verified(sample, change)) == found


@pytest.mark.requirement("WORKER-4162")
def test_a_missing_file_in_the_middle_is_found_and_missing_oldest_files_are_told(sample: Path, tmp_path: Path) -> None:
    shutil.copytree(sample, tmp_path / "middle")
    files(tmp_path / "middle")[1].unlink()
    assert why(verify_audit(tmp_path / "middle")) == ("09", 1, "removed")
    shutil.copytree(sample, tmp_path / "oldest")
    files(tmp_path / "oldest")[0].unlink()
    report = verify_audit(tmp_path / "oldest")
    assert (report.broken, report.first_seq, report.records) == (None, 5, 8)


@pytest.mark.requirement("WORKER-4162")
def test_a_file_under_another_name_is_found(sample: Path, tmp_path: Path) -> None:
    shutil.copytree(sample, tmp_path / "log")
    newest = files(tmp_path / "log")[-1]
    newest.rename(newest.with_name("audit-000000000010.jsonl"))
    assert why(verify_audit(tmp_path / "log")) == ("10", 1, "edited")


@pytest.mark.requirement("WORKER-4162")
def test_a_first_record_that_continues_something_else_is_found(tmp_path: Path) -> None:
    line, _ = chained(Head(0, "f" * 64), AuditEvent.LOG_OPENED, NOON, "w1", {})
    (tmp_path / "audit-000000000001.jsonl").write_bytes(line)
    assert why(verify_audit(tmp_path)) == ("01", 1, "edited")


@pytest.mark.requirement("WORKER-4162")
def test_a_number_left_out_is_found_also_where_every_hash_is_right(sample: Path) -> None:
    newest = verify_audit(sample).head
    line, _ = chained(Head(newest.seq + 1, newest.hash), AuditEvent.SEALED, NOON, "w1", {})
    assert why(verified(sample, lambda lines: lines[2].append(line))) == ("09", 5, "removed")


# -- the end of the chain needs a head from elsewhere ------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4162")
@pytest.mark.parametrize("cut", [1, 3, 4, 7])
def test_a_cut_off_end_is_seen_against_a_published_head_only(sample: Path, cut: int) -> None:
    def shorten(lines: Lines) -> None:
        for _ in range(cut):
            next(content for content in reversed(lines) if content).pop()

    assert verified(sample, shorten).broken is None
    report = verified(sample, shorten, verify_audit(sample).head)
    assert report.broken is not None
    assert (report.broken.why, report.broken.seq) == ("truncated", TOTAL)


@pytest.mark.requirement("WORKER-4162")
def test_a_wholly_rewritten_log_is_seen_against_a_published_head(sample: Path, tmp_path: Path) -> None:
    write_days(tmp_path / "forged", records_a_day=4)
    published = verify_audit(sample).head
    assert verify_audit(tmp_path / "forged").broken is None
    report = verify_audit(tmp_path / "forged", published)
    assert report.broken is not None
    assert (report.broken.why, report.broken.seq) == ("edited", TOTAL)


@pytest.mark.requirement("WORKER-4162")
def test_every_head_that_was_published_is_on_the_chain(sample: Path, tmp_path: Path) -> None:
    heads = [Head(record["seq"], record["hash"]) for record in records(sample)]
    assert all(verify_audit(sample, head).broken is None for head in [GENESIS, *heads])
    shutil.copytree(sample, tmp_path / "log")
    files(tmp_path / "log")[0].unlink()
    gone = verify_audit(tmp_path / "log", heads[1]).broken
    assert gone is not None
    assert (gone.why, gone.seq) == ("removed", 2)


@pytest.mark.requirement("WORKER-4162")
def test_an_empty_directory_has_no_records_and_no_break(tmp_path: Path) -> None:
    report = verify_audit(tmp_path)
    assert (report.files, report.records, report.first_seq, report.head, report.broken) == (0, 0, 0, GENESIS, None)
    assert verify_audit(tmp_path, Head(3, "a" * 64)).broken is not None


# -- a hostile directory -----------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4162")
@settings(deadline=None)
@given(content=st.binary(max_size=2000))
def test_any_bytes_give_a_report(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "audit-000000000001.jsonl").write_bytes(content)
        report = verify_audit(Path(scratch))
    assert (report.broken is None) == (content == b"")


@pytest.mark.requirement("WORKER-4162")
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_an_endless_line_takes_bounded_memory(sample: Path, tmp_path: Path, end: bytes) -> None:
    shutil.copytree(sample, tmp_path / "log")
    with files(tmp_path / "log")[-1].open("ab") as file:
        file.truncate(16 * 1024 * 1024)
        file.write(end)
    tracemalloc.start()
    try:
        report = verify_audit(tmp_path / "log")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert why(report) == ("09", 5, "edited" if end else "truncated")
    assert peak < 1024 * 1024


@pytest.mark.requirement("WORKER-4162")
def test_a_link_in_the_place_of_a_file_is_refused(sample: Path, tmp_path: Path) -> None:
    (tmp_path / "audit-000000000001.jsonl").symlink_to(files(sample)[0])
    with pytest.raises(OrcdError, match="link or a special file") as refused:
        verify_audit(tmp_path)
    assert refused.value.code is ErrorCode.POLICY_VIOLATION


@pytest.mark.requirement("WORKER-4162")
def test_what_is_not_named_like_a_file_of_the_log_is_not_looked_at(sample: Path, tmp_path: Path) -> None:
    shutil.copytree(sample, tmp_path / "log")
    for name in ("audit-1.jsonl", "audit-0000000000005.jsonl", "torn-000000000003", "audit-000000000005.jsonl.gz"):
        (tmp_path / "log" / name).write_text("x")
    assert verify_audit(tmp_path / "log").broken is None
