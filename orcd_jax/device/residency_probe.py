"""Where the CUDA driver says that a buffer lies. Pointers are read here and leave by no way (WORKER-4013, 4101)."""

from __future__ import annotations

import ctypes
import enum
import functools
from dataclasses import dataclass

import jax

from orcd_jax.errors import ErrorCode, OrcdError

_MEMORY_TYPE, _IS_MANAGED = 2, 8  # CUpointer_attribute


class MemoryType(enum.IntEnum):
    """The driver's CUmemorytype."""

    UNKNOWN = 0
    HOST = 1
    DEVICE = 2
    ARRAY = 3
    UNIFIED = 4


@dataclass(frozen=True, slots=True)
class DriverView:
    """What the driver says of one buffer."""

    memory: MemoryType
    managed: bool


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise OrcdError(
            ErrorCode.POLICY_VIOLATION, "the CUDA driver library cannot be loaded, so residency cannot be checked"
        ) from None


def driver_view(array: jax.Array) -> DriverView:
    """Asks the CUDA driver about an array's buffer.

    Raises:
      OrcdError: POLICY_VIOLATION, when the driver does not answer.
    """
    pointer = ctypes.c_uint64(array.unsafe_buffer_pointer())
    return DriverView(MemoryType(_attribute(pointer, _MEMORY_TYPE)), bool(_attribute(pointer, _IS_MANAGED)))


def _attribute(pointer: ctypes.c_uint64, attribute: int) -> int:
    value = ctypes.c_uint(0)
    status = _driver().cuPointerGetAttribute(ctypes.byref(value), ctypes.c_int(attribute), pointer)
    if status != 0:
        raise OrcdError(
            ErrorCode.POLICY_VIOLATION, f"the CUDA driver does not know a buffer (attribute {attribute}: {status})"
        )
    return value.value
