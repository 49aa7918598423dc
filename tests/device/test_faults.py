"""Device exceptions become typed errors that reveal nothing."""

from __future__ import annotations

import jax
import pytest

from orcd_jax.device.faults import is_out_of_memory, translate
from orcd_jax.errors import ErrorCode, OrcdError


@pytest.mark.requirement("WORKER-4400")
@pytest.mark.requirement("WORKER-4150")
@pytest.mark.requirement("WORKER-4153")
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 0xdeadbeef"), ErrorCode.VRAM_OOM),
        (jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS at 0xdeadbeef"), ErrorCode.CUDA_ERROR),
        (MemoryError("0xdeadbeef"), ErrorCode.HOST_OOM),
        (ValueError("0xdeadbeef"), ErrorCode.INTERNAL),
    ],
)
def test_exceptions_become_codes_without_their_text(error: Exception, code: ErrorCode) -> None:
    translated = translate(error)
    assert translated.code is code
    assert "deadbeef" not in translated.message


@pytest.mark.requirement("WORKER-4151")
@pytest.mark.requirement("WORKER-4960")
def test_only_running_out_of_memory_can_be_survived() -> None:
    assert is_out_of_memory(OrcdError(ErrorCode.VRAM_OOM, "x"))
    assert not is_out_of_memory(OrcdError(ErrorCode.CUDA_ERROR, "x"))
