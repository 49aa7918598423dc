"""What a worker counts and measures, in Prometheus' text format (WORKER-4810). ``docs/metrics.md`` lists every name.

    metrics = WorkerMetrics(platform="cuda")
    metrics.set_gauges(lambda: Snapshot(state="READY", …))
    metrics.job_started(tokens_in=12)
    metrics.exposition()

No label takes a value that a caller chooses: the number of series is fixed when the model is loaded.
"""

from __future__ import annotations

import bisect
import importlib.metadata
import math
import platform as host
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from orcd_jax import __version__
from orcd_jax.errors import ErrorCode

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

STATES = ("STARTING", "LOADING", "READY", "EXECUTING", "DRAINING", "STOPPED")
OUTCOMES = ("success", "error", "cancelled", "timeout")
REFUSALS = ("full", "peer")  # there are as many connections as there may be; or as many of one address
DEVICE_ERRORS = (ErrorCode.CUDA_ERROR, ErrorCode.HOST_OOM, ErrorCode.VRAM_OOM)
# An end of the sequence and a stop string are one reason in the words that other servers use.
FINISHED_REASON: Mapping[str, str] = {"eos": "stop", "stop": "stop", "length": "length"}

# A token of an 8B model takes 4 ms on one GPU and an answer of 4 096 tokens some 20 s; a job may take 300 s.
_FIRST_TOKEN_S = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 30, 60)
_INTER_TOKEN_S = (0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 5)
_DURATION_MS = (10, 25, 50, 100, 250, 500, 1e3, 2.5e3, 5e3, 1e4, 2e4, 3e4, 6e4, 1.2e5, 3e5)
_DIGEST_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

Samples = Iterable[tuple[tuple[str, ...], float]]
"""Label values and value of each series."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What a worker is at this moment, from cached state. None: not known, and then there is no such series.

    Attributes:
      state: one of :data:`STATES`.
      model: what is loaded; empty before. The names of other servers are given only when it is not.
      vram_bytes: device memory held; 0 when emulated.
      running: jobs that were admitted and did not end.
      queued: jobs that wait for admission.
      kv_pages_used: reserved by admitted jobs, for their prompts and their longest answers.
      seal_age_s: since the last full digest of the weights on the device.
      detection_bound_s: a changed byte is found within this.
      audit_records_lost: since the process began.
      gpu_ecc_errors: uncorrected, since the driver was loaded.
    """

    state: str = STATES[0]
    model: str = ""
    vram_bytes: int = 0
    running: int = 0
    queued: int = 0
    rows_used: int = 0
    rows_total: int = 0
    kv_pages_used: int = 0
    kv_pages_total: int = 0
    seal_age_s: float | None = None
    detection_bound_s: float | None = None
    audit_records_lost: int = 0
    gpu_temperature_c: float | None = None
    gpu_power_w: float | None = None
    gpu_ecc_errors: int | None = None


class _Count:
    """A number that only grows. Writers take its lock; readers take none, so that no scrape holds up a writer."""

    __slots__ = ("_lock", "value")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.value = 0

    def add(self, amount: int = 1) -> None:
        with self._lock:
            self.value += amount


