"""What the process is before JAX is imported: its user, its device mask, its share of device memory, JAX's settings."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from orcd_jax.config import ConfigError, WorkerConfig
from orcd_jax.device.gpu_health import GpuProbe
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.residency.budget import DeviceMemory
from orcd_jax.residency.policy import check_environment
from orcd_jax.telemetry import narration

MEMORY_FRACTION = "XLA_CLIENT_MEM_FRACTION"
_OLD_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
_LEAST_FRACTION = 0.5


def refuse_root(config: WorkerConfig, user: int) -> None:
    """Raises POLICY_VIOLATION when the process runs as root and was not told to (WORKER-4900)."""
    if user == 0 and not config.allow_root:
        raise OrcdError(
            ErrorCode.POLICY_VIOLATION,
            "this worker refuses to run as root: start it as another user, or add --allow_root (in a container, say)",
            field="allow_root",
        )


def set_environment(config: WorkerConfig, environment: MutableMapping[str, str]) -> None:
    """Fixes the platform, the device mask and every setting of JAX before it is imported (WORKER-4020).

    Raises:
      ConfigError: CUDA_VISIBLE_DEVICES is set and shows fewer GPUs than --gpu_device needs; or the directory of the
        compile cache is not private.
      OrcdError: POLICY_VIOLATION, when a variable would let weights leave device memory.
    """
    check_environment(environment)
    # JAX reads settings that change the bits (matmul precision, the random generator) or the code that is run (its own
    # compile cache) from the environment: the same request would not give the same tokens.
    for name in [name for name in environment if name.startswith("JAX_")]:
        del environment[name]
    environment["JAX_PLATFORMS"] = config.platform
    if config.compile_cache_dir is not None:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(private_directory(config.compile_cache_dir))
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's banners; its errors still show
    if config.platform == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = device_mask(config.gpu_device, environment)
        # Indices as nvidia-smi counts them, unless a mask was made by another order.
        environment.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        if MEMORY_FRACTION not in environment and _OLD_FRACTION not in environment:
            probe = GpuProbe(environment["CUDA_VISIBLE_DEVICES"], device_order=environment["CUDA_DEVICE_ORDER"])
            health = probe.read()
            probe.close()
            fraction = memory_fraction(health.name or "", health.memory_total_bytes)
            if fraction is not None:
                environment[MEMORY_FRACTION] = f"{fraction:.4f}"


def memory_fraction(kind: str, total_bytes: int | None) -> float | None:
    """The share of a GPU's memory for XLA's pool: all but what the driver and its libraries take besides.

    XLA's own default is three quarters. None when the driver does not tell how much there is.
    """
    if not total_bytes:
        return None
    reserve = DeviceMemory(kind=kind, total_bytes=total_bytes).reserve_bytes
    return max(_LEAST_FRACTION, (total_bytes - reserve) / total_bytes)


def private_directory(path: Path) -> Path:
    """Makes the directory of the compile cache, or checks that it is ours alone."""
    flag = "--compile_cache_dir"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise ConfigError(
            [f"{flag}: it cannot be made ({error.strerror}): choose another, or check permissions"]
        ) from None
    if status.st_mode & 0o077:
        raise ConfigError([f"{flag}: others can use it (mode {status.st_mode & 0o777:04o}): run `chmod 700` on it"])
    if status.st_uid != os.geteuid():
        raise ConfigError([f"{flag}: it belongs to another user: choose one of your own"])
    return path.resolve()


def device_mask(index: int, environment: Mapping[str, str]) -> str:
    """The value of CUDA_VISIBLE_DEVICES that shows one GPU: the ``index``-th of those visible now."""
    outer = environment.get("CUDA_VISIBLE_DEVICES")
    if outer is None:
        return str(index)
    visible = [name.strip() for name in outer.split(",") if name.strip() and name.strip() != "-1"]
    if index >= len(visible):
        raise ConfigError(
            [
                (
                    f"--gpu_device: {index} is not allowed: CUDA_VISIBLE_DEVICES shows "
                    f"{narration.count(len(visible), 'GPU')}; use an index below that, or unset it"
                )
            ]
        )
    return visible[index]
