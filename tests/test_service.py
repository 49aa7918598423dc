"""A worker as its users meet it: a process of its own, and the official gRPC client."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from orcd_jax.errors import ExitCode
from tests.server.peer import as_json, bearer, enum_name, error_detail, message
from tests.tiny_checkpoint import tiny_checkpoint
from tests.worker_process import TOKEN, Worker

__all__ = ["tiny_checkpoint"]

pytestmark = pytest.mark.slow  # each process takes five seconds to start


@pytest.fixture(scope="module")
def worker(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    started = Worker(tiny_checkpoint, tmp_path_factory.mktemp("worker"), "--slots_total=2")
    started.wait_for("ready")
    yield started
    started.end()


def ids_of(events: list[Any]) -> list[int]:
    return [i for event in events if event.WhichOneof("event") == "token" for i in event.token.token_ids]


def kinds_of(events: list[Any]) -> list[str]:
    return [event.WhichOneof("event") for event in events]


@pytest.mark.requirement("WORKER-4240")
@pytest.mark.requirement("WORKER-4996")
def test_the_official_client_streams_a_job(worker: Worker) -> None:
    events = list(worker.execute(job_id="a", max_tokens=12))
    kinds = [kind for kind in kinds_of(events) if kind != "metrics"]
    assert kinds[0] == "started"
    assert kinds[-1] == "end"
    assert set(kinds[1:-1]) == {"token"}
    end = events[-1].end
    assert enum_name(end, "finish_reason") == "FINISH_REASON_LENGTH"
    assert end.tokens_out == len(ids_of(events)) == 12
    indices = [event.token.index for event in events if event.WhichOneof("event") == "token"]
    assert indices[0] == 0
    assert indices == sorted(indices)


@pytest.mark.requirement("WORKER-4710")
def test_one_seed_gives_the_same_tokens_and_another_seed_others(worker: Worker) -> None:
    def sampled(seed: int) -> list[int]:
        return ids_of(list(worker.execute(job_id="b", max_tokens=24, temperature=1.2, seed=seed)))

    assert sampled(11) == sampled(11)
    assert sampled(11) != sampled(12)


@pytest.mark.requirement("WORKER-4254")
def test_a_cancel_mid_stream_ends_the_job_and_nothing_follows(worker: Worker) -> None:
    call = worker.execute(job_id="c", max_tokens=400)
    events = []
    for event in call:
        events.append(event)
        if event.WhichOneof("event") == "token":
            break
    worker.peer.unary("Cancel", cancel_request("c"), metadata=bearer(TOKEN))
    with pytest.raises(grpc.RpcError) as caught:
        events.extend(call)
    assert caught.value.code() is grpc.StatusCode.CANCELLED
    assert kinds_of(events)[-1] == "error"
    assert len(ids_of(events)) < 400


@pytest.mark.requirement("WORKER-4254")
def test_a_client_that_cancels_its_call_frees_the_slot(worker: Worker) -> None:
    calls = [worker.execute(job_id=f"d{n}", max_tokens=490) for n in range(2)]
    for call in calls:
        next(call)
    full = worker.execute(job_id="d")
    with pytest.raises(grpc.RpcError) as caught:
        list(full)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error_detail(caught.value).retry_after_ms > 0
    for call in calls:
        call.cancel()
    status = worker.control("GetStatus")
    while status.slots_used:  # the server sees the reset when it reads the connection: the next answers say so
        status = worker.control("GetStatus")
    assert kinds_of(list(worker.execute(job_id="d", max_tokens=2)))[-1] == "end"


@pytest.mark.requirement("WORKER-4200")
def test_without_the_token_nothing_is_answered(worker: Worker) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(worker.peer.execute(metadata=bearer("x" * 64)))
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_the_command_line_client_streams_and_reports(worker: Worker) -> None:
    told = worker.orcd("execute", "--json", "--max_tokens=6", "--ignore_eos", "in the")
    events = [json.loads(line) for line in told.stdout.splitlines()]
    assert told.returncode == ExitCode.OK
    told_ids = [i for event in events if event["event"] == "token" for i in event["ids"]]
    assert told_ids == ids_of(list(worker.execute(job_id="e", max_tokens=6)))
    ready = json.loads(worker.orcd("ready", "--json").stdout)
    assert ready["ready"] is True
    assert ready["digest"] == as_json(worker.control("GetStatus"))["digest"]


@pytest.mark.requirement("WORKER-4257")
@pytest.mark.requirement("WORKER-4970")
def test_health_follows_the_life_of_the_worker_and_a_stop_is_clean(tiny_checkpoint: Path, tmp_path: Path) -> None:
    started = Worker(tiny_checkpoint, tmp_path)
    started.wait_for("startup")
    with started.watch("orcd.worker.v1.Worker") as watch:
        assert watch.stdout is not None
        assert watch.stdout.readline() == "NOT_SERVING\n"
        started.wait_for("ready")
        assert watch.stdout.readline() == "SERVING\n"
        call = started.execute(job_id="a", max_tokens=200)
        next(call)
        started.process.send_signal(signal.SIGTERM)
        assert watch.stdout.readline() == "NOT_SERVING\n"
        assert kinds_of(list(call))[-1] == "end"  # it may finish while the worker drains
        assert started.wait_for("shutdown")["exit_code"] == 0
        watch.terminate()
    assert started.end() == ExitCode.OK


def test_the_shutdown_call_ends_the_process_in_good_order(tiny_checkpoint: Path, tmp_path: Path) -> None:
    started = Worker(tiny_checkpoint, tmp_path)
    started.wait_for("ready")
    started.control("Shutdown")
    assert started.wait_for("shutdown")["exit_code"] == 0
    assert started.end() == ExitCode.OK


@pytest.mark.requirement("WORKER-4999")
def test_a_restarted_worker_gives_the_same_tokens(worker: Worker, tiny_checkpoint: Path, tmp_path: Path) -> None:
    fields = {"max_tokens": 24, "temperature": 0.9, "top_p": 0.95, "seed": 2**63 + 5}
    before = ids_of(list(worker.execute(job_id="f", **fields)))
    again = Worker(tiny_checkpoint, tmp_path, "--slots_total=2")
    again.wait_for("ready")
    assert ids_of(list(again.execute(job_id="f", **fields))) == before
    again.end()


@pytest.mark.requirement("WORKER-4910")
@pytest.mark.requirement("WORKER-4803")
def test_the_token_is_in_no_line_of_the_log(tiny_checkpoint: Path, tmp_path: Path) -> None:
    started = Worker(tiny_checkpoint, tmp_path)
    started.wait_for("ready")
    secret = "unmistakable marked prompt"
    answer = "".join(
        event.token.text
        for event in started.execute(job_id="a", prompt_text=secret, max_tokens=40)
        if event.WhichOneof("event") == "token"
    )
    started.end()
    log = "".join(started.lines)
    assert "execute_end" in log
    assert TOKEN not in log
    assert secret not in log
    assert answer[:12] not in log


def cancel_request(job_id: str) -> Any:
    return message("CancelRequest", job_id=job_id)