class _Distribution:
    """How often a value fell between which bounds. Locked as :class:`_Count` is."""

    __slots__ = ("_bounds", "_counts", "_lock", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._lock = threading.Lock()
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        place = bisect.bisect_left(self._bounds, value)  # a bound belongs to the bucket below it
        with self._lock:
            self._counts[place] += times
            self._sum += value * times

    def family(
        self, name: str, help_text: str, *, scale: float = 1.0, labels: Mapping[str, str] | None = None
    ) -> Metric:
        """The histogram as Prometheus wants it: cumulative. ``scale`` turns the unit into another."""
        labels = labels or {}
        counts, seen, buckets = self._counts.copy(), 0, []  # copied in one go: the buckets belong together
        for bound, count in zip((*self._bounds, math.inf), counts, strict=True):
            seen += count
            buckets.append(("+Inf" if math.isinf(bound) else repr(float(f"{bound * scale:.12g}")), float(seen)))
        histogram = HistogramMetricFamily(name, help_text, labels=tuple(labels))
        histogram.add_metric(tuple(labels.values()), buckets, self._sum * scale)
        return histogram


class WorkerMetrics(Collector):
    """Owns every count of a worker, and its registry. Thread-safe.

    Writers never wait for a scrape, which takes no lock of theirs, asks no device, and reads everything else from the
    one :class:`Snapshot` that its source gives.
    """

    def __init__(self, platform: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Nothing counted yet.

        Args:
          platform: ``cuda`` or ``cpu``.
          clock: monotonic seconds.
        """
        self._clock, self._began_s = clock, clock()
        self._build = {
            "version": __version__,
            "platform": platform,
            "python": host.python_version(),
            "jax": importlib.metadata.version("jax"),
        }
        self._source: Callable[[], Snapshot] = Snapshot
        self._requests = {outcome: _Count() for outcome in OUTCOMES}
        self._finished = {reason: _Count() for reason in sorted(set(FINISHED_REASON.values()))}
        self._device_errors = {code: _Count() for code in DEVICE_ERRORS}
        self._tokens_in, self._tokens_out, self._auth_failures = _Count(), _Count(), _Count()
        self._refused = {why: _Count() for why in REFUSALS}
        self._first_token = _Distribution(_FIRST_TOKEN_S)
        self._inter_token = _Distribution(_INTER_TOKEN_S)
        self._duration = _Distribution(_DURATION_MS)
        self._digest, self._digests = _Distribution(_DIGEST_S), _Count()
        self.registry = CollectorRegistry()
        self.registry.register(self)

    # -- what happens --------------------------------------------------------------------------------------------

    def set_gauges(self, source: Callable[[], Snapshot]) -> None:
        """Where a scrape learns what the worker is now: called once for each, so it must answer from cached state."""
        self._source = source

    def job_started(self, tokens_in: int) -> None:
        """A job was admitted, with so many prompt tokens."""
        self._tokens_in.add(tokens_in)

    def first_tokens(self, count: int, ttft_s: float) -> None:
        """The first tokens of a job came, so long after the job."""
        self._tokens_out.add(count)
        self._first_token.observe(ttft_s)

    def tokens(self, count: int, latency_s: float) -> None:
        """The next ``count`` tokens of a job came together, so long after those before: each took its share."""
        if count > 0:
            self._tokens_out.add(count)
            self._inter_token.observe(latency_s / count, count)

    def job_succeeded(self, *, duration_s: float, finish_reason: str) -> None:
        """A job ended well, so long after it came."""
        self._requests["success"].add()
        self._duration.observe(duration_s * 1e3)
        self._finished[FINISHED_REASON.get(finish_reason, "stop")].add()

    def job_failed(self, code: ErrorCode) -> None:
        """A job ended otherwise, or was refused."""
        known = {ErrorCode.CANCELLED: "cancelled", ErrorCode.TIMEOUT: "timeout"}
        self._requests[known.get(code, "error")].add()

    def digest_pass(self, duration_s: float) -> None:
        """All weights on the device were digested once more."""
        self._digests.add()
        self._digest.observe(duration_s)

    def device_error(self, code: ErrorCode) -> None:
        """The device, or the memory that serves it, failed; what is neither kind of exhaustion is CUDA_ERROR."""
        self._device_errors[code if code in DEVICE_ERRORS else ErrorCode.CUDA_ERROR].add()

    def auth_failed(self) -> None:
        """A call came without a token that opens its method."""
        self._auth_failures.add()

    def connection_refused(self, reason: str) -> None:
        """A connection was turned away, for one of :data:`REFUSALS`."""
        self._refused[reason].add()

    # -- what is told --------------------------------------------------------------------------------------------

    def exposition(self) -> bytes:
        """Everything, in the text format of :data:`CONTENT_TYPE`."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """The families of the registry: the worker's own, and the names that others scrape once a model is loaded."""
        now = self._source()
        yield from self._of_jobs(now)
        yield from self._of_seal(now)
        yield from self._of_process(now)
        if now.model:
            yield from self._in_words_of_others(now)

    def _of_jobs(self, now: Snapshot) -> Iterator[Metric]:
        requests = [((outcome,), count.value) for outcome, count in self._requests.items()]
        yield _counter("worker_requests", "Jobs that ended or were refused.", requests, ("outcome",))
        yield _counter("worker_tokens_in", "Prompt tokens of admitted jobs.", _one(self._tokens_in.value))
        yield _counter("worker_tokens_generated", "Tokens generated.", _one(self._tokens_out.value))
        yield self._duration.family(
            "worker_inference_duration_ms", "From a job's arrival to its end, if it ended well."
        )
        yield self._first_token.family("worker_time_to_first_token_seconds", "From a job's arrival to its first token.")
        yield self._inter_token.family("worker_inter_token_latency_seconds", "Between two tokens of one job.")
        yield _gauge("worker_jobs_running", "Jobs admitted and not ended.", _one(now.running))
        yield _gauge("worker_jobs_queued", "Jobs that wait for admission.", _one(now.queued))
        yield _gauge("worker_rows_used", "Rows of the decode program that hold a job.", _one(now.rows_used))
        yield _gauge("worker_rows_capacity", "Rows of the decode program.", _one(now.rows_total))
        yield _gauge("worker_kv_pages_used", "KV pages reserved by admitted jobs.", _one(now.kv_pages_used))
        yield _gauge("worker_kv_pages_capacity", "KV pages there are.", _one(now.kv_pages_total))

    def _of_seal(self, now: Snapshot) -> Iterator[Metric]:
        yield _gauge("worker_seal_age_seconds", "Since the last full digest of the weights.", _one(now.seal_age_s))
        bound = "A changed byte of the weights is found within this."
        yield _gauge("worker_detection_bound_seconds", bound, _one(now.detection_bound_s))
        yield self._digest.family("worker_digest_duration_seconds", "One digest of all weights on the device.")
        yield _counter("worker_digest_passes", "Digests of all weights on the device.", _one(self._digests.value))
        lost = _one(now.audit_records_lost)
        yield _counter("worker_audit_records_lost", "Audit records that could not be written.", lost)
        failures = _one(self._auth_failures.value)
        yield _counter("worker_auth_failures", "Calls without a token that opens their method.", failures)
        refused = [((why,), count.value) for why, count in self._refused.items()]
        yield _counter("worker_connections_refused", "Connections that were one too many.", refused, ("reason",))

    def _of_process(self, now: Snapshot) -> Iterator[Metric]:
        yield _gauge("worker_vram_bytes", "Device memory held.", _one(now.vram_bytes))
        errors = [((code.value,), count.value) for code, count in self._device_errors.items()]
        yield _counter("worker_device_errors", "Failures of the device or its memory.", errors, ("code",))
        yield _gauge("worker_gpu_temperature_celsius", "Temperature of the GPU.", _one(now.gpu_temperature_c))
        yield _gauge("worker_gpu_power_watts", "Power the GPU draws.", _one(now.gpu_power_w))
        ecc = "Uncorrected memory errors since the driver was loaded."
        yield _counter("worker_gpu_ecc_errors", ecc, _one(now.gpu_ecc_errors))
        yield _gauge("worker_uptime_seconds", "Since the worker began.", _one(self._clock() - self._began_s))
        states = [((state,), float(state == now.state)) for state in STATES]
        yield _gauge("worker_state", "1 for the state the worker is in.", states, ("state",))
        yield _gauge("worker_build_info", "Always 1.", [(tuple(self._build.values()), 1)], tuple(self._build))

    def _in_words_of_others(self, now: Snapshot) -> Iterator[Metric]:
        """The names of vLLM that dashboards, and gateways that choose among servers, look for."""
        label, model = {"model_name": now.model}, (now.model,)
        usage = now.kv_pages_used / now.kv_pages_total if now.kv_pages_total else 0.0
        finished = [((now.model, reason), count.value) for reason, count in self._finished.items()]

        def gauge(name: str, native: str, value: float) -> Metric:
            return _gauge(f"vllm:{name}", f"As {native}.", [(model, value)], tuple(label))

        def counter(name: str, native: str, count: _Count) -> Metric:
            return _counter(f"vllm:{name}", f"As {native}.", [(model, count.value)], tuple(label))

        yield gauge("num_requests_running", "worker_jobs_running", now.running)
        yield gauge("num_requests_waiting", "worker_jobs_queued", now.queued)
        for name in ("kv_cache_usage_perc", "gpu_cache_usage_perc"):  # the newer and the older name
            yield gauge(name, "worker_kv_pages_used of worker_kv_pages_capacity, from 0 to 1", usage)
        ttft, itl = "As worker_time_to_first_token_seconds.", "As worker_inter_token_latency_seconds."
        yield self._first_token.family("vllm:time_to_first_token_seconds", ttft, labels=label)
        for name in ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"):  # newer, older
            yield self._inter_token.family(name, itl, labels=label)
        e2e = "As worker_inference_duration_ms, in seconds."
        yield self._duration.family("vllm:e2e_request_latency_seconds", e2e, scale=1e-3, labels=label)
        yield counter("prompt_tokens", "worker_tokens_in_total", self._tokens_in)
        yield counter("generation_tokens", "worker_tokens_generated_total", self._tokens_out)
        success = 'As worker_requests_total{outcome="success"}, by reason.'
        yield _counter("vllm:request_success", success, finished, ("model_name", "finished_reason"))


def _one(value: float | None) -> Samples:
    """One series without labels; none when the value is not known."""
    return [] if value is None else [((), value)]


def _gauge(name: str, help_text: str, samples: Samples, labels: tuple[str, ...] = ()) -> Metric:
    gauge = GaugeMetricFamily(name, help_text, labels=labels)
    for values, value in samples:
        gauge.add_metric(values, value)
    return gauge


def _counter(name: str, help_text: str, samples: Samples, labels: tuple[str, ...] = ()) -> Metric:
    """``name`` without the ``_total`` that the text format gives it."""
    counter = CounterMetricFamily(name, help_text, labels=labels)
    for values, value in samples:
        counter.add_metric(values, value)
    return counter
