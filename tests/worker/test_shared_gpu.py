"""A GPU that others use, too, or of which that is not known: told by Plan, refused by Commit. The driver is a fake."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from orcd_jax.device.discovery import DeviceInfo, select_device
from orcd_jax.device.gpu_health import INTERVAL_S, STALE_S, GpuHealth, GpuHealthSampler, GpuProbe
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.worker import commits as commits_module
from orcd_jax.worker.planner import Planner
from orcd_jax.worker.services import Services
from orcd_jax.worker.types import CommitParams, PlanInfo, PlanParams
from tests.conftest import PLATFORM
from tests.device.fake_nvml import FakeNvml
from tests.worker.running import Running, config_of

pytestmark = pytest.mark.requirement("WORKER-4214")

GIB = 2**30
KIND = "NVIDIA H200"
RESERVE = 768 * 2**20  # of that kind
USABLE = 140 * GIB
OWN = os.getpid()
PLAN = PlanParams()
IDLE = GpuProbe("0", library=FakeNvml(used=0, free=USABLE)).read()


def told(used: int, *processes: tuple[int, int]) -> GpuHealth:
    """As the driver tells it: bytes in use, and who holds how much."""
    return GpuProbe("0", library=FakeNvml(used=used, free=USABLE - used, processes=processes)).read()


def planner(
    checkpoint: Path,
    now: GpuHealth | Callable[[], GpuHealth],
    *,
    before: GpuHealth = IDLE,
    pool: int = USABLE - RESERVE,
    allow_shared_gpu: bool = False,
) -> Planner:
    device = DeviceInfo(
        platform="cuda",
        index=0,
        kind=KIND,
        uuid="GPU-1",
        compute_capability="9.0",
        memory_bytes=pool,
        emulated=False,
        cuda_version="",
        driver_version="",
        before=before,
    )
    health = now if callable(now) else lambda: now
    config = config_of(checkpoint, platform="cuda", allow_shared_gpu=allow_shared_gpu)
    return Planner(config, Services(gpu_health=health), device)


def available(info: PlanInfo) -> tuple[int, int]:
    assert info.memory is not None
    return info.memory.available_bytes, info.memory.foreign_bytes


def refused(planner: Planner) -> OrcdError:
    """What Commit says, which is Plan's first reason."""
    with pytest.raises(OrcdError) as caught:
        planner.commit_plan(CommitParams(plan=PLAN))
    first = planner.assess(PLAN).reasons[0]
    assert (first.code, first.message) == (caught.value.code, caught.value.message)
    return caught.value


def test_a_gpu_to_oneself_has_the_pool_and_what_lies_outside_of_it(tiny_checkpoint: Path) -> None:
    for now in (IDLE, told(100 * GIB, (OWN, 100 * GIB))):
        one = planner(tiny_checkpoint, now)
        assert available(one.assess(PLAN)) == (USABLE, 0)
        assert one.assess(PLAN).feasible
        assert one.commit_plan(CommitParams(plan=PLAN)).memory.available_bytes == USABLE


def test_xla_s_own_limit_counts_where_it_is_less_than_what_the_device_has(tiny_checkpoint: Path) -> None:
    limited = planner(tiny_checkpoint, told(20 * GIB, (7, 20 * GIB)), pool=50 * GIB)
    assert available(limited.assess(PLAN)) == (50 * GIB + RESERVE, 20 * GIB)
    crowded = planner(tiny_checkpoint, told(120 * GIB, (7, 120 * GIB)), pool=50 * GIB)
    assert available(crowded.assess(PLAN)) == (20 * GIB, 120 * GIB)


@pytest.mark.requirement("WORKER-4210")
@pytest.mark.parametrize(
    ("before", "now"),
    [
        (IDLE, told(40 * GIB, (7, 40 * GIB))),
        (told(40 * GIB), told(40 * GIB)),
        (told(40 * GIB), told(90 * GIB)),
        (IDLE, told(90 * GIB, (OWN, 50 * GIB))),
    ],
    ids=["one that is listed", "one that was there before", "where nobody is listed", "one that is not listed"],
)
def test_what_others_hold_is_told_not_available_and_a_reason_why_not(
    tiny_checkpoint: Path, before: GpuHealth, now: GpuHealth
) -> None:
    shared = planner(tiny_checkpoint, now, before=before)
    assert available(shared.assess(PLAN)) == (100 * GIB, 40 * GIB)
    error = refused(shared)
    assert (error.code, error.field) == (ErrorCode.POLICY_VIOLATION, "allow_shared_gpu")
    assert "other processes hold 42.9 GB of the GPU" in error.message


