"""Traces of jobs, by the GenAI conventions of OpenTelemetry, where an exporter is configured (WORKER-4821).

    tracing = open_tracing(config.otlp_endpoint, worker_id=…, pool_id=…)
    span = tracing.job(operation="chat", job_id=…, model=…, max_tokens=64, temperature=0.0, traceparent=…)
    span.ended(tokens_in=12, tokens_out=34, finish_reason="eos")
    tracing.close()

Without an endpoint nothing is traced, and OpenTelemetry is not even imported. A span holds numbers and names; no method
takes a prompt or an answer.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal

from orcd_jax.errors import ErrorCode, OrcdError

Operation = Literal["chat", "text_completion"]

CLOSE_TIMEOUT_S = 3.0

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")


@dataclass(frozen=True, slots=True)
class TraceParent:
    """The span of a caller, as W3C Trace Context tells it."""

    trace_id: int
    span_id: int
    sampled: bool


def parse_traceparent(value: str) -> TraceParent | None:
    """What a ``traceparent`` header says; None when it is malformed, and then a new trace begins.

    Source: https://www.w3.org/TR/trace-context/. A version after 00 may have more behind a further hyphen.
    """
    match = _TRACEPARENT.match(value)
    if match is None:
        return None
    version, trace_id, span_id, flags = (int(part, 16) for part in match.groups())
    rest = value[match.end() :]
    if version == 0xFF or not trace_id or not span_id or (rest and (version == 0 or not rest.startswith("-"))):
        return None
    return TraceParent(trace_id, span_id, sampled=bool(flags & 1))


class JobSpan:
    """One job's span. This one is of a worker that does not trace: it does nothing, and all jobs share it."""

    __slots__ = ()

    @property
    def trace_id(self) -> str:
        """32 hex digits, for the log; empty without a trace."""
        return ""

    def ended(self, *, tokens_in: int, tokens_out: int, finish_reason: str) -> None:
        """The job ended well. Only the first end counts."""

    def failed(self, code: ErrorCode) -> None:
        """The job ended otherwise. Only the first end counts."""


class Tracing:
    """Begins spans. This one is of a worker that does not trace."""

    _nothing = JobSpan()

    def job(
        self,
        *,
        operation: Operation,
        job_id: str,
        model: str,
        max_tokens: int,
        temperature: float,
        traceparent: str = "",
    ) -> JobSpan:
        """Begins the span of a job, which must be ended.

        Args:
          operation: ``chat`` for a conversation, ``text_completion`` for text or token ids.
          job_id: as validated.
          model: what runs it.
          max_tokens: as asked for.
          temperature: as asked for.
          traceparent: what the caller sent, in whatever state it is; empty: nothing.
        """
        del operation, job_id, model, max_tokens, temperature, traceparent
        return self._nothing

    def close(self) -> None:
        """Sends what is left and ends; blocks for :data:`CLOSE_TIMEOUT_S` at most. Spans that end later are dropped."""


def open_tracing(endpoint: str, *, worker_id: str, pool_id: str) -> Tracing:
    """What ``--otlp_endpoint`` asks for.

    Args:
      endpoint: URL of an OTLP/HTTP collector; without a path, ``/v1/traces`` is added. Empty: nothing is traced.
      worker_id: told with every span.
      pool_id: told with every span.

    Raises:
      OrcdError: INVALID_PARAMS, when the endpoint is no http or https URL, or the extra ``otel`` is not installed.
    """
    if not endpoint:
        return Tracing()
    # The SDK reads these when it is imported, built and used: they would steer it past the worker's flags.
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        del os.environ[name]
    try:
        from orcd_jax.telemetry.otlp import open_otlp
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "opentelemetry":
            raise
        raise OrcdError(
            ErrorCode.INVALID_PARAMS,
            "traces need OpenTelemetry, which is not installed: run pip install 'orcd-jax[otel]', or leave "
            "--otlp_endpoint out",
            field="otlp_endpoint",
        ) from None
    return open_otlp(endpoint, worker_id=worker_id, pool_id=pool_id)
