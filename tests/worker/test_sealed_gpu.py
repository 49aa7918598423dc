"""On a real GPU with the real model: flips in VRAM under load, and the plan against the device."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from orcd_jax.engine.request import Ended
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.worker.types import PlanParams
from tests.real_model import Checkpoints, smollm2_checkpoints, smollm2_gguf
from tests.residency.bitflip import flip_bit
from tests.worker.running import Running, config_of, events_of, job, services_of
from tests.worker.trial import WAIT_S, Trial, random_bit

__all__ = ["smollm2_checkpoints", "smollm2_gguf"]

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(900)]

JOBS = 8
BOUND_S = 0.5


@pytest.fixture(scope="module")
def checkpoint(smollm2_checkpoints: Checkpoints) -> Path:
    return smollm2_checkpoints("bfloat16")


@pytest.fixture(scope="module")
def real(checkpoint: Path) -> Iterator[Running]:
    started = Running(config_of(checkpoint, slots_total=str(JOBS), max_context="1024"))
    started.run(started.worker.start())
    yield started
    started.close()


def used_bytes() -> int:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]) * 2**20


@pytest.mark.requirement("WORKER-4213")
def test_the_largest_plan_loads_and_serves_and_one_slot_more_is_refused_before_loading(
    checkpoint: Path, tmp_path: Path, device: jax.Device
) -> None:
    services = services_of(plans_directory=tmp_path / "plans")
    wanted = Running(config_of(checkpoint, slots_total="1024", max_context="8192", await_commit=True), services)
    wanted.run(wanted.worker.start())
    info = wanted.run(wanted.worker.plan(PlanParams()))
    assert not info.feasible
    assert info.memory is not None
    slots = next(int(s.value) for s in info.memory.suggestions if s.flag == "--slots_total")
    wanted.close()

    one_more = Running(config_of(checkpoint, slots_total=str(slots + 1), max_context="8192"), services)
    before = (device.memory_stats() or {})["num_allocs"]
    with pytest.raises(OrcdError) as refused:
        one_more.run(one_more.worker.start())
    assert refused.value.code is ErrorCode.INSUFFICIENT_VRAM
    assert refused.value.needed_bytes is not None
    assert refused.value.available_bytes is not None
    assert refused.value.needed_bytes > refused.value.available_bytes
    assert (device.memory_stats() or {})["num_allocs"] == before
    one_more.close()

    largest = Running(config_of(checkpoint, slots_total=str(slots), max_context="8192"), services)
    largest.run(largest.worker.start())
    assert isinstance(largest.run(events_of(largest.worker, job("a", max_tokens=8)))[-1], Ended)
    plan = largest.run(largest.worker.plan(PlanParams()))
    assert plan.memory is not None
    assert plan.memory.workspace == "recorded"
    stats = device.memory_stats() or {}
    peak, limit, memory = stats["peak_bytes_in_use"], stats["bytes_limit"], plan.memory
    planned = memory.total_bytes - memory.headroom_bytes - memory.reserve_bytes
    off = abs(planned - peak) / limit
    print(f"{slots} slots of 8192 tokens: planned {planned}, peak {peak}, {off:.4%} of the device apart")
    print(f"the driver says {used_bytes()}; the pool may have {limit}")
    assert planned >= stats["bytes_in_use"]
    assert off <= 0.01
    largest.close()


@pytest.mark.requirement("WORKER-4122")
def test_a_flip_in_vram_in_any_tensor_under_eight_streams_is_found_and_named(real: Running) -> None:
    sealed = real.worker.sealed
    assert sealed is not None
    params, chance, latencies = sealed.resident.params, random.Random(1), []
    real.run(real.worker.drain(0.0))  # its own guard would find the flips too: it is told to stop
    assert sealed.engine.stop(WAIT_S)
    for path in sorted(params):
        trial = Trial(sealed, BOUND_S)
        trial.load(JOBS)
        while len(trial.tokens) < JOBS and trial.fatal is None:
            time.sleep(0.001)
        bit = random_bit(params[path], chance)
        flipped_s = time.monotonic()
        flip_bit(params[path], bit)
        error = trial.wait()
        flip_bit(params[path], bit)
        assert trial.engine.stop(WAIT_S)
        assert (error.code, error.field) == (ErrorCode.SEAL_VERIFICATION_FAILED, path)
        assert len(trial.failures) == JOBS
        assert all(failed is error for failed in trial.failures)
        assert all(token_s <= trial.fatal_s for token_s in trial.tokens)
        latencies.append(trial.fatal_s - flipped_s)
    latencies.sort()
    print(f"{len(latencies)} flips: median {latencies[len(latencies) // 2]:.3f} s, max {latencies[-1]:.3f} s")
    assert max(latencies) <= BOUND_S + 0.5
