"""Gives up what a worker does not need of the system: capabilities, new privileges, core dumps (WORKER-4900).

Capabilities and no-new-privileges belong to a thread and are inherited by those it starts. So the first stage comes
before any library that starts threads is imported, JAX above all, and refuses a process that has several. Linux only;
elsewhere nothing is done and the result says so.

With no-new-privileges the driver's setuid helper cannot make device nodes: they must be there before the worker starts.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

from orcd_jax.errors import ErrorCode, OrcdError

# prctl(2)
_PR_GET_DUMPABLE, _PR_SET_DUMPABLE = 3, 4
_PR_CAPBSET_READ, _PR_CAPBSET_DROP = 23, 24
_PR_SET_NO_NEW_PRIVS, _PR_GET_NO_NEW_PRIVS = 38, 39
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
# capset(2): version 3 of its header, and two words for each of the three sets
_CAPABILITY_VERSION_3 = 0x20080522
_UMASK = 0o077


class Stage(enum.Enum):
    """When in a worker's life."""

    START = "start"
    """Before the first thread."""
    DEVICE_READY = "device_ready"
    """After the device was initialised, which reads what the last restriction would hide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restrictions:
    """What holds now, for the log.

    Attributes:
      supported: this is Linux; otherwise nothing was done.
      no_new_privileges: no program this process runs can gain any.
      capabilities_dropped: none is left in the effective, permitted, inheritable and ambient sets.
      bounding_dropped: none can be had again. Only a process that had CAP_SETPCAP can give these up.
      dumpable: other processes of the same user may read this one's memory.
    """

    supported: bool
    no_new_privileges: bool = False
    capabilities_dropped: bool = False
    bounding_dropped: bool = False
    dumpable: bool = True

    def __str__(self) -> str:
        if not self.supported:
            return "not restricted: only Linux has the means"
        held = {
            "no new privileges": self.no_new_privileges,
            "no capabilities": self.capabilities_dropped,
            "none to be had": self.bounding_dropped,
            "not dumpable": not self.dumpable,
        }
        return ", ".join(name for name, holds in held.items() if holds) or "nothing yet"


def lock_down(stage: Stage) -> Restrictions:
    """Does what belongs to a stage. Cannot be undone.

    START: no-new-privileges, no capabilities, umask 077, no core files. DEVICE_READY: not dumpable.

    Raises:
      OrcdError: POLICY_VIOLATION, when the system refuses what it should allow, or when the first stage comes too late.
    """
    if sys.platform != "linux":
        return Restrictions(supported=False)
    libc = ctypes.CDLL(None, use_errno=True)
    if stage is Stage.START:
        if _threads() != 1:
            raise _violation("the process has several threads already, and each would have to give them up itself")
        os.umask(_UMASK)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _require(_prctl(libc, _PR_SET_NO_NEW_PRIVS, 1), "no-new-privileges")
        _drop_bounding(libc)
        _require(_prctl(libc, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL), "to clear the ambient capabilities")
        _require(libc.capset(_capability_header(), (ctypes.c_uint32 * 6)()), "to drop the capabilities")
    else:
        _require(_prctl(libc, _PR_SET_DUMPABLE, 0), "to be not dumpable")
    return _restrictions(libc)


def _threads() -> int:
    try:
        return sum(1 for _ in Path("/proc/self/task").iterdir())
    except OSError as error:
        raise _violation(f"the threads of this process cannot be counted ({error.strerror})") from None


def _prctl(libc: ctypes.CDLL, option: int, argument: int = 0) -> int:
    """The answer of prctl(2); negative when it refuses, with the reason in errno."""
    zero = ctypes.c_ulong(0)
    return int(libc.prctl(ctypes.c_int(option), ctypes.c_ulong(argument), zero, zero, zero))


def _require(status: int, what: str) -> None:
    if status < 0:
        raise _violation(f"the system refuses {what} ({os.strerror(ctypes.get_errno())})")


def _drop_bounding(libc: ctypes.CDLL) -> None:
    """As far as it is permitted; what remains is of no use, since no program can gain privileges."""
    for capability in _bounding(libc):
        status = _prctl(libc, _PR_CAPBSET_DROP, capability)
        if status < 0 and ctypes.get_errno() == errno.EPERM:
            return
        _require(status, f"to drop capability {capability}")


def _bounding(libc: ctypes.CDLL) -> list[int]:
    """Capabilities that could be had. Asking about one past the kernel's last is an error: not held."""
    return [capability for capability in range(64) if _prctl(libc, _PR_CAPBSET_READ, capability) == 1]


def _capability_header() -> ctypes.Array[ctypes.c_uint32]:
    return (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)


def _restrictions(libc: ctypes.CDLL) -> Restrictions:
    """What holds, as the kernel says."""
    held = (ctypes.c_uint32 * 6)()
    _require(libc.capget(_capability_header(), held), "to say which capabilities are held")
    return Restrictions(
        supported=True,
        no_new_privileges=_prctl(libc, _PR_GET_NO_NEW_PRIVS) == 1,
        capabilities_dropped=not any(held),
        bounding_dropped=not _bounding(libc),
        dumpable=_prctl(libc, _PR_GET_DUMPABLE) != 0,
    )


def _violation(problem: str) -> OrcdError:
    return OrcdError(ErrorCode.POLICY_VIOLATION, f"privileges cannot be given up: {problem}")
