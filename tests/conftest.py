"""What every test runs under: strict dtypes and ranks, four virtual CPU devices, and no silent fallback from a GPU."""

from __future__ import annotations

import os
import signal

# A suite that is started in the background ignores Ctrl-C, and so would every process it starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

REQUIRE_REAL_GPU = os.environ.get("REQUIRE_REAL_GPU") == "1"

PLATFORM = "cuda" if REQUIRE_REAL_GPU else "cpu"
"""What a worker under test is told with ``--platform``."""

# Before JAX is imported by anything.
os.environ.setdefault("JAX_PLATFORMS", PLATFORM)
if REQUIRE_REAL_GPU:
    # Several processes of the suite share the GPU; by default each would take three quarters of it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
else:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4".strip()

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def device() -> jax.Device:
    """The device under test: a real GPU when ``REQUIRE_REAL_GPU=1``, else the first virtual CPU."""
    chosen = jax.local_devices()[0]
    if REQUIRE_REAL_GPU and chosen.platform != "gpu":
        pytest.fail(f"REQUIRE_REAL_GPU=1, but the device is {chosen.platform}")
    return chosen
