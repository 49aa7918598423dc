"""Plan never lies: what it calls feasible loads, what it does not is refused before anything is allocated."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from orcd_jax.engine.request import Ended
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.worker import commits as commits_module
from orcd_jax.worker.lifecycle import State
from orcd_jax.worker.loader import ResidentModel, load
from orcd_jax.worker.types import CommitParams, PlanInfo, PlanParams
from tests.conftest import PLATFORM
from tests.worker.running import Running, commit_of, config_of, events_of, job

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PLATFORM != "cpu", reason="a simulated device; the real one is in test_sealed_gpu"),
]


def awaiting(checkpoint: Path, **flags: str | bool) -> Running:
    started = Running(config_of(checkpoint, await_commit=True, **flags))
    started.run(started.worker.start())
    return started


def plan_of(running: Running, **wishes: int) -> PlanInfo:
    return running.run(running.worker.plan(PlanParams(**wishes)))  # type: ignore[arg-type]


def total(info: PlanInfo) -> int:
    assert info.memory is not None
    return info.memory.total_bytes


@pytest.mark.requirement("WORKER-4213")
def test_around_the_limit_of_a_simulated_device_feasible_loads_and_infeasible_does_not(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ruler = awaiting(tiny_checkpoint, slots_total="64", prefill_tokens="1024")
    chance = random.Random(3)
    grid = [(chance.randint(1, 64), chance.randint(128, 512)) for _ in range(12)]
    needs = {sizes: total(plan_of(ruler, slots=sizes[0], max_context=sizes[1])) for sizes in grid}
    ruler.close()
    loads: list[int] = []

    def counted(*arguments: Any, **named: Any) -> ResidentModel:
        loads.append(1)
        return load(*arguments, **named)

    monkeypatch.setattr(commits_module, "load", counted)
    for number, ((slots, context), need) in enumerate(needs.items()):
        flags = {"slots_total": str(slots), "max_context": str(context), "prefill_tokens": "1024"}
        for memory, fits in ((need - 1, False), (need, True)):
            if fits and number >= 3:  # each load compiles for seconds; the refusals cost nothing
                continue
            running = awaiting(tiny_checkpoint, emulated_memory=str(memory), **flags)
            info, before = plan_of(running), len(loads)
            assert info.feasible is fits
            if fits:
                assert running.run(commit_of(running.worker, CommitParams(plan=PlanParams()))).sealed
                assert isinstance(running.run(events_of(running.worker, job("a")))[-1], Ended)
            else:
                with pytest.raises(OrcdError) as refused:
                    running.run(commit_of(running.worker, CommitParams(plan=PlanParams())))
                assert refused.value.code is ErrorCode.INSUFFICIENT_VRAM
                assert (refused.value.needed_bytes, refused.value.available_bytes) == (need, memory)
                assert len(loads) == before, "refused after something was loaded"
                assert running.worker.lifecycle.state is State.STARTING
            running.close()


@pytest.mark.requirement("WORKER-4211")
def test_what_plan_suggests_would_fit(tiny_checkpoint: Path) -> None:
    ruler = awaiting(tiny_checkpoint, slots_total="64")
    need = total(plan_of(ruler, slots=16))
    ruler.close()
    tight = awaiting(tiny_checkpoint, slots_total="64", emulated_memory=str(need))
    info = plan_of(tight)
    assert not info.feasible
    assert info.memory is not None
    slots = next(one.value for one in info.memory.suggestions if one.flag == "--slots_total")
    assert slots >= 16
    assert plan_of(tight, slots=slots).feasible
    assert not plan_of(tight, slots=slots + 1).feasible
    tight.close()


@pytest.mark.requirement("WORKER-4030")
def test_a_failed_commit_frees_everything_and_another_may_follow(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = awaiting(tiny_checkpoint)

    def fails(*_: object, **__: object) -> None:
        raise OrcdError(ErrorCode.VRAM_OOM, "no memory for the state")

    monkeypatch.setattr(commits_module, "seal_model", fails)
    with pytest.raises(OrcdError, match="no memory for the state"):
        running.run(commit_of(running.worker, CommitParams(plan=PlanParams())))
    assert running.worker.lifecycle.state is State.STARTING
    assert running.states[-2:] == [State.LOADING, State.STARTING]
    monkeypatch.undo()
    assert running.run(commit_of(running.worker, CommitParams(plan=PlanParams()))).sealed
    running.close()


@pytest.mark.requirement("WORKER-4030")
def test_a_failed_commit_that_leaves_memory_behind_stops_the_worker(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = awaiting(tiny_checkpoint)

    def fails(*_: object, **__: object) -> None:
        raise OrcdError(ErrorCode.VRAM_OOM, "no memory for the state")

    monkeypatch.setattr(commits_module, "seal_model", fails)
    monkeypatch.setattr(commits_module, "bytes_in_use", lambda _: 10**9)
    with pytest.raises(OrcdError, match="no memory for the state"):
        running.run(commit_of(running.worker, CommitParams(plan=PlanParams())))
    assert running.worker.lifecycle.state is State.STOPPED
    assert "1000000000 bytes" in running.run(running.worker.wait_failed()).message
    running.close()


@pytest.mark.requirement("WORKER-4224")
def test_whoever_asks_for_the_same_while_it_loads_joins_in_and_others_wait(tiny_checkpoint: Path) -> None:
    running = awaiting(tiny_checkpoint)
    first = running.begin(commit_of(running.worker, CommitParams(plan=PlanParams(), shard_id="s")))
    second = running.begin(commit_of(running.worker, CommitParams(plan=PlanParams(), shard_id="s")))
    with pytest.raises(OrcdError) as refused:
        running.run(commit_of(running.worker, CommitParams(plan=PlanParams(), shard_id="other")))
    assert refused.value.code is ErrorCode.BUSY
    assert first.result(120) == second.result(120)
    running.close()


@pytest.mark.requirement("WORKER-4226")
def test_a_worker_that_wants_pinned_models_refuses_others(tiny_checkpoint: Path) -> None:
    running = awaiting(tiny_checkpoint, require_pinned=True)
    with pytest.raises(OrcdError) as refused:
        running.run(commit_of(running.worker, CommitParams(plan=PlanParams())))
    assert refused.value.code is ErrorCode.POLICY_VIOLATION
    assert running.worker.lifecycle.state is State.STARTING
    running.close()


@pytest.mark.requirement("WORKER-4102")
def test_a_tensor_over_the_staging_bound_is_refused_with_the_bytes(tiny_checkpoint: Path) -> None:
    import jax

    from orcd_jax.checkpoint.manifest import read_manifest
    from orcd_jax.checkpoint.restore import restore

    with pytest.raises(OrcdError) as refused:
        restore(tiny_checkpoint, read_manifest(tiny_checkpoint), jax.devices()[0], staging_bytes=100)
    assert refused.value.code is ErrorCode.HOST_OOM
    assert (refused.value.field, refused.value.available_bytes) == ("max_staging_bytes", 100)


@pytest.mark.requirement("WORKER-4213")
def test_a_worker_that_drains_calls_nothing_feasible(tiny_checkpoint: Path) -> None:
    running = awaiting(tiny_checkpoint)
    assert plan_of(running).feasible
    running.run(running.worker.drain(0.0))
    info = plan_of(running)
    assert [reason.code for reason in info.reasons] == [ErrorCode.NOT_READY]
    running.close()
