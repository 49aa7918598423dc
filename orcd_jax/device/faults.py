"""What a device's exceptions mean, in the project's own error codes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

from orcd_jax.errors import ErrorCode, OrcdError


def translate(error: Exception) -> OrcdError:
    """The typed error for an exception raised by a program or a transfer.

    XLA reports its status as text at the start of the message (``RESOURCE_EXHAUSTED: …``). The text itself may hold
    addresses and is not passed on.
    """
    if isinstance(error, OrcdError):
        return error
    if isinstance(error, MemoryError):
        return OrcdError(ErrorCode.HOST_OOM, "the host ran out of memory")
    if isinstance(error, jax.errors.JaxRuntimeError):
        status = str(error).split(":", 1)[0].strip()
        if status == "RESOURCE_EXHAUSTED":
            return OrcdError(ErrorCode.VRAM_OOM, "the device ran out of memory; lower --slots_total or --max_context")
        return OrcdError(ErrorCode.CUDA_ERROR, f"the device failed ({status[:40]})")
    return OrcdError(ErrorCode.INTERNAL, f"an internal error ({type(error).__name__})")


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Turns what a device raises inside into its typed error; everything else passes."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        raise translate(error) from error


def is_out_of_memory(error: OrcdError) -> bool:
    """Whether the device may go on after this error with fresh buffers."""
    return error.code in (ErrorCode.VRAM_OOM, ErrorCode.HOST_OOM)
