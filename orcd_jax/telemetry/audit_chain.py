"""The chain of an audit log across its files, and where it is broken (WORKER-4162).

A file is named for its first record, so names never repeat and sort by ``seq``, whatever the clock did.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.telemetry.audit_record import GENESIS, MAX_LINE_BYTES, Head, Record, read_record

Why = Literal["edited", "removed", "inserted", "reordered", "truncated"]

_NAME = re.compile(r"audit-([0-9]{12,18})\.jsonl")


@dataclass(frozen=True, slots=True)
class ChainBreak:
    """The first place where a chain does not hold.

    Attributes:
      file: name of the file; empty when there is none.
      line: number of the line in it, from 1.
      why: what the lines around it look like; see :func:`verify_audit`.
      seq: the record that was expected there.
    """

    file: str
    line: int
    why: Why
    seq: int

    def __str__(self) -> str:
        what = {
            "edited": f"record {self.seq} or the one before it is not what was written",
            "removed": f"record {self.seq} is missing",
            "inserted": f"this line does not belong there: record {self.seq} was due",
            "reordered": f"record {self.seq} was due, and comes later",
            "truncated": f"the log ends before record {self.seq} is complete",
        }[self.why]
        return f"{self.file or 'no audit file'}, line {self.line}: {what} ({self.why})"


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """What a verifier saw, up to the first break.

    Attributes:
      files: files with at least one byte.
      records: intact records of one unbroken chain.
      first_seq, first_ts: of the oldest record; 0 and empty without records. Above 1: older files are not here.
      last_ts: of the newest record before the break.
      head: the newest record before the break; compare it with one that was published.
      lost: records that the log itself says were never written.
      broken: the first break; None when every record follows from the one before.
    """

    files: int
    records: int
    first_seq: int
    first_ts: str
    last_ts: str
    head: Head
    lost: int
    broken: ChainBreak | None


class AuditFile(NamedTuple):
    """One file of a chain: its name, and the number of the record it begins with."""

    first_seq: int
    name: str


def file_name(first_seq: int) -> str:
    """The file that begins with this record: ``audit-000000000001.jsonl``."""
    return f"audit-{first_seq:012}.jsonl"


def files_of(directory: int) -> list[AuditFile]:
    """The chain's files that hold anything, oldest first. Other names are not looked at.

    Args:
      directory: an open directory.

    Raises:
      OrcdError: POLICY_VIOLATION, when something with such a name is a link or no plain file.
      OSError: the directory cannot be read.
    """
    found = []
    for name in os.listdir(directory):
        matched = _NAME.fullmatch(name)
        if matched is None or name != file_name(first := int(matched.group(1))):
            continue
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode):
            raise OrcdError(
                ErrorCode.POLICY_VIOLATION,
                f"{name} in the audit directory is a link or a special file: look into who put it there",
            )
        if status.st_size:
            found.append(AuditFile(first, name))
    return sorted(found)


class ChainWalk:
    """Follows a chain through its files, oldest first. Keeps counts and the head, never the records.

    Args:
      directory: an open directory.
      expected: a head that must be on the chain.

    Attributes:
      head: the last record that holds.
      whole_bytes: where the line after it begins, in its file or in the file of a break.
    """

    def __init__(self, directory: int, expected: Head | None = None) -> None:
        self._directory = directory
        self._expected = expected
        self.head = GENESIS
        self.records = self.lost = self.first_seq = self.whole_bytes = 0
        self.first_ts = self.last_ts = ""

    def follow(self, files: Sequence[AuditFile]) -> ChainBreak | None:
        """Reads the files to the first break.

        Raises:
          OSError: a file cannot be read.
        """
        if files and files[0].first_seq > 1:
            self.head = Head(files[0].first_seq - 1, "")  # older files are not looked at: any hash will do
        file, number = AuditFile(0, ""), 0
        with contextlib.closing(self._lines(files)) as lines:
            for file, number, line in lines:
                if number == 1:
                    self.whole_bytes = 0
                if not line.whole:
                    return ChainBreak(file.name, number, "truncated", self.head.seq + 1)
                if line.record is None or not self._follows(line.record):
                    return ChainBreak(file.name, number, self._why(line.record, lines), self.head.seq + 1)
                if (number == 1 and line.record.seq != file.first_seq) or self._rewritten(line.record):
                    return ChainBreak(file.name, number, "edited", self.head.seq + 1)
                self._count(line.record, line.size)
        if self._expected in (None, GENESIS) or self.first_seq <= self._expected.seq <= self.head.seq:
            return None
        why: Why = "removed" if self.records and self._expected.seq < self.first_seq else "truncated"
        return ChainBreak(file.name, number + 1, why, self._expected.seq)

    def _follows(self, record: Record) -> bool:
        return record.seq == self.head.seq + 1 and self.head.hash in ("", record.prev)

    def _rewritten(self, record: Record) -> bool:
        expected = self._expected
        return expected is not None and record.seq == expected.seq and record.hash != expected.hash

    def _count(self, record: Record, size: int) -> None:
        if not self.records:
            self.first_seq, self.first_ts = record.seq, record.ts
        self.head = Head(record.seq, record.hash)
        self.records += 1
        self.lost += record.lost
        self.last_ts = record.ts
        self.whole_bytes += size

    def _why(self, record: Record | None, rest: Iterator[tuple[AuditFile, int, _Line]]) -> Why:
        """Names a break by what follows it: does the record that was due come later, and this one again?"""
        due = self.head.seq + 1
        if record is not None and record.seq < due:
            return "inserted"
        ahead = record is not None and record.seq > due
        comes_later = again = False
        for _, _, line in rest:
            if line.record is not None:
                comes_later = comes_later or self._follows(line.record)
                again = again or line.record == record
        if comes_later:
            return "reordered" if ahead and not again else "inserted"
        return "removed" if ahead else "edited"

    def _lines(self, files: Sequence[AuditFile]) -> Generator[tuple[AuditFile, int, _Line], None, None]:
        for file in files:
            with open_file(self._directory, file.name) as opened:
                for number, line in enumerate(_read_lines(opened), 1):
                    yield file, number, line


def verify_audit(directory: Path, expected: Head | None = None) -> AuditReport:
    """Checks a whole audit log: every hash, every link, across all files, in bounded memory.

    The break is called ``edited`` (a line's bytes, or the link to the one before), ``removed``, ``inserted`` (a line
    that does not belong there or is there twice), ``reordered``, or ``truncated`` (an unfinished last line, or an end
    before ``expected``). The end of a chain that was cut off at a whole line cannot be seen without ``expected``.

    Args:
      directory: may be a copy; a worker may be writing it.
      expected: a head published earlier, such as by GetStatus; it must be on the chain.

    Raises:
      OrcdError: INVALID_PARAMS, when the directory cannot be read; POLICY_VIOLATION, when a link stands for a file.
    """
    try:
        opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            files = files_of(opened)
            walk = ChainWalk(opened, expected)
            broken = walk.follow(files)
        finally:
            os.close(opened)
    except OSError as error:
        raise OrcdError(
            ErrorCode.INVALID_PARAMS,
            f"the audit directory cannot be read ({error.strerror}): give the folder that holds audit-*.jsonl",
        ) from None
    return AuditReport(
        files=len(files),
        records=walk.records,
        first_seq=walk.first_seq,
        first_ts=walk.first_ts,
        last_ts=walk.last_ts,
        head=walk.head if walk.records else GENESIS,
        lost=walk.lost,
        broken=broken,
    )


def open_file(directory: int, name: str) -> BinaryIO:
    """Opens a plain file to read; never through a link. Raises OSError."""
    opened = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise OSError(errno.EINVAL, "not a plain file", name)
    return os.fdopen(opened, "rb")


class _Line(NamedTuple):
    record: Record | None
    size: int
    whole: bool  # ends with a newline


def _read_lines(file: BinaryIO) -> Iterator[_Line]:
    """Every line, of which at most ``MAX_LINE_BYTES`` are held at once; a longer one is no record."""
    while line := file.readline(MAX_LINE_BYTES):
        size, part = len(line), line
        while not part.endswith(b"\n") and (part := file.readline(MAX_LINE_BYTES)):
            size += len(part)
        yield _Line(read_record(line), size, part.endswith(b"\n"))
