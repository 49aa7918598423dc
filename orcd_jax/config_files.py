"""The files that the configuration names.

All are looked at before anything is started, so that all that is wrong is said at once. Small ones are read here too,
as strictly at the start as later.
"""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path

from orcd_jax.config import WorkerConfig
from orcd_jax.errors import ErrorCode, OrcdError

_SECRETS = ("api_token_file", "control_token_file", "callback_token_file", "tls_key_file", "seal_key_file")
_PUBLIC = ("tls_cert_file", "tls_client_ca_file", "signature_file", "trusted_keys_file")

# POSIX access lists as the kernel stores them: a version, then entries of a tag, permissions and a user or group.
_ACL = "system.posix_acl_access"
_ACL_VERSION = 2
_ACL_ENTRY = struct.Struct("<HHI")
_USER_OBJ, _USER, _MASK = 0x01, 0x02, 0x10


def problems_of_files(config: WorkerConfig) -> list[str]:
    """What is wrong with the files and directories the configuration names, one line each; empty when nothing is.

    Their content is checked by whoever reads them.
    """
    problems: list[str] = []

    def check(name: str, path: Path | None, *, secret: bool = False, folder: bool = False) -> None:
        if path is not None and (problem := _problem(path, secret=secret, folder=folder)):
            problems.append(f"--{name}: {ascii(str(path))[:80]} {problem}")

    check("model_path", None if config.await_commit else config.model_path, folder=True)
    check("model_root", config.model_root, folder=True)
    for name in _SECRETS:
        check(name, getattr(config, name), secret=True)
    for name in _PUBLIC:
        check(name, getattr(config, name))
    identity = config.identity_key_file
    if identity is not None and not os.access(identity, os.F_OK):  # the first start makes it
        check("identity_key_file", identity.parent, folder=True)
    else:
        check("identity_key_file", identity, secret=True)
    if config.control_token_file is not None and _same(config.api_token_file, config.control_token_file):
        problems.append(
            "--control_token_file: it is the file of --api_token_file, so whoever runs jobs could stop the worker: use "
            "another token"
        )
    return problems


def others_can_use(opened: int) -> bool:
    """Whether anyone but this process's user (and root) can read or change an open file.

    A service manager hands credentials over as root's files with an access list that lets this one user in. Their
    mode looks like 0440, because its group digits are then the list's mask: so the list is read, where there is one.
    """
    status = os.fstat(opened)
    if not status.st_mode & 0o077:
        return False
    if status.st_uid not in (0, os.geteuid()):
        return True
    try:
        access_list = os.getxattr(opened, _ACL)
    except (OSError, AttributeError):  # it has none; or this is not Linux
        return True
    return lets_others_in(access_list, os.geteuid())


def lets_others_in(access_list: bytes, user: int) -> bool:
    """Whether a POSIX access list grants anything to anyone but the file's owner and ``user``."""
    version = int.from_bytes(access_list[:4], "little")
    if version != _ACL_VERSION or len(access_list) % _ACL_ENTRY.size != 4:
        return True
    return any(
        permissions and tag not in (_USER_OBJ, _MASK) and not (tag == _USER and whom == user)
        for tag, permissions, whom in _ACL_ENTRY.iter_unpack(access_list[4:])
    )


def read_private(path: Path, flag: str, most: int) -> str:
    """The text of a small regular file that only its owner can use.

    Args:
      path: the file.
      flag: who named it, for errors.
      most: bytes it may have.

    Raises:
      OrcdError: INVALID_PARAMS, saying what is wrong with the file and what to do.
    """
    try:
        return read_small(path, flag, most, private=True).decode("ascii")
    except UnicodeDecodeError:
        raise refusal(flag, "it has a character that is not ASCII") from None


def read_small(path: Path, flag: str, most: int, *, private: bool = False) -> bytes:
    """The bytes of a small regular file; ``private``: which only its owner can use. Else as :func:`read_private`."""
    try:
        # Without O_NONBLOCK a named pipe would hold the start forever.
        opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        hint = "; make it, with mode 0600, as the user who runs the worker" if private else ""
        raise refusal(flag, f"it cannot be read ({error.strerror or type(error).__name__}){hint}") from None
    try:
        # Of the open file, not of the path: nobody can exchange it in between.
        status = os.fstat(opened)
        if not stat.S_ISREG(status.st_mode):
            raise refusal(flag, "it is not a regular file")
        if private and others_can_use(opened):
            raise refusal(flag, f"others can use it (mode {stat.S_IMODE(status.st_mode):04o}); run `chmod 600` on it")
        if status.st_size > most:
            raise refusal(flag, f"it has {status.st_size} bytes; the limit is {most}")
        return os.read(opened, most + 1)
    finally:
        os.close(opened)


def refusal(flag: str, problem: str) -> OrcdError:
    """INVALID_PARAMS for a file that a flag names."""
    return OrcdError(ErrorCode.INVALID_PARAMS, f"--{flag}: {problem}", field=flag)


def _problem(path: Path, *, secret: bool, folder: bool) -> str:
    """What is wrong with one path; empty when nothing is."""
    try:
        # Without O_NONBLOCK a named pipe would hold the start forever.
        opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        hint = "; make it, with mode 0600, as the user who runs the worker" if secret else ""
        return f"cannot be read ({error.strerror}){hint}"
    try:
        mode = os.fstat(opened).st_mode
        if folder:
            return "" if stat.S_ISDIR(mode) else "is not a directory"
        if not stat.S_ISREG(mode):
            return "is not a regular file"
        if secret and others_can_use(opened):
            return f"can be used by others (mode {stat.S_IMODE(mode):04o}): run `chmod 600` on it"
    finally:
        os.close(opened)
    return ""


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False
