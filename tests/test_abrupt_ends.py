"""A worker that is killed or stopped in the middle of a stream: what its clients and its next life see."""

from __future__ import annotations

import signal
from pathlib import Path

import grpc
import pytest

from orcd_jax.errors import ExitCode
from orcd_jax.telemetry.audit import verify_audit
from tests.server.peer import error_detail
from tests.tiny_checkpoint import tiny_checkpoint
from tests.worker_process import WAIT_S, Worker

__all__ = ["tiny_checkpoint"]

pytestmark = pytest.mark.slow


@pytest.mark.requirement("WORKER-4963")
@pytest.mark.requirement("WORKER-4162")
def test_a_kill_in_mid_stream_breaks_the_stream_and_nothing_else(tiny_checkpoint: Path, tmp_path: Path) -> None:
    killed = Worker(tiny_checkpoint, tmp_path)
    killed.wait_for("ready")
    call = killed.execute(job_id="a", max_tokens=400)
    next(event for event in call if event.WhichOneof("event") == "token")
    killed.process.kill()
    with pytest.raises(grpc.RpcError) as broken:
        list(call)
    assert broken.value.code() is grpc.StatusCode.UNAVAILABLE
    assert killed.end() == -signal.SIGKILL

    again = Worker(tiny_checkpoint, tmp_path)
    assert again.wait_for("restarts")["restarts"] == 1  # the ledger saw that the last life had no end
    again.wait_for("ready")
    list(again.execute(job_id="a", max_tokens=4))
    assert again.end() == ExitCode.OK
    report = verify_audit(next(again.state.glob("*/audit")))
    assert report.broken is None
    assert report.records > 0


@pytest.mark.requirement("WORKER-4970")
def test_a_sigterm_in_mid_stream_lets_the_job_finish_and_takes_no_other(tiny_checkpoint: Path, tmp_path: Path) -> None:
    worker = Worker(tiny_checkpoint, tmp_path)
    worker.wait_for("ready")
    call = worker.execute(job_id="a", max_tokens=300)
    next(event for event in call if event.WhichOneof("event") == "token")
    worker.process.send_signal(signal.SIGTERM)
    worker.wait_for("drain")
    with pytest.raises(grpc.RpcError) as refused:
        list(worker.execute(job_id="b", max_tokens=4))
    assert error_detail(refused.value).retriable
    events = list(call)
    assert events[-1].WhichOneof("event") == "end"
    assert events[-1].end.tokens_out == 300
    assert worker.process.wait(WAIT_S) == ExitCode.OK
    worker.end()


@pytest.mark.requirement("WORKER-4962")
def test_too_many_abnormal_ends_keep_it_from_starting(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for _ in range(2):
        killed = Worker(tiny_checkpoint, tmp_path, "--max_restarts=2", "--await_commit")
        killed.wait_for("startup")
        killed.process.kill()
        killed.end()
    refused = Worker(tiny_checkpoint, tmp_path, "--max_restarts=2", "--await_commit")
    assert refused.process.wait(WAIT_S) == ExitCode.RESTARTS
    assert "max_restarts" in refused.wait_for("error")["human"]
    refused.end()


@pytest.mark.requirement("WORKER-4970")
def test_a_sigterm_before_anything_is_there_is_a_clean_end_too(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The first line of the log comes later than this: the libraries take seconds to import."""
    early = Worker(tiny_checkpoint, tmp_path, "--await_commit")
    while not (early.state.is_dir() and list(early.state.glob("*/restarts.json"))):
        assert early.process.poll() is None
    assert early.end() == ExitCode.OK
