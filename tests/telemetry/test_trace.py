"""Traces: one span a job by the GenAI conventions, to the configured endpoint and nowhere else."""

from __future__ import annotations

import contextlib
import inspect
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.telemetry import otlp
from orcd_jax.telemetry.otlp import OtlpTracing
from orcd_jax.telemetry.trace import JobSpan, TraceParent, Tracing, open_tracing, parse_traceparent

WAIT_S = 10.0
DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"


@dataclass
class Memory:
    """Traces into memory."""

    exporter: InMemorySpanExporter = field(default_factory=InMemorySpanExporter)

    def __post_init__(self) -> None:
        self.tracing = OtlpTracing(SimpleSpanProcessor(self.exporter), worker_id="w1", pool_id="p1")

    def span(self) -> ReadableSpan:
        (span,) = self.exporter.get_finished_spans()
        return span


@pytest.fixture
def memory() -> Memory:
    return Memory()


def begin(tracing: Tracing, traceparent: str = "", job_id: str = "job-1") -> JobSpan:
    return tracing.job(
        operation="chat", job_id=job_id, model="tiny", max_tokens=64, temperature=0.5, traceparent=traceparent
    )


def end(span: JobSpan) -> None:
    span.ended(tokens_in=12, tokens_out=34, finish_reason="eos")


# -- what a span says ------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4821")
@pytest.mark.requirement("WORKER-4822")
def test_a_job_is_one_span_by_the_conventions_and_nothing_more(memory: Memory) -> None:
    end(begin(memory.tracing))
    span = memory.span()
    assert span.name == "chat tiny"
    assert span.kind is SpanKind.SERVER
    assert span.status.status_code is StatusCode.UNSET
    assert span.parent is None
    assert not span.events
    assert not span.links
    assert dict(span.attributes or {}) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "orcd-jax",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 64,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.response.id": "job-1",
        "gen_ai.response.model": "tiny",
        "gen_ai.usage.input_tokens": 12,
        "gen_ai.usage.output_tokens": 34,
        "gen_ai.response.finish_reasons": ("stop",),
    }
    resource = dict(span.resource.attributes)
    assert resource.pop("service.version")
    assert resource == {"service.name": "orcd-jax", "service.namespace": "p1", "service.instance.id": "w1"}


@pytest.mark.requirement("WORKER-4821")
@pytest.mark.parametrize("code", ErrorCode)
def test_a_job_that_fails_names_its_code(memory: Memory, code: ErrorCode) -> None:
    begin(memory.tracing).failed(code)
    span = memory.span()
    assert (span.attributes or {})["error.type"] == code.value
    expected = StatusCode.UNSET if code is ErrorCode.CANCELLED else StatusCode.ERROR
    assert span.status.status_code is expected


def test_only_the_first_end_counts(memory: Memory, caplog: pytest.LogCaptureFixture) -> None:
    span = begin(memory.tracing)
    span.failed(ErrorCode.TIMEOUT)
    end(span)
    span.failed(ErrorCode.INTERNAL)
    attributes = dict(memory.span().attributes or {})
    assert attributes["error.type"] == "TIMEOUT"
    assert "gen_ai.usage.output_tokens" not in attributes
    assert not caplog.records, "the library complained"


@pytest.mark.requirement("WORKER-4800")
@pytest.mark.requirement("WORKER-4822")
def test_no_method_can_be_given_a_prompt_or_an_answer() -> None:
    for kind in (Tracing, OtlpTracing, JobSpan, otlp.OtlpSpan):
        for name, method in inspect.getmembers(kind, inspect.isfunction):
            assert not {"prompt", "text", "output", "token", "answer"} & set(inspect.signature(method).parameters), name


# -- the caller's trace ----------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4821")
def test_a_span_is_a_child_of_the_callers(memory: Memory) -> None:
    job = begin(memory.tracing, PARENT)
    assert job.trace_id == TRACE
    end(job)
    parent = memory.span().parent
    assert parent is not None
    assert (f"{parent.trace_id:032x}", f"{parent.span_id:016x}", parent.is_remote) == (TRACE, SPAN, True)


def test_a_caller_that_does_not_sample_is_obeyed_and_still_named(memory: Memory) -> None:
    job = begin(memory.tracing, PARENT[:-1] + "0")
    assert job.trace_id == TRACE
    end(job)
    job.failed(ErrorCode.INTERNAL)
    assert memory.exporter.get_finished_spans() == ()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (PARENT, TraceParent(int(TRACE, 16), int(SPAN, 16), sampled=True)),
        (f"00-{TRACE}-{SPAN}-00", TraceParent(int(TRACE, 16), int(SPAN, 16), sampled=False)),
        (f"00-{TRACE}-{SPAN}-03", TraceParent(int(TRACE, 16), int(SPAN, 16), sampled=True)),
        (f"cc-{TRACE}-{SPAN}-01-what-comes-later", TraceParent(int(TRACE, 16), int(SPAN, 16), sampled=True)),
        (f"cc-{TRACE}-{SPAN}-01", TraceParent(int(TRACE, 16), int(SPAN, 16), sampled=True)),
        (f"cc-{TRACE}-{SPAN}-01.what", None),
        (f"ff-{TRACE}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-{SPAN}-01", None),
        (f"{PARENT}-more", None),
        (f"{PARENT}\n", None),
        (f" {PARENT}", None),
        (PARENT[:-1], None),
        ("", None),
    ],
)
def test_a_traceparent_is_read_as_the_standard_says(value: str, expected: TraceParent | None) -> None:
    assert parse_traceparent(value) == expected


