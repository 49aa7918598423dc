"""Flips one bit in the memory of a live array, where JAX does not see it: what a fault or an attacker would do."""

from __future__ import annotations

import ctypes
import functools

import jax


def flip_bit(array: jax.Array, bit: int) -> None:
    """Flips bit ``bit`` of an array's buffer on the CPU or on a CUDA device. A second flip puts it back.

    Whatever the device has been given to do with the array is done before.
    """
    assert 0 <= bit < array.nbytes * 8
    array.block_until_ready()
    address, mask = array.unsafe_buffer_pointer() + bit // 8, 1 << bit % 8
    (device,) = array.devices()
    if device.platform == "cpu":
        byte = ctypes.c_ubyte.from_address(address)
        byte.value ^= mask
    else:
        _flip_on_cuda(device.local_hardware_id or 0, address, mask)


def _flip_on_cuda(ordinal: int, address: int, mask: int) -> None:
    driver = _driver(ordinal)
    byte = ctypes.c_ubyte()
    _check(driver.cuCtxSynchronize())
    _check(driver.cuMemcpyDtoH_v2(ctypes.byref(byte), ctypes.c_uint64(address), ctypes.c_size_t(1)))
    byte.value ^= mask
    _check(driver.cuMemcpyHtoD_v2(ctypes.c_uint64(address), ctypes.byref(byte), ctypes.c_size_t(1)))


@functools.cache
def _driver(ordinal: int) -> ctypes.CDLL:
    """The driver, with the context that JAX uses made this thread's own. Flip from one thread."""
    driver = ctypes.CDLL("libcuda.so.1")
    context = ctypes.c_void_p()
    _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), ctypes.c_int(ordinal)))
    _check(driver.cuCtxSetCurrent(context))
    return driver


def _check(status: int) -> None:
    assert status == 0, f"the CUDA driver answers {status}"