def test_whoever_shares_the_gpu_knowingly_may_load_into_what_is_left(tiny_checkpoint: Path) -> None:
    need = planner(tiny_checkpoint, IDLE).commit_plan(CommitParams(plan=PLAN)).memory.total_bytes
    for left, fits in ((need, True), (need - 1, False)):
        shared = planner(tiny_checkpoint, told(USABLE - left, (7, USABLE - left)), allow_shared_gpu=True)
        assert shared.assess(PLAN).feasible is fits
        if fits:
            assert shared.commit_plan(CommitParams(plan=PLAN)).memory.available_bytes == left
        else:
            assert refused(shared).code is ErrorCode.INSUFFICIENT_VRAM


def test_others_and_too_little_memory_are_told_together(tiny_checkpoint: Path) -> None:
    full = planner(tiny_checkpoint, told(USABLE, (7, USABLE)))
    codes = [reason.code for reason in full.assess(PLAN).reasons]
    assert codes == [ErrorCode.INSUFFICIENT_VRAM, ErrorCode.POLICY_VIOLATION]


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (GpuHealth(), GpuHealth()),
        (IDLE, GpuHealth()),
        (GpuHealth(), IDLE),
        (IDLE, GpuProbe("0", library=FakeNvml(broken=frozenset({"nvmlDeviceGetComputeRunningProcesses_v3"}))).read()),
        (IDLE, GpuProbe("0", library=FakeNvml(absent=frozenset({"nvmlDeviceGetMemoryInfo_v2"}))).read()),
    ],
    ids=["no driver", "it tells nothing any more", "nor did before", "no processes", "no memory"],
)
def test_what_is_not_known_of_others_is_a_reason_why_not_and_says_what_to_do(
    tiny_checkpoint: Path, before: GpuHealth, now: GpuHealth
) -> None:
    error = refused(planner(tiny_checkpoint, now, before=before))
    assert (error.code, error.field) == (ErrorCode.POLICY_VIOLATION, "allow_shared_gpu")
    for word in ("does not tell", "nvidia-smi", "NVIDIA_DRIVER_CAPABILITIES", "--allow_shared_gpu"):
        assert word in error.message
    assert planner(tiny_checkpoint, now, before=before, allow_shared_gpu=True).assess(PLAN).feasible


def test_a_driver_that_hangs_is_not_believed_for_long(tiny_checkpoint: Path) -> None:
    clock_s = [0.0]
    sampler = GpuHealthSampler(lambda: IDLE, wait=lambda _: True, clock=lambda: clock_s[0])
    sampler.start()
    one = planner(tiny_checkpoint, sampler.latest)
    clock_s[0] = STALE_S
    assert one.assess(PLAN).feasible
    clock_s[0] = STALE_S + INTERVAL_S
    assert refused(one).field == "allow_shared_gpu"
    assert sampler.close()


def test_the_driver_is_asked_before_the_device_is_opened(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def health() -> GpuHealth:
        order.append("asked")
        return IDLE

    def opened(platform: str, index: int) -> jax.Device:
        order.append("opened")
        return select_device(platform, index)

    monkeypatch.setattr(commits_module, "select_device", opened)
    running = Running(config_of(tiny_checkpoint, await_commit=True), Services(gpu_health=health))
    running.run(running.worker.start())
    assert order[:2] == ["asked", "opened"]
    running.close()


@pytest.mark.skipif(PLATFORM != "cpu", reason="an emulated device")
def test_nobody_else_holds_memory_of_an_emulated_device(tiny_checkpoint: Path) -> None:
    for health in (GpuHealth(), told(40 * GIB, (7, 40 * GIB))):
        config = config_of(tiny_checkpoint, await_commit=True, emulated_memory=str(GIB))
        running = Running(config, Services(gpu_health=lambda health=health: health))  # type: ignore[misc]
        running.run(running.worker.start())
        info = running.run(running.worker.plan(PLAN))
        assert info.feasible
        assert available(info) == (GIB, 0)
        running.close()
