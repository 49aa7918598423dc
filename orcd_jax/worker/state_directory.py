"""What a worker keeps between its lives: one private directory for each worker_id, held by one process at a time."""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from orcd_jax.errors import ErrorCode, OrcdError

_LONGEST_NAME = 200  # a file system takes 255 bytes, a worker_id has up to 256


@dataclass(frozen=True, slots=True)
class StateDirectory:
    """Owns the directory until it is closed or the process ends, however it ends.

    Attributes:
      path: of this worker's own directory; mode 0700.
    """

    path: Path
    _lock: int

    @classmethod
    def open(cls, state_dir: Path | None, worker_id: str, environment: Mapping[str, str]) -> StateDirectory:
        """Makes the directory if it is not there, checks that it is private, and takes it.

        Args:
          state_dir: as ``--state_dir`` gives it.
          worker_id: whose it is.
          environment: the process's: STATE_DIRECTORY (set by a service manager) and HOME.

        Raises:
          OrcdError: INVALID_PARAMS, when it cannot be used or others can use it; BUSY, when another process has it.
        """
        base = base_directory(state_dir, environment)
        path = base / _folder_of(worker_id)
        try:
            base.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_base(base, base.stat())
            with suppress(FileExistsError):
                path.mkdir(mode=0o700)
            _check_own(path, path.lstat())
            for folder in ("plans", "audit"):
                (path / folder).mkdir(mode=0o700, exist_ok=True)
            lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            _refuse(path, f"it cannot be used ({error.strerror}): choose another, or check permissions")
        try:
            # Freed by the kernel with the last descriptor: a killed process leaves no stale lock.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            written = os.pread(lock, 32, 0).decode("ascii", "replace")
            holder = f"as process {written}" if written.isdigit() else "already"
            os.close(lock)
            if not isinstance(error, BlockingIOError):
                _refuse(path, f"it cannot be locked ({error.strerror}): choose one on a local disk")
            raise OrcdError(
                ErrorCode.BUSY,
                f"worker {worker_id} runs {holder}: stop that one, or give this one another --worker_id",
                field="worker_id",
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        return cls(path, lock)

    @property
    def identity(self) -> Path:
        """The Ed25519 key that signs attestations, unless ``--identity_key_file`` names another."""
        return self.path / "identity.pem"

    @property
    def restarts(self) -> Path:
        """The restart ledger."""
        return self.path / "restarts.json"

    @property
    def plans(self) -> Path:
        """Folder of recorded memory plans."""
        return self.path / "plans"

    @property
    def audit(self) -> Path:
        """Folder of the audit log."""
        return self.path / "audit"

    def close(self) -> None:
        """Lets another process have it."""
        os.close(self._lock)


def base_directory(state_dir: Path | None, environment: Mapping[str, str]) -> Path:
    """Where workers keep their directories: ``--state_dir``, else $STATE_DIRECTORY, else below $HOME.

    Raises:
      OrcdError: INVALID_PARAMS, when none of them is an absolute path.
    """
    if state_dir is not None:
        return state_dir.absolute()
    given = environment.get("STATE_DIRECTORY", "").split(":")[0]  # a service manager may list several
    home = environment.get("HOME", "")
    base = Path(given) if given else Path(home) / ".local" / "state" / "orcd-jax"
    if not base.is_absolute():
        _refuse(base, "it is not an absolute path, and neither is $STATE_DIRECTORY or $HOME: give --state_dir")
    return base


def _folder_of(worker_id: str) -> str:
    if len(worker_id) <= _LONGEST_NAME:
        return worker_id
    return f"{worker_id[:_LONGEST_NAME]}-{hashlib.sha256(worker_id.encode()).hexdigest()[:16]}"


def _check_base(base: Path, status: os.stat_result) -> None:
    """Refuses a directory in which others could exchange the worker's own; the sticky bit keeps them from it."""
    if status.st_uid not in (0, os.geteuid()):
        _refuse(base, "it belongs to another user: choose one of your own")
    if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
        _refuse(base, f"others can write it (mode {stat.S_IMODE(status.st_mode):04o}): run `chmod 700` on it")


def _check_own(path: Path, status: os.stat_result) -> None:
    """Refuses a directory that is a link, another user's, or open to others."""
    if not stat.S_ISDIR(status.st_mode):
        _refuse(path, "it is not a directory")
    if status.st_uid != os.geteuid():
        _refuse(path, "it belongs to another user: choose one of your own")
    if status.st_mode & 0o077:
        _refuse(path, f"others can use it (mode {stat.S_IMODE(status.st_mode):04o}): run `chmod 700` on it")


def _refuse(path: Path, problem: str) -> NoReturn:
    raise OrcdError(ErrorCode.INVALID_PARAMS, f"--state_dir: {ascii(str(path))[:120]}: {problem}", field="state_dir")
