"""Whatever could lie outside device memory is refused."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.residency import policy

pytestmark = pytest.mark.requirement("WORKER-4101")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TF_FORCE_UNIFIED_MEMORY", "1"),
        ("TF_FORCE_UNIFIED_MEMORY", "true"),
        ("XLA_PYTHON_CLIENT_UNIFIED_MEMORY", "yes"),
        ("XLA_CLIENT_MEM_FRACTION", "1.5"),
        ("XLA_PYTHON_CLIENT_MEM_FRACTION", "1.01"),
        ("XLA_CLIENT_MEM_FRACTION", "nan"),
        ("XLA_CLIENT_MEM_FRACTION", "a lot"),
        ("XLA_PYTHON_CLIENT_ALLOCATOR", "platform"),
        ("XLA_PYTHON_CLIENT_ALLOCATOR", "cuda_async"),
        ("XLA_FLAGS", "--xla_gpu_enable_host_memory_offloading=true"),
        ("XLA_FLAGS", "--xla_gpu_host_memory_offload=true"),
    ],
)
def test_an_environment_that_lets_memory_spill_is_refused(name: str, value: str) -> None:
    with pytest.raises(OrcdError) as refused:
        policy.check_environment({"PATH": "/bin", name: value})
    assert refused.value.code is ErrorCode.POLICY_VIOLATION
    assert name in refused.value.message


def test_every_such_variable_is_named_at_once() -> None:
    with pytest.raises(OrcdError) as refused:
        policy.check_environment({"TF_FORCE_UNIFIED_MEMORY": "1", "XLA_CLIENT_MEM_FRACTION": "2"})
    assert "TF_FORCE_UNIFIED_MEMORY" in refused.value.message
    assert "XLA_CLIENT_MEM_FRACTION" in refused.value.message


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"TF_FORCE_UNIFIED_MEMORY": "0"},
        {"XLA_CLIENT_MEM_FRACTION": "0.9"},
        {"XLA_PYTHON_CLIENT_ALLOCATOR": "bfc", "XLA_FLAGS": "--xla_gpu_autotune_level=4"},
    ],
)
def test_an_ordinary_environment_passes(environment: dict[str, str]) -> None:
    policy.check_environment(environment)


@pytest.mark.parametrize("field", policy._HOST_FIELDS)
def test_a_program_that_wants_host_memory_is_refused(field: str) -> None:
    analysis = SimpleNamespace(**dict.fromkeys(policy._HOST_FIELDS, 0) | {field: 64})
    program = SimpleNamespace(memory_analysis=lambda: analysis)
    with pytest.raises(OrcdError, match="decode wants 64 bytes of host memory") as refused:
        policy.check_programs({"decode": program})  # type: ignore[dict-item]
    assert refused.value.code is ErrorCode.POLICY_VIOLATION


def test_a_compiled_program_reports_no_host_memory(device: jax.Device) -> None:
    program = jax.jit(lambda x: x * 2).lower(jax.device_put(jnp.ones((8,)), device)).compile()
    policy.check_programs({"double": program})


def test_arrays_on_the_device_pass_and_others_do_not(device: jax.Device) -> None:
    here = jax.device_put(jnp.ones((8,)), device)
    policy.check_arrays([("weights.a", here)], device)
    gone = jax.device_put(jnp.ones((8,)), device) + 1
    gone.delete()
    with pytest.raises(OrcdError, match=r"weights\.b is gone"):
        policy.check_arrays([("weights.a", here), ("weights.b", gone)], device)


def test_an_array_on_another_device_is_refused() -> None:
    first, second = jax.local_devices(backend="cpu")[:2]
    there = jax.device_put(jnp.ones((8,)), second)
    with pytest.raises(OrcdError, match=r"weights\.c is not on the worker's device alone") as refused:
        policy.check_arrays([("weights.c", there)], first)
    assert refused.value.field == "weights.c"
    spread = jax.device_put(jnp.ones((8,)), jax.NamedSharding(jax.make_mesh((2,), ("x",)), jax.P("x")))
    with pytest.raises(OrcdError, match="alone"):
        policy.check_arrays([("weights.d", spread)], first)


def test_an_array_in_pinned_host_memory_is_refused(device: jax.Device) -> None:
    kinds = {memory.kind for memory in device.addressable_memories()}
    other = sorted(kinds - {device.default_memory().kind})
    assert "pinned_host" in other
    pinned = jax.device_put(jnp.ones((8,)), jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host"))
    with pytest.raises(OrcdError, match="lies in memory of the kind pinned_host"):
        policy.check_arrays([("weights.e", pinned)], device)


@pytest.mark.gpu
def test_the_driver_says_device_memory_of_every_ordinary_array(device: jax.Device) -> None:
    from orcd_jax.device.residency_probe import DriverView, MemoryType, driver_view

    for size in (1, 1000, 2**26):
        array = jax.device_put(jnp.ones((size,), jnp.bfloat16), device)
        assert driver_view(array) == DriverView(MemoryType.DEVICE, managed=False)
        policy.check_arrays([("weights.f", array)], device)


@pytest.mark.gpu
def test_the_driver_tells_pinned_host_memory_apart(device: jax.Device) -> None:
    from orcd_jax.device.residency_probe import MemoryType, driver_view

    pinned = jax.device_put(jnp.ones((8,)), jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host"))
    assert driver_view(pinned).memory is MemoryType.HOST
