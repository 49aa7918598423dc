"""GGUF's block formats: sizes, and dequantisation to the float32 values they stand for.

Layouts and formulas follow ggml's reference (``ggml-common.h``, ``ggml-quants.c``). Every product is taken in float32
in the reference's order, so values equal its own bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from orcd_jax.errors import ErrorCode, OrcdError

Raw = NDArray[np.uint8]
Floats = NDArray[np.float32]

# ggml type number → name, for the formats that can be converted.
TENSOR_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    30: "BF16",
}
# name → (elements, bytes) of one block.
BLOCKS = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}
SLICE_BYTES = 16 * 1024 * 1024  # dequantised a slice at a time, so that temporaries stay small


def dequantize(type_name: str, raw: Raw, shape: tuple[int, ...]) -> Floats:
    """The values a tensor's blocks stand for.

    Args:
      type_name: a key of ``BLOCKS``.
      raw: the blocks, ``[bytes]``.
      shape: the tensor's shape.

    Raises:
      OrcdError: MODEL_LOAD_FAILED, when the format is not supported or the bytes do not fit the shape.
    """
    if type_name not in BLOCKS:
        raise OrcdError(
            ErrorCode.MODEL_LOAD_FAILED,
            f"tensor type {type_name:.16} is not supported; supported are {', '.join(sorted(BLOCKS))}",
        )
    elements, n_bytes = BLOCKS[type_name]
    total = int(np.prod(shape, dtype=np.int64))
    if raw.size * elements != total * n_bytes:
        raise OrcdError(ErrorCode.MODEL_LOAD_FAILED, f"{raw.size} bytes of {type_name} cannot hold {total} elements")
    blocks = raw.reshape(-1, n_bytes)
    out = np.empty((blocks.shape[0], elements), np.float32)
    step = max(1, SLICE_BYTES // n_bytes)
    for start in range(0, blocks.shape[0], step):
        part = np.ascontiguousarray(blocks[start : start + step])
        out[start : start + step] = _DEQUANTIZE[type_name](part).reshape(part.shape[0], elements)
    return out.reshape(shape)


def _half(raw: Raw) -> Floats:
    """Little-endian float16 in the last axis (2 bytes) as float32 ``[n, 1]``."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _f32(raw: Raw) -> Floats:
    return raw.view("<f4").astype(np.float32)


def _bf16(raw: Raw) -> Floats:
    values: Floats = raw.view(ml_dtypes.bfloat16).astype(np.float32)
    return values


def _nibbles(packed: Raw) -> Raw:
    """Low halves of all bytes, then high halves."""
    return np.concatenate([packed & 0x0F, packed >> 4], axis=-1)


def _fifth_bits(raw: Raw) -> Raw:
    """32 single bits of a little-endian uint32, ``[n, 32]``, each 0 or 16."""
    return (np.unpackbits(np.ascontiguousarray(raw), axis=-1, bitorder="little") << 4).astype(np.uint8)


def _q4_0(raw: Raw) -> Floats:
    quants = _nibbles(raw[:, 2:]).astype(np.int8) - np.int8(8)
    return _half(raw[:, :2]) * quants.astype(np.float32)


def _q4_1(raw: Raw) -> Floats:
    return _half(raw[:, :2]) * _nibbles(raw[:, 4:]).astype(np.float32) + _half(raw[:, 2:4])


def _q5_0(raw: Raw) -> Floats:
    quants = (_nibbles(raw[:, 6:]) | _fifth_bits(raw[:, 2:6])).astype(np.int8) - np.int8(16)
    return _half(raw[:, :2]) * quants.astype(np.float32)


def _q5_1(raw: Raw) -> Floats:
    quants = _nibbles(raw[:, 8:]) | _fifth_bits(raw[:, 4:8])
    return _half(raw[:, :2]) * quants.astype(np.float32) + _half(raw[:, 2:4])


def _q8_0(raw: Raw) -> Floats:
    return _half(raw[:, :2]) * np.ascontiguousarray(raw[:, 2:]).view(np.int8).astype(np.float32)


def _k_scales(raw: Raw) -> tuple[Raw, Raw]:
    """Eight 6-bit scales and eight 6-bit minimums packed in 12 bytes: ``[n, 8]`` each."""
    low, mid, high = raw[:, 0:4], raw[:, 4:8], raw[:, 8:12]
    scales = np.concatenate([low & 0x3F, (high & 0x0F) | ((low >> 2) & 0x30)], axis=-1)
    minimums = np.concatenate([mid & 0x3F, (high >> 4) | ((mid >> 2) & 0x30)], axis=-1)
    return scales, minimums


def _k_affine(raw: Raw, quants: Raw) -> Floats:
    """``d * scale * quant - dmin * minimum`` over eight sub-blocks of 32."""
    scales, minimums = _k_scales(raw[:, 4:16])
    factor = _half(raw[:, :2]) * scales.astype(np.float32)
    offset = _half(raw[:, 2:4]) * minimums.astype(np.float32)
    values: Floats = factor[:, :, None] * quants.astype(np.float32) - offset[:, :, None]
    return values


def _q4_k(raw: Raw) -> Floats:
    packed = raw[:, 16:].reshape(-1, 4, 1, 32)
    return _k_affine(raw, np.concatenate([packed & 0x0F, packed >> 4], axis=2).reshape(-1, 8, 32))


def _q5_k(raw: Raw) -> Floats:
    packed = raw[:, 48:].reshape(-1, 4, 1, 32)
    low = np.concatenate([packed & 0x0F, packed >> 4], axis=2).reshape(-1, 8, 32)
    bit = (raw[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[None, :, None]) & 1
    return _k_affine(raw, (low | (bit << 4)).astype(np.uint8))


def _q6_k(raw: Raw) -> Floats:
    low = raw[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate([low & 0x0F, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    high = (raw[:, 128:192].reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[None, None, :, None]) & 3
    quants = ((low | (high << 4)).astype(np.int8) - np.int8(32)).astype(np.float32).reshape(-1, 16, 16)
    scales = np.ascontiguousarray(raw[:, 192:208]).view(np.int8).astype(np.float32)
    values: Floats = (_half(raw[:, 208:210]) * scales)[:, :, None] * quants
    return values


_DEQUANTIZE: dict[str, Callable[[Raw], Floats]] = {
    "F32": _f32,
    "F16": _half,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
