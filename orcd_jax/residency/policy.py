"""The residency policy (WORKER-4101): whatever a job touches lies in device memory, and nothing else will do.

Checked at start (environment), when a model is sealed, and every minute while it serves. A failure is fatal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from orcd_jax.errors import ErrorCode, OrcdError

if TYPE_CHECKING:  # the environment is checked before JAX may be imported
    import jax

_FALSE = frozenset({"", "0", "false", "no"})
_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
_ALLOCATORS = frozenset({"", "default", "bfc"})
_HOST_FIELDS = (
    "host_generated_code_size_in_bytes",
    "host_argument_size_in_bytes",
    "host_output_size_in_bytes",
    "host_alias_size_in_bytes",
    "host_temp_size_in_bytes",
)


def check_environment(environment: Mapping[str, str]) -> None:
    """Refuses settings that would let device memory spill to the host.

    Raises:
      OrcdError: POLICY_VIOLATION, naming every such variable.
    """
    problems = []
    for name in ("TF_FORCE_UNIFIED_MEMORY", "XLA_PYTHON_CLIENT_UNIFIED_MEMORY"):
        if environment.get(name, "").strip().lower() not in _FALSE:
            problems.append(f"{name} asks for unified memory")
    for name in _FRACTIONS:
        if name in environment and not _is_fraction(environment[name]):
            problems.append(f"{name} must be above 0 and at most 1")
    for name in ("XLA_PYTHON_CLIENT_ALLOCATOR", "XLA_CLIENT_ALLOCATOR"):
        if environment.get(name, "").strip().lower() not in _ALLOCATORS:
            problems.append(f"{name} must be default or bfc")
    if "host_memory_offload" in environment.get("XLA_FLAGS", "").lower():
        problems.append("XLA_FLAGS asks for offloading to host memory")
    if problems:
        raise OrcdError(
            ErrorCode.POLICY_VIOLATION,
            f"the environment lets weights leave device memory: {'; '.join(problems)}: unset it",
            field="environment",
        )


def check_programs(programs: Mapping[str, jax.stages.Compiled]) -> None:
    """Refuses a program that keeps anything in host memory.

    Raises:
      OrcdError: POLICY_VIOLATION, naming the program and the bytes.
    """
    for name, program in programs.items():
        analysis = program.memory_analysis()
        held = sum(int(getattr(analysis, field, 0)) for field in _HOST_FIELDS)
        if held:
            raise OrcdError(
                ErrorCode.POLICY_VIOLATION, f"the program {name} wants {held} bytes of host memory", field=name
            )


def check_arrays(arrays: Iterable[tuple[str, jax.Array]], device: jax.Device) -> None:
    """Refuses an array that is not wholly on ``device``, in its own kind of memory; on CUDA the driver is asked too.

    Raises:
      OrcdError: POLICY_VIOLATION, naming the array.
    """
    kind = device.default_memory().kind if device.platform == "cpu" else "device"
    for name, array in arrays:
        if array.is_deleted():
            raise _refusal(name, "is gone")
        if array.sharding.device_set != {device}:
            raise _refusal(name, "is not on the worker's device alone")
        if array.sharding.memory_kind != kind:
            raise _refusal(name, f"lies in memory of the kind {array.sharding.memory_kind!s:.32}, not {kind}")
        if device.platform == "gpu":
            _check_driver(name, array)


def _check_driver(name: str, array: jax.Array) -> None:
    from orcd_jax.device.residency_probe import MemoryType, driver_view

    view = driver_view(array)
    if view.managed:
        raise _refusal(name, "is managed memory, which the driver may move to the host")
    if view.memory is not MemoryType.DEVICE:
        raise _refusal(name, f"is {view.memory.name.lower()} memory by the driver's word")


def _is_fraction(text: str) -> bool:
    try:
        return 0 < float(text) <= 1
    except ValueError:
        return False


def _refusal(name: str, problem: str) -> OrcdError:
    return OrcdError(ErrorCode.POLICY_VIOLATION, f"{name} {problem}: the worker stops", field=name)
