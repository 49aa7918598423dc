"""Looks at every file the configuration names before anything is started, so that all that is wrong is said at once."""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path

from orcd_jax.config import WorkerConfig

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