@pytest.mark.requirement("WORKER-4821")
@given(
    value=st.one_of(
        st.text(max_size=80), st.text("0123456789abcdef-", max_size=60), st.from_regex(r"\A..-.{32}-.{16}-")
    )
)
def test_whatever_a_caller_sends_a_job_has_a_span(value: str) -> None:
    memory = Memory()
    job = begin(memory.tracing, value)
    end(job)
    assert int(job.trace_id, 16)
    if (parsed := parse_traceparent(value)) is None:
        assert memory.span().parent is None
    else:
        assert int(job.trace_id, 16) == parsed.trace_id


# -- without an endpoint ---------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4821")
def test_without_an_endpoint_nothing_is_imported_made_or_started() -> None:
    script = (
        "import sys, threading; from orcd_jax.telemetry.trace import open_tracing; "
        "tracing = open_tracing('', worker_id='w', pool_id='p'); "
        "make = lambda: tracing.job(operation='chat', job_id='j', model='m', max_tokens=1, temperature=0.0); "
        "assert make() is make() and make().trace_id == ''; "
        "make().ended(tokens_in=1, tokens_out=1, finish_reason='eos'); tracing.close(); "
        "assert threading.active_count() == 1; "
        "sys.exit(any(name.split('.')[0] in ('opentelemetry', 'jax') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_an_endpoint_without_the_extra_is_refused_with_what_to_do() -> None:
    script = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from orcd_jax.errors import OrcdError\n"
        "from orcd_jax.telemetry.trace import open_tracing\n"
        "try: open_tracing('http://127.0.0.1:4318', worker_id='w', pool_id='p')\n"
        "except OrcdError as error: print(error.code, error.field, error.message)"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.startswith("INVALID_PARAMS otlp_endpoint ")
    assert "orcd-jax[otel]" in said


@pytest.mark.parametrize(
    "endpoint",
    [
        "ftp://127.0.0.1/",
        "127.0.0.1:4318",
        "http:///v1",
        "http://user:password@127.0.0.1/",
        "http://127.0.0.1:0/",
        "http://127.0.0.1:99999/",
        "http://127.0.0.1/?token=x",
        "http://127.0.0.1/#x",
        "http://127.0.0.1/a b",
        "file:///etc/passwd",
    ],
)
def test_an_endpoint_that_is_none_is_refused_without_repeating_it(endpoint: str) -> None:
    with pytest.raises(OrcdError) as refused:
        open_tracing(endpoint, worker_id="w1", pool_id="p1")
    assert (refused.value.code, refused.value.field) == (ErrorCode.INVALID_PARAMS, "otlp_endpoint")
    assert endpoint not in refused.value.message


# -- sending ---------------------------------------------------------------------------------------------------------


@dataclass
class Collector:
    """An OTLP/HTTP collector that answers with ``status``, after ``hold`` is set."""

    status: int = 200
    location: str = ""
    hold: threading.Event = field(default_factory=threading.Event)
    arrived: threading.Event = field(default_factory=threading.Event)
    requests: list[tuple[str, Mapping[str, str], ExportTraceServiceRequest]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)  # a POST that is redirected comes as a GET
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def names(self) -> list[str]:
        return [
            span.name
            for _, _, message in self.requests
            for resource in message.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            collector.others.append(self.command)
            self.send_error(404)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            collector.requests.append((self.path, dict(self.headers), ExportTraceServiceRequest.FromString(body)))
            collector.arrived.set()
            collector.hold.wait(WAIT_S)
            with contextlib.suppress(ConnectionError):
                self.send_response(collector.status)
                if collector.location:
                    self.send_header("Location", collector.location)
                self.send_header("Content-Length", "0")
                self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
            del format, args

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector.port = server.server_port
        collector.hold.set()
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield collector
        finally:
            collector.hold.set()
            server.shutdown()
            thread.join(WAIT_S)


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as started:
        yield started


@pytest.mark.requirement("WORKER-4821")
@pytest.mark.parametrize(("path", "expected"), [("", "/v1/traces"), ("/", "/v1/traces"), ("/my/traces", "/my/traces")])
def test_closing_sends_what_is_left_to_the_endpoint(collector: Collector, path: str, expected: str) -> None:
    tracing = open_tracing(collector.url + path, worker_id="w1", pool_id="p1")
    for number in range(3):
        end(begin(tracing, PARENT, job_id=f"job-{number}"))
    tracing.close()
    assert collector.names() == ["chat tiny"] * 3
    ((where, headers, message),) = collector.requests
    assert (where, headers["Content-Type"]) == (expected, "application/x-protobuf")
    span = message.resource_spans[0].scope_spans[0].spans[0]
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, SPAN)
    assert "Authorization" not in headers


@pytest.mark.requirement("WORKER-4821")
@pytest.mark.requirement("WORKER-4922")
def test_the_environment_sends_nothing_elsewhere_and_switches_nothing_off(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collecting() as elsewhere:
        hostile = {
            "OTEL_SDK_DISABLED": "true",
            "OTEL_TRACES_SAMPLER": "always_off",
            "OTEL_EXPORTER_OTLP_ENDPOINT": elsewhere.url,
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": elsewhere.url,
            "OTEL_EXPORTER_OTLP_HEADERS": "authorization=secret",
            "OTEL_RESOURCE_ATTRIBUTES": "secret=1",
            "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "1",
            "OTEL_BSP_MAX_QUEUE_SIZE": "1",
            "http_proxy": elsewhere.url,
            "HTTP_PROXY": elsewhere.url,
        }
        for name, value in hostile.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        tracing = open_tracing(collector.url, worker_id="w1", pool_id="p1")
        for _ in range(3):
            end(begin(tracing))
        tracing.close()
        assert (elsewhere.requests, elsewhere.others) == ([], [])
    assert collector.names() == ["chat tiny"] * 3
    assert b"secret" not in collector.requests[0][2].SerializeToString()
    assert "secret" not in str(collector.requests[0][1])
    assert len(collector.requests[0][2].resource_spans[0].scope_spans[0].spans[0].attributes) == 10
    assert not [name for name in os.environ if name.startswith("OTEL_")]


@pytest.mark.requirement("WORKER-4922")
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(collector: Collector, status: int) -> None:
    with collecting() as elsewhere:
        collector.status, collector.location = status, elsewhere.url + "/v1/traces"
        tracing = open_tracing(collector.url, worker_id="w1", pool_id="p1")
        end(begin(tracing))
        tracing.close()
        assert (elsewhere.requests, elsewhere.others) == ([], [])
    assert len(collector.requests) == 1


def test_a_collector_that_refuses_is_said_once_and_jobs_go_on(
    collector: Collector, capsys: pytest.CaptureFixture[str]
) -> None:
    collector.status = 503
    exporter = otlp.OtlpExporter(collector.url + "/v1/traces")
    tracing = OtlpTracing(SimpleSpanProcessor(exporter), worker_id="w1", pool_id="p1")
    for _ in range(3):
        end(begin(tracing))
    assert capsys.readouterr().out.count("HTTP 503") == 1
    collector.status = 200
    end(begin(tracing))
    collector.status = 500
    end(begin(tracing))
    assert capsys.readouterr().out.count("HTTP 500") == 1
    tracing.close()


def test_a_collector_that_is_not_there_is_said_and_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    with collecting() as gone:
        exporter = otlp.OtlpExporter(gone.url + "/v1/traces")
    tracing = OtlpTracing(SimpleSpanProcessor(exporter), worker_id="w1", pool_id="p1")
    end(begin(tracing))
    tracing.close()
    assert "Traces cannot be delivered (ConnectionRefusedError)" in capsys.readouterr().out


@pytest.mark.requirement("WORKER-4821")
def test_closing_waits_for_a_collector_that_hangs_only_so_long(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(otlp, "CLOSE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(otlp, "_SEND_TIMEOUT_S", WAIT_S)
    collector.hold.clear()
    tracing = open_tracing(collector.url, worker_id="w1", pool_id="p1")
    end(begin(tracing))
    began = time.monotonic()
    tracing.close()
    assert time.monotonic() - began < WAIT_S / 2
    assert collector.arrived.wait(WAIT_S)


def test_a_span_that_ends_after_closing_is_dropped(collector: Collector) -> None:
    tracing = open_tracing(collector.url, worker_id="w1", pool_id="p1")
    span = begin(tracing)
    tracing.close()
    end(span)
    assert collector.requests == []


def test_the_documented_attributes_are_those_a_span_has(memory: Memory) -> None:
    end(begin(memory.tracing))
    first = set(memory.span().attributes or {})
    memory.exporter.clear()
    begin(memory.tracing).failed(ErrorCode.INTERNAL)
    text = DOCUMENT.read_text(encoding="utf-8")
    listed = {name for name in text.split("`") if name.startswith(("gen_ai.", "error."))}
    assert listed == first | set(memory.span().attributes or {})
