"""Plan → Commit → Ready → Attest → Execute, as a pool manager meets it: a process, and the official gRPC client."""

from __future__ import annotations

import json
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from orcd_jax.checkpoint.manifest import read_manifest
from orcd_jax.errors import ExitCode
from orcd_jax.residency.attestation import Attestation, AttestedHandle, verify_attestation
from orcd_jax.telemetry.audit import verify_audit
from tests.conftest import PLATFORM
from tests.server.peer import as_json, bearer, enum_name, error_detail, message
from tests.tiny_checkpoint import tiny_checkpoint
from tests.worker_process import CONTROL_TOKEN, TOKEN, WAIT_S, Worker

__all__ = ["tiny_checkpoint"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def worker(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """One that awaits its Commit at first; the tests of this file run in order and share its life."""
    started = Worker(tiny_checkpoint, tmp_path_factory.mktemp("sealed"), "--slots_total=2", "--await_commit")
    started.wait_for("startup")
    yield started
    started.end()


def commit(worker: Worker, **fields: Any) -> list[Any]:
    request = message("CommitRequest", **fields)
    return list(worker.peer.stream("Commit", request, metadata=bearer(CONTROL_TOKEN), timeout=WAIT_S))


def digest_of(checkpoint: Path) -> str:
    return read_manifest(checkpoint).digest


@pytest.mark.requirement("WORKER-4210")
def test_plan_tells_what_it_takes_before_anything_is_loaded(worker: Worker) -> None:
    answer = worker.orcd("plan", "--json")
    assert answer.returncode == 0, answer.stderr
    plan = json.loads(answer.stdout)
    assert plan["feasible"] is True
    need = plan["vram_required"]
    parts = ("weights_bytes", "kv_bytes", "workspace_bytes", "headroom_bytes", "reserve_bytes")
    assert sum(need[part] for part in parts) == need["total_bytes"] <= plan["vram_available_bytes"]
    assert as_json(worker.control("GetStatus"))["digest"] == ""


@pytest.mark.requirement("WORKER-4211")
def test_plan_names_every_reason_why_not(worker: Worker) -> None:
    request = message("PlanRequest", shard_layout=2, tp_degree=2, max_context=10**6)
    answer = worker.control("Plan", request)
    assert not answer.feasible
    assert {enum_name(reason, "code") for reason in answer.reasons} == {
        "ERROR_CODE_CAPABILITY_MISMATCH",
        "ERROR_CODE_INVALID_PARAMS",
    }


@pytest.mark.requirement("WORKER-4230")
@pytest.mark.requirement("WORKER-4231")
def test_before_a_commit_nothing_is_ready_and_jobs_are_refused(worker: Worker) -> None:
    ready = worker.ask("Ready")
    assert not ready.ready
    assert len(ready.identity_public_key) == 32
    with pytest.raises(grpc.RpcError) as refused:
        list(worker.execute(job_id="a", max_tokens=2))
    assert error_detail(refused.value).retriable


@pytest.mark.requirement("WORKER-4220")
@pytest.mark.requirement("WORKER-4225")
def test_a_commit_of_weights_that_are_not_those_expected_loads_nothing(worker: Worker) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        commit(worker, expected_digest="0" * 64)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert error_detail(refused.value).field == "expected_digest"
    assert enum_name(worker.ask("Ready"), "state") == "WORKER_STATE_STARTING"


@pytest.mark.requirement("WORKER-4320")
@pytest.mark.parametrize("model_ref", ["file:/etc", "../../etc", "file:/etc/passwd"])
def test_a_model_outside_of_the_roots_is_refused_without_its_path(worker: Worker, model_ref: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        commit(worker, model_ref=model_ref)
    assert "/etc" not in error_detail(refused.value).message


@pytest.mark.requirement("WORKER-4221")
@pytest.mark.requirement("WORKER-4031")
@pytest.mark.requirement("WORKER-4224")
def test_a_commit_streams_progress_and_ends_with_a_sealed_handle(worker: Worker, tiny_checkpoint: Path) -> None:
    events = commit(worker, expected_digest=digest_of(tiny_checkpoint), shard_id="shard-7")
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[-1] == "committed"
    assert set(kinds[:-1]) == {"progress"}
    handle = events[-1].committed
    assert handle.sealed
    assert handle.pinned
    assert handle.shard_id == "shard-7"
    assert handle.digest == digest_of(tiny_checkpoint)
    assert handle.emulated is (PLATFORM == "cpu")
    assert worker.ask("Ready").ready


@pytest.mark.requirement("WORKER-4222")
def test_the_same_commit_again_gives_the_same_handle_at_once(worker: Worker, tiny_checkpoint: Path) -> None:
    (handle,) = worker.ask("Ready").handles
    again = commit(worker, expected_digest=digest_of(tiny_checkpoint), shard_id="shard-7")
    assert [event.WhichOneof("event") for event in again] == ["committed"]
    assert again[0].committed == handle


@pytest.mark.requirement("WORKER-4022")
def test_another_model_is_refused_for_the_life_of_the_process(worker: Worker) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        commit(worker, expected_digest="1" * 64)
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert worker.ask("Ready").ready


@pytest.mark.requirement("WORKER-4255")
@pytest.mark.requirement("WORKER-4001")
def test_an_attestation_can_be_checked_by_whoever_asked(worker: Worker, tiny_checkpoint: Path) -> None:
    nonce = bytes(range(32))
    answer = worker.control("Attest", message("AttestRequest", nonce=nonce))
    status = worker.control("GetStatus")
    statement = Attestation(
        handle=AttestedHandle.of(answer.handle),
        worker_id=status.worker_id,
        pool_id=status.pool_id,
        digest=answer.digest,
        digest_began_at_ms=answer.digest_began_at_ms,
        digest_ended_at_ms=answer.digest_ended_at_ms,
        nonce=answer.nonce,
        executable_fingerprint=answer.executable_fingerprint,
    )
    key = worker.ask("Ready").identity_public_key
    verify_attestation(
        key,
        statement,
        answer.signature,
        nonce=nonce,
        now_ms=answer.digest_ended_at_ms,
        expected_digest=digest_of(tiny_checkpoint),
    )
    assert len(bytes.fromhex(answer.executable_fingerprint)) == 32


@pytest.mark.requirement("WORKER-4255")
@pytest.mark.parametrize("length", [0, 15, 65])
def test_a_nonce_of_another_length_is_refused(worker: Worker, length: int) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        worker.control("Attest", message("AttestRequest", nonce=bytes(length)))
    assert error_detail(refused.value).field == "nonce"


@pytest.mark.requirement("WORKER-4200")
@pytest.mark.parametrize("method", ["Plan", "Attest", "GetStatus", "Drain", "Shutdown"])
def test_an_execute_token_opens_no_control_method(worker: Worker, method: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        worker.ask(method)
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_ten_seconds_as_a_person(worker: Worker, tiny_checkpoint: Path) -> None:
    for command in (
        ("plan",),
        ("commit", f"--expected_digest={digest_of(tiny_checkpoint)}"),
        ("ready", "--wait=5"),
        ("attest", f"--expected_digest={digest_of(tiny_checkpoint)}"),
        ("status",),
        ("execute", "--max_tokens=4", "--ignore_eos", "in the"),
    ):
        done = worker.orcd(*command)
        assert done.returncode == 0, (command, done.stderr)
        assert done.stdout.strip()
    attested = worker.orcd("attest", f"--identity={'0' * 64}")
    assert attested.returncode == ExitCode.FAILED
    assert "does not hold" in attested.stderr


@pytest.mark.requirement("WORKER-4810")
def test_metrics_and_health_are_on_a_loopback_port_of_their_own(worker: Worker) -> None:
    port = worker.control("GetStatus").metrics_port

    def get(path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=WAIT_S) as answer:
            return str(answer.read().decode())

    list(worker.execute(job_id="m", max_tokens=5))
    text = get("/metrics")
    for name in ("worker_requests_total", "worker_tokens_generated_total", "worker_seal_age_seconds"):
        assert name in text
    assert "job_id" not in text
    assert get("/readyz")
    assert json.loads(get("/healthz"))["state"] in ("READY", "EXECUTING")


@pytest.mark.requirement("WORKER-4201")
def test_tokens_rotate_without_a_restart(worker: Worker) -> None:
    fresh = "a" * 64
    worker.token_file.write_text(f"{fresh}\n{TOKEN}\n")
    worker.process.send_signal(signal.SIGHUP)
    worker.wait_for("auth")
    assert worker.peer.unary("Ready", metadata=bearer(fresh)).ready
    assert worker.ask("Ready").ready
    worker.token_file.write_text("short")
    worker.process.send_signal(signal.SIGHUP)
    assert "old tokens stay" in worker.wait_for("auth")["human"]
    assert worker.ask("Ready").ready


@pytest.mark.requirement("WORKER-4160")
def test_the_audit_of_this_life_is_whole_and_says_what_happened(worker: Worker) -> None:
    """Runs last: it ends the worker."""
    head = worker.control("GetStatus")
    assert worker.end() == ExitCode.OK
    folder = next(worker.state.glob("*/audit"))
    report = verify_audit(folder)
    assert report.broken is None
    assert report.head.seq >= head.audit_seq > 0
    text = "".join(path.read_text() for path in folder.glob("*.jsonl"))
    happened = {json.loads(line)["event"] for line in text.splitlines()}
    assert happened >= {
        "worker_started",
        "load_started",
        "load_failed",
        "load_verified",
        "load_completed",
        "memory_allocated",
        "sealed",
        "auth_succeeded",
        "auth_failed",
        "tokens_rotated",
        "memory_released",
        "worker_stopped",
    }
    log = "".join(worker.lines)
    for secret in (TOKEN, CONTROL_TOKEN, "a" * 64):
        assert secret not in text
        assert secret not in log
