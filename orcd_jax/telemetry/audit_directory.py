"""The directory of an audit log: one writer's lock, the file being written, and where the chain goes on (WORKER-4161).

    DIRECTORY/                        0700, of the worker's own user
      audit-000000000001.jsonl        0600, named for its first record
      audit-000000000731.jsonl        a new file at each start, each UTC day, and at 100 MB
      torn-000000000731               an unfinished line that a killed worker left

Files are only appended to; a file of an earlier start is touched once, to set its unfinished line aside.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import shutil
import stat
from collections.abc import Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import BinaryIO, NamedTuple

from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.telemetry.audit_chain import ChainWalk, file_name, files_of
from orcd_jax.telemetry.audit_record import GENESIS, AuditEvent, Value, chained

MAX_FILE_BYTES = 100_000_000
CHECKED_FILES = 2
"""How many of the newest files are checked at start: bounded work, and the link between them is seen."""

_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_READ_WRITE = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC


class AuditDirectory:
    """Appends records to the newest file of an audit directory, which it owns and locks. For one thread.

    Opening it only reads. Everything that writes, repairs included, happens in :meth:`append`, which may fail and be
    called again: a file is never left with half a line, unless the disk refuses even to shorten it.

    Args:
      directory: made with mode 0700 if it is missing; its parent must be there.
      worker_id: on every record.
      durable: whether files that are finished or set aside are forced onto the disk.
      max_file_bytes: a new file is begun when one has reached it.

    Attributes:
      head: the newest record.

    Raises:
      OrcdError: POLICY_VIOLATION, when others can use the directory, it is a link, or its newest two files are not an
        unbroken chain; BUSY, when another process writes it; INVALID_PARAMS, when it cannot be made or read.
    """

    def __init__(
        self, directory: Path, *, worker_id: str, durable: bool = True, max_file_bytes: int = MAX_FILE_BYTES
    ) -> None:
        self._worker_id = worker_id
        self._durable = durable
        self._max_file_bytes = max_file_bytes
        self._file: _OpenFile | None = None
        self._continues: dict[str, str] = {}
        self._torn: _Torn | None = None
        self._recovered: dict[str, Value] | None = None
        self.head = GENESIS
        try:
            self._directory = _open_private(directory)
        except OSError as error:
            raise _unusable(error) from None
        try:
            self._lock()
            self._check_newest()
        except OSError as error:
            os.close(self._directory)
            raise _unusable(error) from None
        except OrcdError:
            os.close(self._directory)
            raise

    def append(self, event: AuditEvent, at: datetime, fields: Mapping[str, Value]) -> None:
        """Writes one record, in a new file if one is due.

        Args:
          event: what happened.
          at: aware; the record's time.
          fields: as :func:`audit_record.known_fields` gives them.

        Raises:
          OSError: the record is not written; what is written is an unbroken chain.
        """
        file = self._file if self._file is not None and not self._is_over(self._file, at) else self._begin_file(at)
        if self._recovered is not None:
            self._put(file, AuditEvent.LOG_RECOVERED, at, self._recovered)
            self._recovered = None
            if self._durable:
                file.sync()
        self._put(file, event, at, fields)

    def sync(self) -> None:
        """Forces what was written onto the disk. Raises OSError."""
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        """Closes the file and lets another process write the directory. Raises OSError."""
        try:
            if self._file is not None:
                self._file.close()
        finally:
            self._file = None
            os.close(self._directory)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OrcdError(
                ErrorCode.BUSY,
                "another process writes this audit directory: each worker needs its own, named by its worker_id",
                field="state_dir",
            ) from None

    def _check_newest(self) -> None:
        files = files_of(self._directory)[-CHECKED_FILES:]
        if not files:
            return
        walk = ChainWalk(self._directory)
        broken = walk.follow(files)
        newest = files[-1].name
        unfinished = broken is not None and broken.why == "truncated" and broken.file == newest
        if (broken is not None and not unfinished) or not walk.head.hash:
            raise OrcdError(
                ErrorCode.POLICY_VIOLATION,
                f"the audit log is not an unbroken chain: {broken}. Keep the directory as evidence, move it elsewhere, "
                "and start again: a new chain begins",
                field="state_dir",
            )
        if unfinished:
            self._torn = _Torn(newest, walk.whole_bytes)
        self.head, self._continues = walk.head, {"continues": newest}

    def _is_over(self, file: _OpenFile, at: datetime) -> bool:
        """A file holds records of one start and one UTC day: a clock that jumps, back too, begins a new one."""
        return file.day != _day(at) or file.size >= self._max_file_bytes or file.size == 0  # 0: its begin failed

    def _begin_file(self, at: datetime) -> _OpenFile:
        if self._torn is not None:
            self._recovered = self._set_aside(self._torn)
            self._torn = None
        name = file_name(self.head.seq + 1)
        file = self._file
        if file is None or file.size:  # an empty one has this name already
            if file is not None:
                self._finish(file)
            file = self._file = _OpenFile(self._directory, name)
        file.day = _day(at)
        self._put(file, AuditEvent.LOG_OPENED, at, {"pid": os.getpid(), **self._continues})
        self._continues = {"continues": name}
        if self._durable:
            file.sync()
            os.fsync(self._directory)  # its name too
        return file

    def _finish(self, file: _OpenFile) -> None:
        if self._durable:
            file.sync()
        self._file = None
        file.close()

    def _put(self, file: _OpenFile, event: AuditEvent, at: datetime, fields: Mapping[str, Value]) -> None:
        line, head = chained(self.head, event, at, self._worker_id, fields)
        file.write(line)
        self.head = head

    def _set_aside(self, torn: _Torn) -> dict[str, Value]:
        """Moves an unfinished line out of its file: first it is on the disk twice, then once."""
        with os.fdopen(os.open(torn.name, _READ_WRITE, dir_fd=self._directory), "r+b", buffering=0) as file:
            file.seek(torn.whole_bytes)
            aside = self._copy_aside(file)
            if self._durable:
                os.fsync(self._directory)
            length = file.tell() - torn.whole_bytes
            file.truncate(torn.whole_bytes)
            if self._durable:
                os.fsync(file.fileno())
        return {"file": torn.name, "aside": aside, "bytes": length}

    def _copy_aside(self, source: BinaryIO) -> str:
        """Copies the rest of ``source`` into a new file, whose name it returns; all of it, or nothing is left."""
        base = f"torn-{self.head.seq + 1:012}"
        for name in itertools.chain([base], (f"{base}.{again}" for again in itertools.count(1))):
            try:
                opened = os.open(name, _NEW_FILE, 0o600, dir_fd=self._directory)
            except FileExistsError:
                continue
            break
        try:
            with os.fdopen(opened, "wb") as aside:
                shutil.copyfileobj(source, aside)
                aside.flush()
                if self._durable:
                    os.fsync(opened)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=self._directory)
            raise
        return name


class _Torn(NamedTuple):
    """A file whose last line is unfinished: what is whole of it."""

    name: str
    whole_bytes: int


class _OpenFile:
    """Owns one new file of the chain. A write that fails leaves no part of its line behind."""

    def __init__(self, directory: int, name: str) -> None:
        self.day = date.min
        self.size = 0
        self._half_written = False
        self._fd = os.open(name, _APPEND, 0o600, dir_fd=directory)
        # An empty one is left over from a begin that failed; anything else is not ours to add to.
        if os.fstat(self._fd).st_size:
            os.close(self._fd)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)

    def write(self, line: bytes) -> None:
        try:
            if self._half_written:
                self._shorten()
            self._half_written = True
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError:
            with contextlib.suppress(OSError):  # then the next write tries again, and so does the next start
                self._shorten()
            raise
        self._half_written = False
        self.size += len(line)

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)

    def _shorten(self) -> None:
        os.ftruncate(self._fd, self.size)
        self._half_written = False


def _open_private(directory: Path) -> int:
    """Opens the directory, made if it is missing, and refuses one that others could read or write."""
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    try:
        opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise _refused("is a link or no directory: give the directory itself") from None
        raise
    status = os.fstat(opened)
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        os.close(opened)
        raise _refused("can be used by others: it must belong to the worker's user and have mode 0700")
    return opened


def _day(at: datetime) -> date:
    return at.astimezone(UTC).date()


def _refused(how: str) -> OrcdError:
    return OrcdError(ErrorCode.POLICY_VIOLATION, f"the audit directory {how}", field="state_dir")


def _unusable(error: OSError) -> OrcdError:
    return OrcdError(
        ErrorCode.INVALID_PARAMS,
        f"the audit directory cannot be used ({error.strerror}): its parent must be there, and its disk readable",
        field="state_dir",
    )
