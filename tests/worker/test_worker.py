"""The life of a worker: load, serve, drain, stop."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from orcd_jax.engine.request import Ended, Failed
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.residency.bounds import Sizes
from orcd_jax.worker.lifecycle import State
from orcd_jax.worker.planner import engine_shape
from tests.conftest import PLATFORM
from tests.worker.running import (
    WAIT_S,
    HeldLoad,
    LongJob,
    Running,
    config_of,
    job,
    long_job,
    refusal,
)

# -- the life of a worker ----------------------------------------------------------------------------------------------


def test_a_worker_that_has_not_loaded_takes_no_job_and_says_when_to_retry(tiny_checkpoint: Path) -> None:
    idle = Running(config_of(tiny_checkpoint))
    error = refusal(idle, job("a"))
    assert error.code is ErrorCode.NOT_READY
    assert error.retry_after_ms
    assert not idle.worker.ready().ready
    assert idle.worker.status().status == "starting"
    idle.close()


@pytest.mark.requirement("WORKER-4110")
def test_vram_is_claimed_on_a_gpu_and_only_there(running: Running) -> None:
    (handle,) = running.worker.ready().handles
    status, emulated = running.worker.status(), PLATFORM == "cpu"
    assert handle.emulated is status.emulated is emulated
    assert status.resident is not emulated
    for claimed in (handle.vram_bytes, status.vram_used_bytes, running.worker.ready().capabilities.vram_bytes):
        assert (claimed == 0) is emulated


def test_a_handle_says_what_was_proved_and_not_more(running: Running) -> None:
    (handle,) = running.worker.ready().handles
    assert len(handle.digest) == 64
    assert (handle.sealed, handle.pinned, handle.total_shards) == (True, False, 1)


@pytest.mark.requirement("WORKER-4970")
def test_a_drain_refuses_new_jobs_and_lets_running_ones_finish(tiny_checkpoint: Path) -> None:
    draining = Running(config_of(tiny_checkpoint))
    draining.run(draining.worker.start())
    held = LongJob(draining, long_job("a", max_tokens=60))
    draining.run(draining.worker.drain(0.0))  # somebody was impatient; who asks next waits all the same
    drained = draining.begin(draining.worker.drain(WAIT_S))
    draining.run(asyncio.sleep(0))
    assert refusal(draining, job("b")).code is ErrorCode.NOT_READY
    assert not drained.done()
    assert isinstance(held.end(), Ended)
    drained.result(WAIT_S)
    draining.close()
    assert draining.states[-2:] == [State.DRAINING, State.STOPPED]


def test_stopping_ends_what_still_runs(tiny_checkpoint: Path) -> None:
    stopping = Running(config_of(tiny_checkpoint))
    stopping.run(stopping.worker.start())
    held = LongJob(stopping, long_job("a"))
    stopping.run(stopping.worker.drain(0.0))
    stopping.run(stopping.worker.stop())
    ended = held.end()
    assert isinstance(ended, Failed)
    assert ended.error.code is ErrorCode.CANCELLED
    stopping.close()


@pytest.mark.requirement("WORKER-4030")
def test_a_model_that_does_not_load_stops_the_worker(tiny_checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    (broken / "tokenizer.json").unlink()
    failing = Running(config_of(broken))
    with pytest.raises(OrcdError, match=r"tokenizer\.json is missing"):
        failing.run(failing.worker.start())
    assert failing.worker.lifecycle.state is State.STOPPED
    assert failing.worker.status().status == "failed"
    failing.close()


@pytest.mark.requirement("WORKER-4031")
def test_a_worker_that_is_stopped_while_it_loads_never_becomes_ready(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldLoad(monkeypatch)
    stopped = Running(config_of(tiny_checkpoint))
    started = stopped.begin(stopped.worker.start())
    held.wait_begun()
    stopped.run(stopped.worker.stop())
    held.go_on()
    with pytest.raises(OrcdError, match="stopped while it loaded"):
        started.result(WAIT_S)
    assert stopped.states[-1] is State.STOPPED
    assert State.READY not in stopped.states
    stopped.close()


def test_the_context_is_exactly_what_was_asked_for() -> None:
    """Pages hold 64 tokens each, but a job may not use what its last page has left over."""
    assert engine_shape(Sizes(slots_total=2, max_context=100, prefill_tokens=128)).max_context == 100
