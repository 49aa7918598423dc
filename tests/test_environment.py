"""What the process is before JAX is imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from orcd_jax.config import ConfigError
from orcd_jax.environment import memory_fraction, refuse_root, set_environment
from orcd_jax.errors import ErrorCode, OrcdError
from tests.configured import parsed


@pytest.mark.requirement("WORKER-4900")
def test_root_is_refused_unless_allowed() -> None:
    with pytest.raises(OrcdError, match="--allow_root") as caught:
        refuse_root(parsed("--standalone"), 0)
    assert caught.value.code is ErrorCode.POLICY_VIOLATION
    refuse_root(parsed("--standalone", "--allow_root"), 0)
    refuse_root(parsed("--standalone"), 1000)


@pytest.mark.requirement("WORKER-4712")
def test_settings_of_jax_that_change_the_bits_are_dropped_from_the_environment() -> None:
    environment = {"JAX_THREEFRY_PARTITIONABLE": "0", "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16", "HOME": "/root"}
    set_environment(parsed("--standalone", "--platform=cpu"), environment)
    assert {name for name in environment if name.startswith("JAX_")} == {"JAX_PLATFORMS"}
    assert environment["HOME"] == "/root"


def test_the_platform_is_fixed_before_jax_whatever_the_environment_says() -> None:
    environment = {"JAX_PLATFORMS": "tpu"}
    set_environment(parsed("--standalone", "--platform=cpu"), environment)
    assert environment["JAX_PLATFORMS"] == "cpu"
    assert "CUDA_VISIBLE_DEVICES" not in environment


@pytest.mark.requirement("WORKER-4621")
def test_cuda_is_asked_for_alone_so_that_nothing_falls_back() -> None:
    environment: dict[str, str] = {}
    set_environment(parsed("--standalone"), environment)
    assert environment["JAX_PLATFORMS"] == "cuda"


@pytest.mark.requirement("WORKER-4020")
@pytest.mark.parametrize(
    ("outer", "index", "mask"),
    [(None, 0, "0"), (None, 3, "3"), ("2,5", 0, "2"), ("2,5", 1, "5"), ("GPU-abc, GPU-def", 1, "GPU-def")],
)
def test_the_mask_shows_one_gpu_counted_among_those_visible(outer: str | None, index: int, mask: str) -> None:
    environment = {} if outer is None else {"CUDA_VISIBLE_DEVICES": outer}
    set_environment(parsed("--standalone", f"--gpu_device={index}"), environment)
    assert environment["CUDA_VISIBLE_DEVICES"] == mask


@pytest.mark.parametrize(("outer", "index"), [("", 0), ("-1", 0), ("2,5", 2)])
def test_a_gpu_beyond_the_mask_is_refused(outer: str, index: int) -> None:
    with pytest.raises(ConfigError, match=r"--gpu_device.*CUDA_VISIBLE_DEVICES"):
        set_environment(parsed("--standalone", f"--gpu_device={index}"), {"CUDA_VISIBLE_DEVICES": outer})


def test_compiled_code_is_kept_only_in_a_private_directory(tmp_path: Path) -> None:
    environment = {"JAX_COMPILATION_CACHE_DIR": "/tmp/anybody"}
    set_environment(parsed("--standalone", "--platform=cpu"), environment)
    assert "JAX_COMPILATION_CACHE_DIR" not in environment
    cache = tmp_path / "compiled"
    set_environment(parsed("--standalone", "--platform=cpu", f"--compile_cache_dir={cache}"), environment)
    assert environment["JAX_COMPILATION_CACHE_DIR"] == str(cache)
    assert cache.stat().st_mode & 0o777 == 0o700
    cache.chmod(0o750)
    with pytest.raises(ConfigError, match=r"--compile_cache_dir: others can use it \(mode 0750\): run `chmod 700`"):
        set_environment(parsed("--standalone", "--platform=cpu", f"--compile_cache_dir={cache}"), environment)


def test_a_compile_cache_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--compile_cache_dir: it cannot be made"):
        set_environment(parsed("--standalone", f"--compile_cache_dir={tmp_path}/file/cache"), {})


@pytest.mark.requirement("WORKER-4101")
def test_an_environment_that_lets_memory_spill_is_refused_before_anything_is_set() -> None:
    environment = {"TF_FORCE_UNIFIED_MEMORY": "1"}
    with pytest.raises(OrcdError) as refused:
        set_environment(parsed("--standalone", "--platform=cpu"), environment)
    assert refused.value.code is ErrorCode.POLICY_VIOLATION
    assert environment == {"TF_FORCE_UNIFIED_MEMORY": "1"}


@pytest.mark.parametrize(
    ("kind", "total", "least", "most"),
    [
        ("NVIDIA H100 80GB HBM3", 85 * 10**9, 0.98, 0.995),
        ("unknown", 24 * 2**30, 0.95, 0.96),
        ("unknown", 2**30, 0.5, 0.5),
    ],
)
def test_the_pool_is_all_but_what_the_driver_takes(kind: str, total: int, least: float, most: float) -> None:
    fraction = memory_fraction(kind, total)
    assert fraction is not None
    assert least <= fraction <= most


def test_without_the_drivers_word_jax_keeps_its_own_default() -> None:
    assert memory_fraction("", None) is None
