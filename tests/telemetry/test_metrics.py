"""Metrics: the names that dashboards rely on, and what each of them counts."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from orcd_jax.engine.request import FinishReason
from orcd_jax.errors import ErrorCode
from orcd_jax.telemetry import metrics as module
from orcd_jax.telemetry.metrics import (
    DEVICE_ERRORS,
    FINISHED_REASON,
    OUTCOMES,
    REFUSALS,
    STATES,
    Snapshot,
    WorkerMetrics,
)
from orcd_jax.worker.lifecycle import State

WAIT_S = 10.0
DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"

# Name, type, labels in alphabetical order. A public contract: names are added, never changed.
NAMES: dict[str, tuple[str, tuple[str, ...]]] = {
    "worker_requests_total": ("counter", ("outcome",)),
    "worker_tokens_in_total": ("counter", ()),
    "worker_tokens_generated_total": ("counter", ()),
    "worker_inference_duration_ms": ("histogram", ()),
    "worker_time_to_first_token_seconds": ("histogram", ()),
    "worker_inter_token_latency_seconds": ("histogram", ()),
    "worker_jobs_running": ("gauge", ()),
    "worker_jobs_queued": ("gauge", ()),
    "worker_rows_used": ("gauge", ()),
    "worker_rows_capacity": ("gauge", ()),
    "worker_kv_pages_used": ("gauge", ()),
    "worker_kv_pages_capacity": ("gauge", ()),
    "worker_seal_age_seconds": ("gauge", ()),
    "worker_detection_bound_seconds": ("gauge", ()),
    "worker_digest_duration_seconds": ("histogram", ()),
    "worker_digest_passes_total": ("counter", ()),
    "worker_audit_records_lost_total": ("counter", ()),
    "worker_auth_failures_total": ("counter", ()),
    "worker_connections_refused_total": ("counter", ("reason",)),
    "worker_vram_bytes": ("gauge", ()),
    "worker_device_errors_total": ("counter", ("code",)),
    "worker_gpu_temperature_celsius": ("gauge", ()),
    "worker_gpu_power_watts": ("gauge", ()),
    "worker_gpu_ecc_errors_total": ("counter", ()),
    "worker_uptime_seconds": ("gauge", ()),
    "worker_state": ("gauge", ("state",)),
    "worker_build_info": ("gauge", ("jax", "platform", "python", "version")),
    "vllm:num_requests_running": ("gauge", ("model_name",)),
    "vllm:num_requests_waiting": ("gauge", ("model_name",)),
    "vllm:kv_cache_usage_perc": ("gauge", ("model_name",)),
    "vllm:gpu_cache_usage_perc": ("gauge", ("model_name",)),
    "vllm:time_to_first_token_seconds": ("histogram", ("model_name",)),
    "vllm:inter_token_latency_seconds": ("histogram", ("model_name",)),
    "vllm:time_per_output_token_seconds": ("histogram", ("model_name",)),
    "vllm:e2e_request_latency_seconds": ("histogram", ("model_name",)),
    "vllm:prompt_tokens_total": ("counter", ("model_name",)),
    "vllm:generation_tokens_total": ("counter", ("model_name",)),
    "vllm:request_success_total": ("counter", ("finished_reason", "model_name")),
}

FULL = Snapshot(
    state="EXECUTING",
    model="tiny",
    vram_bytes=16_000_000_000,
    running=3,
    queued=1,
    rows_used=5,
    rows_total=64,
    kv_pages_used=30,
    kv_pages_total=120,
    seal_age_s=1.5,
    detection_bound_s=5.25,
    audit_records_lost=2,
    gpu_temperature_c=61,
    gpu_power_w=412.5,
    gpu_ecc_errors=7,
)


def of(snapshot: Snapshot, clock_s: list[float] | None = None) -> WorkerMetrics:
    ticks = clock_s or [0.0]
    metrics = WorkerMetrics(platform="cpu", clock=lambda: ticks[-1])
    metrics.set_gauges(lambda: snapshot)
    return metrics


def told(metrics: WorkerMetrics) -> dict[str, float]:
    """Series as text, such as ``worker_state{state="READY"}``, to value, by Prometheus' own parser."""
    series = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            series[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return series


def families(metrics: WorkerMetrics) -> dict[str, tuple[str, tuple[str, ...]]]:
    found = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {tuple(sorted(set(sample.labels) - {"le"})) for sample in family.samples}
        assert len(labels) == 1, f"{name} has no series, or series of different labels"
        found[name] = (family.type, labels.pop())
    return found


@pytest.mark.requirement("WORKER-4810")
@pytest.mark.requirement("WORKER-4811")
@pytest.mark.requirement("WORKER-4812")
def test_the_names_types_and_labels_are_these() -> None:
    assert families(of(FULL)) == NAMES


@pytest.mark.requirement("WORKER-4810")
def test_the_document_lists_the_same() -> None:
    rows = re.findall(
        r"^\| `([^`]+)` \| (counter|gauge|histogram) \| ([^|]*)\|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE
    )
    listed = {name: (kind, tuple(sorted(re.findall(r"`(\w+)`", labels)))) for name, kind, labels in rows}
    assert listed == NAMES
    assert len(rows) == len(NAMES)


@pytest.mark.requirement("WORKER-4811")
def test_every_series_is_there_from_the_start_and_no_label_takes_a_callers_value() -> None:
    metrics = of(FULL)
    before = set(told(metrics))
    for number in range(50):
        metrics.job_started(number)
        metrics.first_tokens(1, 0.01 * number)
        metrics.tokens(2, 0.01 * number)
        metrics.job_succeeded(duration_s=0.1 * number, finish_reason=f"reason {number}")
        metrics.job_failed(list(ErrorCode)[number % len(ErrorCode)])
        metrics.device_error(list(ErrorCode)[number % len(ErrorCode)])
    assert set(told(metrics)) == before


def test_the_states_are_the_lifecycles_and_exactly_one_is_on() -> None:
    assert set(STATES) == {state.value for state in State}
    series = told(of(FULL))
    on = {name: value for name, value in series.items() if name.startswith("worker_state") and value}
    assert on == {'worker_state{state="EXECUTING"}': 1}
    assert sum(name.startswith("worker_state") for name in series) == len(State)


def test_gauges_tell_the_snapshot() -> None:
    series = told(of(FULL))
    assert {
        "worker_vram_bytes": 16_000_000_000,
        "worker_jobs_running": 3,
        "worker_jobs_queued": 1,
        "worker_rows_used": 5,
        "worker_rows_capacity": 64,
        "worker_kv_pages_used": 30,
        "worker_kv_pages_capacity": 120,
        "worker_seal_age_seconds": 1.5,
        "worker_detection_bound_seconds": 5.25,
        "worker_audit_records_lost_total": 2,
        "worker_gpu_temperature_celsius": 61,
        "worker_gpu_power_watts": 412.5,
        "worker_gpu_ecc_errors_total": 7,
        'vllm:num_requests_running{model_name="tiny"}': 3,
        'vllm:num_requests_waiting{model_name="tiny"}': 1,
        'vllm:kv_cache_usage_perc{model_name="tiny"}': 0.25,
        'vllm:gpu_cache_usage_perc{model_name="tiny"}': 0.25,
    }.items() <= series.items()


def test_what_is_not_known_has_no_series() -> None:
    series = told(of(Snapshot(state="READY", model="tiny")))
    unknown = ("seal_age", "detection_bound", "gpu_temperature", "gpu_power", "gpu_ecc")
    assert not [name for name in series if any(part in name for part in unknown)]
    assert series['vllm:kv_cache_usage_perc{model_name="tiny"}'] == 0  # no pages at all


def test_the_names_of_others_appear_when_a_model_is_loaded() -> None:
    assert not [name for name in told(of(Snapshot())) if name.startswith("vllm:")]


def test_uptime_is_since_the_beginning() -> None:
    clock_s = [100.0]
    metrics = of(FULL, clock_s)
    clock_s.append(160.5)
    assert told(metrics)["worker_uptime_seconds"] == 60.5


@pytest.mark.requirement("WORKER-4810")
@pytest.mark.parametrize("code", ErrorCode)
def test_a_job_that_fails_is_counted_once_under_its_outcome(code: ErrorCode) -> None:
    metrics = of(FULL)
    metrics.job_failed(code)
    outcome = {"CANCELLED": "cancelled", "TIMEOUT": "timeout"}.get(code.value, "error")
    series = told(metrics)
    counted = {name: series[f'worker_requests_total{{outcome="{name}"}}'] for name in OUTCOMES}
    assert counted == {name: float(name == outcome) for name in OUTCOMES}
    assert series["worker_inference_duration_ms_count"] == 0


@pytest.mark.requirement("WORKER-4810")
def test_a_job_that_ends_well_is_counted_with_its_tokens_and_times() -> None:
    metrics = of(FULL)
    metrics.job_started(12)
    metrics.first_tokens(1, 0.07)
    metrics.tokens(4, 0.02)
    metrics.job_succeeded(duration_s=2.5, finish_reason="eos")
    series = told(metrics)
    assert {
        'worker_requests_total{outcome="success"}': 1,
        "worker_tokens_in_total": 12,
        "worker_tokens_generated_total": 5,
        "worker_inference_duration_ms_count": 1,
        "worker_inference_duration_ms_sum": 2500,
        'worker_inference_duration_ms_bucket{le="1000.0"}': 0,
        'worker_inference_duration_ms_bucket{le="2500.0"}': 1,  # a bound belongs to its bucket
        'worker_inference_duration_ms_bucket{le="+Inf"}': 1,
        "worker_time_to_first_token_seconds_count": 1,
        "worker_time_to_first_token_seconds_sum": 0.07,
        'worker_time_to_first_token_seconds_bucket{le="0.06"}': 0,
        'worker_time_to_first_token_seconds_bucket{le="0.08"}': 1,
        "worker_inter_token_latency_seconds_count": 4,  # 5 ms each
        "worker_inter_token_latency_seconds_sum": 0.02,
        'worker_inter_token_latency_seconds_bucket{le="0.004"}': 0,
        'worker_inter_token_latency_seconds_bucket{le="0.005"}': 4,
    }.items() <= series.items()


def test_the_names_of_others_tell_the_same_numbers() -> None:
    metrics = of(FULL)
    metrics.job_started(12)
    metrics.first_tokens(1, 0.07)
    metrics.tokens(4, 0.02)
    metrics.job_succeeded(duration_s=2.5, finish_reason="length")
    series = told(metrics)
    same = {
        "vllm:time_to_first_token_seconds": "worker_time_to_first_token_seconds",
        "vllm:inter_token_latency_seconds": "worker_inter_token_latency_seconds",
        "vllm:time_per_output_token_seconds": "worker_inter_token_latency_seconds",
    }
    for theirs, ours in same.items():
        for suffix in ("_count", "_sum"):
            assert series[f'{theirs}{suffix}{{model_name="tiny"}}'] == series[ours + suffix] != 0
    assert {
        'vllm:prompt_tokens_total{model_name="tiny"}': 12,
        'vllm:generation_tokens_total{model_name="tiny"}': 5,
        'vllm:e2e_request_latency_seconds_sum{model_name="tiny"}': 2.5,
        'vllm:e2e_request_latency_seconds_bucket{le="1.0",model_name="tiny"}': 0,
        'vllm:e2e_request_latency_seconds_bucket{le="2.5",model_name="tiny"}': 1,
        'vllm:request_success_total{finished_reason="length",model_name="tiny"}': 1,
        'vllm:request_success_total{finished_reason="stop",model_name="tiny"}': 0,
    }.items() <= series.items()


def test_every_reason_to_finish_has_a_word_of_others() -> None:
    assert set(FINISHED_REASON) == {reason.value for reason in FinishReason}


def test_digests_device_errors_and_refused_callers_are_counted() -> None:
    metrics = of(FULL)
    metrics.digest_pass(0.025)
    metrics.device_error(ErrorCode.VRAM_OOM)
    metrics.device_error(ErrorCode.INTERNAL)  # not a kind of exhaustion
    metrics.auth_failed()
    for reason in ("peer", "full", "peer"):
        metrics.connection_refused(reason)
    series = told(metrics)
    assert series["worker_digest_passes_total"] == series["worker_digest_duration_seconds_count"] == 1
    assert series["worker_digest_duration_seconds_sum"] == 0.025
    counted = {code.value: series[f'worker_device_errors_total{{code="{code}"}}'] for code in DEVICE_ERRORS}
    assert counted == {"CUDA_ERROR": 1, "HOST_OOM": 0, "VRAM_OOM": 1}
    assert series["worker_auth_failures_total"] == 1
    refused = {reason: series[f'worker_connections_refused_total{{reason="{reason}"}}'] for reason in ("full", "peer")}
    assert refused == {"full": 1, "peer": 2}


def test_no_tokens_are_no_event() -> None:
    metrics = of(FULL)
    metrics.tokens(0, 0.02)
    assert told(metrics)["worker_inter_token_latency_seconds_count"] == 0


def test_a_scrape_asks_its_source_once() -> None:
    asked: list[int] = []
    metrics = WorkerMetrics(platform="cpu")

    def source() -> Snapshot:
        asked.append(1)
        return FULL

    metrics.set_gauges(source)
    metrics.exposition()
    assert asked == [1]


def test_a_scrape_waits_for_no_writer() -> None:
    metrics = of(FULL)
    locks = [
        value._lock
        for held in vars(metrics).values()
        for value in (held.values() if isinstance(held, dict) else [held])
        if isinstance(value, module._Count | module._Distribution)
    ]
    assert len(locks) == len(OUTCOMES) + 2 + len(DEVICE_ERRORS) + len(REFUSALS) + 8
    for lock in locks:
        lock.acquire()  # as if every writer were in the middle of its work
    scrape = threading.Thread(target=metrics.exposition, daemon=True)
    scrape.start()
    scrape.join(WAIT_S)
    assert not scrape.is_alive()


def test_nothing_is_lost_between_threads() -> None:
    metrics = of(FULL)
    start = threading.Barrier(5)

    def work() -> None:
        start.wait(WAIT_S)
        for _ in range(2000):
            metrics.tokens(1, 0.004)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    start.wait(WAIT_S)
    for _ in range(20):  # while they write, buckets stay cumulative
        counts = [
            value for name, value in told(metrics).items() if name.startswith("worker_inter_token_latency_seconds_b")
        ]
        assert counts == sorted(counts)
    for thread in threads:
        thread.join(WAIT_S)
    series = told(metrics)
    assert series["worker_tokens_generated_total"] == series["worker_inter_token_latency_seconds_count"] == 8000


def test_two_workers_in_one_process_do_not_meet() -> None:
    first, second = of(FULL), of(FULL)
    first.job_started(1)
    assert told(second)["worker_tokens_in_total"] == 0
