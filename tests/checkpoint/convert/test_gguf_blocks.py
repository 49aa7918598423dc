"""Dequantised values equal the reference implementation's, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from orcd_jax.checkpoint.convert import gguf_blocks
from orcd_jax.checkpoint.convert.gguf_blocks import BLOCKS, TENSOR_TYPES, dequantize
from orcd_jax.errors import OrcdError

SCALE_BYTES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q6_K": [208]}


def random_blocks(type_name: str, count: int) -> np.ndarray:
    """Random bytes whose scales are finite halves."""
    rng = np.random.default_rng(7)
    elements, n_bytes = BLOCKS[type_name]
    if elements == 1:
        kind = {"F32": np.float32, "F16": np.float16}.get(type_name)
        values = rng.normal(size=count * 64).astype(np.float32)
        if kind is None:
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return values.astype(kind).view(np.uint8)
    raw = rng.integers(0, 256, (count, n_bytes), dtype=np.uint8)
    for at in SCALE_BYTES.get(type_name, [0, 2]):
        raw[:, at : at + 2] = rng.normal(size=(count, 1)).astype(np.float16).view(np.uint8)
    return raw.reshape(-1)


@pytest.mark.parametrize("type_name", sorted(BLOCKS))
def test_values_equal_the_reference_bit_for_bit(type_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_blocks, "SLICE_BYTES", 1000)  # several slices
    elements, n_bytes = BLOCKS[type_name]
    raw = random_blocks(type_name, 37)
    shape = (raw.size // n_bytes * elements,)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[type_name]).reshape(shape)
    np.testing.assert_array_equal(dequantize(type_name, raw, shape).view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize(("number", "name"), sorted(TENSOR_TYPES.items()))
def test_type_numbers_and_block_sizes_are_ggmls(number: int, name: str) -> None:
    assert gguf.GGMLQuantizationType(number).name == name
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == BLOCKS[name]


def test_an_unsupported_type_names_the_supported_ones() -> None:
    with pytest.raises(OrcdError, match="IQ2_XS is not supported; supported are BF16, F16"):
        dequantize("IQ2_XS", np.zeros(4, np.uint8), (1,))


def test_bytes_that_do_not_fit_the_shape_are_refused() -> None:
    with pytest.raises(OrcdError, match="34 bytes of Q8_0 cannot hold 64 elements"):
        dequantize("Q8_0", np.zeros(34, np.uint8), (64,))
