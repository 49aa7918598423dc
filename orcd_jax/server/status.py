"""Errors as gRPC clients see them: one status, and rich details beside it."""

from __future__ import annotations

import datetime

import betterproto2
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from orcd_jax.api.google import rpc
from orcd_jax.api.orcd.worker import v1
from orcd_jax.errors import OrcdError
from orcd_jax.server.codec import PACKAGE


def error_detail(error: OrcdError) -> v1.ErrorDetail:
    """The error as our own message: in the status details, and in a stream's ``error`` event."""
    return v1.ErrorDetail(
        code=v1.ErrorCode[error.code.value],
        message=error.message,
        retriable=error.spec.retriable,
        retry_after_ms=error.retry_after_ms,
        field=error.field or "",
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
