"""Errors as gRPC clients see them: one status, and rich details beside it."""

from __future__ import annotations

import datetime

import betterproto2
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from orcd_jax.api.google import rpc
from orcd_jax.api.orcd.worker import v1
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.server.call import current_correlation_id
from orcd_jax.server.codec import PACKAGE
from orcd_jax.telemetry.log import EventCode, get_logger, where


def error_detail(error: OrcdError) -> v1.ErrorDetail:
    """The error as our own message: in the status details, and in a stream's ``error`` event."""
    return v1.ErrorDetail(
        code=v1.ErrorCode[error.code.value],
        message=error.message,
        retriable=error.spec.retriable,
        retry_after_ms=error.retry_after_ms,
        field=error.field or "",
        correlation_id=current_correlation_id(),
        needed_bytes=error.needed_bytes,
        available_bytes=error.available_bytes,
    )


def grpc_error(error: OrcdError) -> GRPCError:
    """The error as a gRPC status with an ErrorDetail, an ErrorInfo and, when a retry is worth it, a RetryInfo."""
    info = rpc.ErrorInfo(reason=error.code.value, domain=PACKAGE)
    if error.field:
        info.metadata["field"] = error.field
    details: list[betterproto2.Message] = [error_detail(error), info]
    if error.retry_after_ms is not None:
        details.append(rpc.RetryInfo(retry_delay=datetime.timedelta(milliseconds=error.retry_after_ms)))
    return GRPCError(Status[error.spec.grpc], error.message, details)


def internal_error() -> OrcdError:
    """All that a caller learns of a bug."""
    return OrcdError(ErrorCode.INTERNAL, "internal error")


def report_unexpected(error: Exception) -> None:
    """Logs a bug: where, but not what, for an exception's own text may hold data."""
    human = f"An internal error ({type(error).__name__}) ended a call: please report it with this line."
    get_logger().error(EventCode.ERROR, human=human, code=ErrorCode.INTERNAL.value, where=where(error))
