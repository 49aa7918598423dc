"""The one table of errors: code → gRPC status, HTTP status, retriable; and of process exit codes.

Errors are raised near their cause as an :class:`OrcdError` and turned into a status in one place (``server``).
A message gives the value, the limit and what to do; it never contains prompts, outputs, tokens, keys or pointers.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class ErrorCode(enum.StrEnum):
    """Stable, public error codes (WORKER-4950)."""

    INVALID_PARAMS = "INVALID_PARAMS"
    AUTH_FAILED = "AUTH_FAILED"
    NOT_FOUND = "NOT_FOUND"
    NOT_READY = "NOT_READY"
    MODEL_LOAD_FAILED = "MODEL_LOAD_FAILED"
    INSUFFICIENT_VRAM = "INSUFFICIENT_VRAM"
    VRAM_OOM = "VRAM_OOM"
    HOST_OOM = "HOST_OOM"
    SEAL_VERIFICATION_FAILED = "SEAL_VERIFICATION_FAILED"
    POLICY_VIOLATION = "POLICY_VIOLATION"
    CAPABILITY_MISMATCH = "CAPABILITY_MISMATCH"
    BUSY = "BUSY"
    TIMEOUT = "TIMEOUT"
    CANCELLED = "CANCELLED"
    CUDA_ERROR = "CUDA_ERROR"
    INTERNAL = "INTERNAL"


@dataclass(frozen=True, slots=True)
class ErrorSpec:
    """How one code is presented to callers.

    Attributes:
      grpc: name of the gRPC status (``grpclib.Status`` member).
      http: HTTP status.
      retriable: whether the same request may succeed later, here or on another worker.
    """

    grpc: str
    http: int
    retriable: bool


ERRORS: dict[ErrorCode, ErrorSpec] = {
    ErrorCode.INVALID_PARAMS: ErrorSpec("INVALID_ARGUMENT", 400, retriable=False),
    ErrorCode.AUTH_FAILED: ErrorSpec("UNAUTHENTICATED", 401, retriable=False),
    ErrorCode.NOT_FOUND: ErrorSpec("NOT_FOUND", 404, retriable=False),
    ErrorCode.NOT_READY: ErrorSpec("UNAVAILABLE", 503, retriable=True),
    ErrorCode.MODEL_LOAD_FAILED: ErrorSpec("FAILED_PRECONDITION", 422, retriable=False),
    ErrorCode.INSUFFICIENT_VRAM: ErrorSpec("FAILED_PRECONDITION", 507, retriable=False),
    ErrorCode.VRAM_OOM: ErrorSpec("RESOURCE_EXHAUSTED", 507, retriable=True),
    ErrorCode.HOST_OOM: ErrorSpec("RESOURCE_EXHAUSTED", 507, retriable=True),
    ErrorCode.SEAL_VERIFICATION_FAILED: ErrorSpec("DATA_LOSS", 500, retriable=False),
    ErrorCode.POLICY_VIOLATION: ErrorSpec("PERMISSION_DENIED", 403, retriable=False),
    ErrorCode.CAPABILITY_MISMATCH: ErrorSpec("FAILED_PRECONDITION", 422, retriable=False),
    ErrorCode.BUSY: ErrorSpec("RESOURCE_EXHAUSTED", 429, retriable=True),
    ErrorCode.TIMEOUT: ErrorSpec("DEADLINE_EXCEEDED", 504, retriable=True),
    ErrorCode.CANCELLED: ErrorSpec("CANCELLED", 499, retriable=False),
    ErrorCode.CUDA_ERROR: ErrorSpec("INTERNAL", 500, retriable=True),
    ErrorCode.INTERNAL: ErrorSpec("INTERNAL", 500, retriable=False),
}


class OrcdError(Exception):
    """An error with a stable code, safe to show to a caller.

    Args:
      code: the stable code.
      message: one sentence for a person: the field or thing, the value's size or the limit, what to do.
      field: the request or format field at fault, when there is one.
      retry_after_ms: when a retry is worth it, for retriable codes.
      needed_bytes: what did not fit, where something did not.
      available_bytes: what there is of it.
    """

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        *,
        field: str | None = None,
        retry_after_ms: int | None = None,
        needed_bytes: int | None = None,
        available_bytes: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.field = field
        self.retry_after_ms = retry_after_ms
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes

    @property
    def spec(self) -> ErrorSpec:
        """How this error's code is presented."""
        return ERRORS[self.code]


class ExitCode(enum.IntEnum):
    """Exit codes of every command of the project (documented in the README)."""

    OK = 0
    FAILED = 1  # the job or request was refused or failed
    USAGE = 2  # bad flags, bad configuration, bad token file
    NO_DEVICE = 3  # the platform asked for is not there
    MODEL = 4  # a model, checkpoint or source file is missing, unreadable, unsupported or corrupt
    ADDRESS = 5  # the address cannot be bound
    UNREACHABLE = 6  # no worker answers at the address
    UNAUTHENTICATED = 7  # the worker refused the token
    CALLBACK = 8  # the readiness callback could not be delivered in time
    DEVICE = 9  # the device failed at run time
    SEAL = 10  # the weights on the device are no longer what was sealed, or not where they must be
    RESTARTS = 11  # the worker ended abnormally too often: it is not started again
    AUDIT = 12  # the audit log cannot be written, and the policy is to stop
    INTERNAL = 70  # a bug
    INTERRUPTED = 130  # Ctrl-C
