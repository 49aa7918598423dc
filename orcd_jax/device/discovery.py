"""Which device this process owns. JAX's platform and the visible-device mask were fixed before it was imported."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from orcd_jax.errors import ErrorCode, OrcdError


class NoDevice(OrcdError):
    """The platform asked for has no usable device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInfo:
    """What is reported about a device.

    Attributes:
      kind: the vendor's name of the model, such as ``NVIDIA H200``.
      compute_capability: such as ``9.0``; empty on a CPU.
      memory_bytes: memory this process may use; 0 on a CPU, where residency is emulated.
      emulated: the CPU backend stands in for a GPU.
    """

    platform: str
    index: int
    kind: str
    compute_capability: str
    memory_bytes: int
    emulated: bool


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


def describe(device: jax.Device, index: int) -> DeviceInfo:
    """Static facts about a device; called once, at start."""
    emulated = device.platform == "cpu"
    stats = None if emulated else device.memory_stats()
    return DeviceInfo(
        platform="cpu" if emulated else "cuda",
        index=index,
        kind=device.device_kind,
        compute_capability=str(getattr(device, "compute_capability", "")),
        memory_bytes=int((stats or {}).get("bytes_limit", 0)),
        emulated=emulated,
    )
