"""What a worker does when its device fails, hangs, or has no memory left."""

from __future__ import annotations

import jax
import pytest

from orcd_jax.engine.request import Ended, Failed
from orcd_jax.errors import ErrorCode
from orcd_jax.worker import worker as worker_module
from orcd_jax.worker.lifecycle import State
from tests.worker.running import (
    SLOTS,
    WAIT_S,
    BrokenDecode,
    LongJob,
    Running,
    events_of,
    job,
    long_job,
    refusal,
)


@pytest.mark.requirement("WORKER-4032")
@pytest.mark.requirement("WORKER-4960")
def test_a_device_error_fails_every_live_job_stops_the_worker_and_says_why(
    fresh: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = BrokenDecode(fresh, monkeypatch, jax.errors.JaxRuntimeError("INTERNAL: an illegal address at 0xdeadbeef"))
    held = [LongJob(fresh, long_job(f"a{n}")) for n in range(SLOTS)]
    broken.failing.set()
    error = fresh.run(fresh.worker.wait_failed())
    assert error.code is ErrorCode.CUDA_ERROR
    assert "deadbeef" not in error.message
    for one in held:
        ended = one.end()
        assert isinstance(ended, Failed)
        assert ended.error.code is ErrorCode.CUDA_ERROR
    assert fresh.worker.lifecycle.state is State.STOPPED
    assert refusal(fresh, job("b")).code is ErrorCode.NOT_READY


@pytest.mark.requirement("WORKER-4401")
def test_running_out_of_memory_fails_the_jobs_and_the_next_one_succeeds(
    fresh: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = BrokenDecode(fresh, monkeypatch, jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"))
    held = LongJob(fresh, long_job("a"))
    broken.failing.set()
    ended = held.end()
    assert isinstance(ended, Failed)
    assert ended.error.code is ErrorCode.VRAM_OOM
    broken.failing.clear()
    assert isinstance(fresh.run(events_of(fresh.worker, job("b")))[-1], Ended)
    assert fresh.worker.lifecycle.state is State.READY


@pytest.mark.requirement("WORKER-4970")
def test_a_device_that_hangs_is_no_clean_stop_and_its_jobs_are_told(
    fresh: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "STOP_TIMEOUT_S", 0.2)
    broken = BrokenDecode(fresh, monkeypatch)
    held = LongJob(fresh, long_job("a"))
    broken.failing.set()
    stopped = fresh.begin(fresh.worker.stop())
    ended = held.end()
    assert isinstance(ended, Failed)
    assert ended.error.code is ErrorCode.CUDA_ERROR
    assert stopped.result(WAIT_S) is False
    broken.answer.set()
