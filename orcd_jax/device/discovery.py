"""Which device this process owns. JAX's platform and the visible-device mask were fixed before it was imported."""

from __future__ import annotations

import os
from dataclasses import dataclass

import jax

from orcd_jax.device.gpu_health import GpuHealth
from orcd_jax.errors import ErrorCode, OrcdError


class NoDevice(OrcdError):
    """The platform asked for has no usable device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInfo:
    """What is reported about a device. Read once, before anything is allocated.

    Attributes:
      kind: the vendor's name of the model, such as ``NVIDIA H200``.
      uuid: the driver's; empty on a CPU, or when the driver does not tell.
      compute_capability: such as ``9.0``; empty on a CPU.
      memory_bytes: memory that arrays may use: XLA's pool. On a CPU: what is emulated, else the host's own memory.
      emulated: the CPU backend stands in for a GPU.
      before: what the driver said before this process opened the device; nothing on a CPU.
    """

    platform: str
    index: int
    kind: str
    uuid: str
    compute_capability: str
    memory_bytes: int
    emulated: bool
    cuda_version: str
    driver_version: str
    before: GpuHealth


def select_device(platform: str, index: int) -> jax.Device:
    """The device of ``--platform`` and ``--gpu_device``.

    The mask already hides all other GPUs, so a GPU is always the first one visible.

    Raises:
      NoDevice: the platform has none, or JAX was installed without it. There is no fallback.
    """
    try:
        devices = jax.local_devices(backend=platform)
    except (RuntimeError, AssertionError):  # the second when JAX has no plugin for the one platform it may use
        devices = []
    if not devices:
        raise NoDevice(
            ErrorCode.MODEL_LOAD_FAILED,
            f"no {platform} device {index} is available to this process: check nvidia-smi, CUDA_VISIBLE_DEVICES and "
            "that orcd-jax was installed with [cuda12] or [cuda13]; to develop without a GPU ask for --platform=cpu",
            field="platform",
        )
    return devices[0]


def describe(device: jax.Device, index: int, before: GpuHealth, *, emulated_memory: int = 0) -> DeviceInfo:
    """Facts about a device; called once, at start.

    Args:
      device: the one that ``select_device`` gave.
      index: ``--gpu_device``.
      before: what the driver said before ``select_device`` opened it.
      emulated_memory: ``--emulated_memory``; 0: as much as the host has.
    """
    emulated = device.platform == "cpu"
    if emulated:
        memory_bytes = emulated_memory or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        memory_bytes = int((device.memory_stats() or {}).get("bytes_limit", 0))
    return DeviceInfo(
        platform="cpu" if emulated else "cuda",
        index=index,
        kind=device.device_kind,
        uuid="" if emulated else before.uuid or "",
        compute_capability=str(getattr(device, "compute_capability", "")),
        memory_bytes=memory_bytes,
        emulated=emulated,
        cuda_version="" if emulated else before.cuda_version or "",
        driver_version="" if emulated else before.driver_version or "",
        before=GpuHealth() if emulated else before,
    )


def bytes_in_use(device: jax.Device) -> int:
    """Bytes this process holds on the device; 0 where the backend does not count them."""
    return int((device.memory_stats() or {}).get("bytes_in_use", 0))
