"""What is known of the device, and that the driver is asked before the device is opened."""

from __future__ import annotations

import os
from dataclasses import dataclass

import jax
import pytest

from orcd_jax.device.discovery import describe
from orcd_jax.device.gpu_health import GpuHealth, GpuProbe
from tests.device.fake_nvml import GPUS, FakeNvml


@dataclass(frozen=True)
class Gpu:
    """As JAX shows one."""

    platform: str = "gpu"
    device_kind: str = "NVIDIA H200"
    compute_capability: str = "9.0"

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": 100, "bytes_in_use": 7}


@pytest.mark.requirement("WORKER-4214")
def test_a_gpu_is_described_with_what_the_driver_said_before_it_was_opened() -> None:
    before = GpuProbe("0", library=FakeNvml()).read()
    info = describe(Gpu(), 3, before)
    assert (info.platform, info.index, info.uuid, info.emulated) == ("cuda", 3, GPUS[0], False)
    assert (info.memory_bytes, info.compute_capability) == (100, "9.0")
    assert info.before == before


def test_a_driver_that_tells_nothing_leaves_its_fields_empty() -> None:
    info = describe(Gpu(), 0, GpuHealth())
    assert (info.uuid, info.cuda_version, info.driver_version) == ("", "", "")
    assert info.before == GpuHealth()


def test_an_emulated_device_has_what_it_is_given_and_no_driver() -> None:
    cpu = jax.local_devices(backend="cpu")[0]
    before = GpuProbe("0", library=FakeNvml()).read()
    info = describe(cpu, 0, before, emulated_memory=1234)
    assert (info.platform, info.memory_bytes, info.emulated, info.uuid) == ("cpu", 1234, True, "")
    assert info.before == GpuHealth()
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert describe(cpu, 0, before).memory_bytes == host
