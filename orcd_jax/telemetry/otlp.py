"""Spans by OpenTelemetry's SDK, sent by OTLP over HTTP to the configured endpoint and nowhere else.

Imported only by ``trace.open_tracing``, when an endpoint is configured. The exporter is our own: the SDK's takes
headers, certificates, proxies and credentials from the environment and follows redirects.
"""

from __future__ import annotations

import http.client
import ssl
import threading
from collections.abc import Sequence
from email.message import Message
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request, build_opener

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from orcd_jax import __version__
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.telemetry.log import EventCode, get_logger
from orcd_jax.telemetry.metrics import FINISHED_REASON
from orcd_jax.telemetry.trace import CLOSE_TIMEOUT_S, JobSpan, Operation, Tracing, parse_traceparent

_SEND_TIMEOUT_S = 2.0
_QUEUE, _BATCH, _DELAY_MS = 2048, 512, 2000
_PROVIDER = "orcd-jax"


class OtlpSpan(JobSpan):
    """A job's span that is recorded, unless the caller's is not."""

    __slots__ = ("_span",)

    def __init__(self, span: Span) -> None:
        """Wraps a span that has begun."""
        self._span = span

    @property
    def trace_id(self) -> str:
        return f"{self._span.get_span_context().trace_id:032x}"

    def ended(self, *, tokens_in: int, tokens_out: int, finish_reason: str) -> None:
        if self._span.is_recording():
            self._span.set_attributes(
                {
                    "gen_ai.usage.input_tokens": tokens_in,
                    "gen_ai.usage.output_tokens": tokens_out,
                    "gen_ai.response.finish_reasons": (FINISHED_REASON.get(finish_reason, "stop"),),
                }
            )
            self._span.end()

    def failed(self, code: ErrorCode) -> None:
        if self._span.is_recording():
            self._span.set_attribute("error.type", code.value)
            if code is not ErrorCode.CANCELLED:  # the caller's wish is no fault of the server
                self._span.set_status(Status(StatusCode.ERROR))
            self._span.end()


class OtlpTracing(Tracing):
    """Owns the SDK's provider, with its queue and its thread."""

    def __init__(self, processor: SpanProcessor, *, worker_id: str, pool_id: str) -> None:
        """Gives every span that ends to ``processor``."""
        resource = Resource(
            {
                "service.name": "orcd-jax",
                "service.namespace": pool_id,
                "service.instance.id": worker_id,
                "service.version": __version__,
            }
        )
        # A caller that samples decides for its jobs; others are all traced.
        self._provider = TracerProvider(
            sampler=ParentBased(ALWAYS_ON), resource=resource, span_limits=SpanLimits(), shutdown_on_exit=False
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("orcd_jax", __version__)

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
        return OtlpSpan(
            self._tracer.start_span(
                f"{operation} {model}",
                context=_context(traceparent),
                kind=SpanKind.SERVER,  # the convention's CLIENT is the caller's side of the same call
                attributes={
                    "gen_ai.operation.name": operation,
                    "gen_ai.provider.name": _PROVIDER,
                    "gen_ai.request.model": model,
                    "gen_ai.request.max_tokens": max_tokens,
                    "gen_ai.request.temperature": float(temperature),
                    "gen_ai.response.id": job_id,
                    "gen_ai.response.model": model,
                },
            )
        )

    def close(self) -> None:
        # In a thread of its own: the SDK waits for the exporter as long as it takes.
        closing = threading.Thread(target=self._provider.shutdown, name="otlp-close", daemon=True)
        closing.start()
        closing.join(CLOSE_TIMEOUT_S)


class OtlpExporter(SpanExporter):
    """POSTs spans to one URL: no redirects, no proxy, verified TLS, no second attempt."""

    def __init__(self, url: str) -> None:
        """Sends to ``url``, with its path."""
        self._url = url
        self._opener = _opener()
        self._failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        body = encode_spans(spans).SerializeToString()
        headers = {"Content-Type": "application/x-protobuf", "User-Agent": f"orcd-jax/{__version__}"}
        reason = self._post(Request(self._url, data=body, method="POST", headers=headers))  # noqa: S310 - scheme checked
        if reason and not self._failing:  # once for each time it goes away
            human = f"Traces cannot be delivered ({reason}); they are dropped until the collector takes them."
            get_logger().warning(EventCode.ERROR, human=human, field="otlp_endpoint")
        self._failing = bool(reason)
        return SpanExportResult.FAILURE if reason else SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Nothing is kept open."""

    def force_flush(self, timeout_millis: int = 0) -> bool:
        """Nothing is buffered here."""
        return True

    def _post(self, request: Request) -> str:
        """Empty when it was taken, else a short reason without the server's own words."""
        try:
            with self._opener.open(request, timeout=_SEND_TIMEOUT_S) as answer:
                return "" if 200 <= answer.status < 300 else f"HTTP {answer.status}"
        except HTTPError as error:
            error.close()
            return f"HTTP {error.code}"
        except URLError as error:
            return type(error.reason).__name__ if isinstance(error.reason, Exception) else "no connection"
        except (OSError, http.client.HTTPException) as error:
            return type(error).__name__


class _NoRedirects(HTTPRedirectHandler):
    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> Request | None:
        raise HTTPError(req.full_url, code, "redirect refused", headers, fp)


def open_otlp(endpoint: str, *, worker_id: str, pool_id: str) -> OtlpTracing:
    """Traces to a collector.

    Raises:
      OrcdError: INVALID_PARAMS, when the endpoint is no http or https URL.
    """
    processor = BatchSpanProcessor(
        OtlpExporter(_traces_url(endpoint)),
        max_queue_size=_QUEUE,
        schedule_delay_millis=_DELAY_MS,
        max_export_batch_size=_BATCH,
        export_timeout_millis=_SEND_TIMEOUT_S * 1000,
    )
    return OtlpTracing(processor, worker_id=worker_id, pool_id=pool_id)


def _traces_url(endpoint: str) -> str:
    try:
        url = urlsplit(endpoint)
        usable = url.scheme in ("http", "https") and url.hostname and url.port != 0 and "@" not in url.netloc
    except ValueError:  # a port that is none
        usable = False
    if not usable or url.query or url.fragment or any(c.isspace() or not c.isprintable() for c in endpoint):
        raise OrcdError(
            ErrorCode.INVALID_PARAMS,
            "the endpoint of traces must be an http:// or https:// URL without a user, a query or a fragment",
            field="otlp_endpoint",
        )
    return endpoint if url.path.strip("/") else f"{url.scheme}://{url.netloc}/v1/traces"


def _context(traceparent: str) -> Context:
    """The caller's span as the parent; a new trace when there is none."""
    parent = parse_traceparent(traceparent)
    if parent is None:
        return Context()
    flags = TraceFlags(TraceFlags.SAMPLED if parent.sampled else TraceFlags.DEFAULT)
    remote = SpanContext(parent.trace_id, parent.span_id, is_remote=True, trace_flags=flags)
    return set_span_in_context(NonRecordingSpan(remote), Context())


def _opener() -> OpenerDirector:
    return build_opener(_NoRedirects(), ProxyHandler({}), HTTPSHandler(context=ssl.create_default_context()))
