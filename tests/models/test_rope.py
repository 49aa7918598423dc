"""Rotary frequencies: the same bits on every machine, because a model's digest holds them."""

from __future__ import annotations

from decimal import Decimal, localcontext

import numpy as np
import pytest

from orcd_jax.models.rope import inverse_frequencies
from tests.engine.tiny import TINY


def rounded(value: Decimal) -> np.float32:
    """The float32 nearest to an exact value."""
    low = np.float32(float(value))
    around = (np.nextafter(low, np.float32(0)), low, np.nextafter(low, np.float32(np.inf)))
    return min(around, key=lambda candidate: abs(Decimal(float(candidate)) - value))


@pytest.mark.parametrize("theta", [10_000.0, 100_000.0, 500_000.0, 1_000_000.0])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_each_frequency_is_its_formula_with_every_step_rounded_correctly(theta: float, head_dim: int) -> None:
    """float32 powers of numpy and torch differ in the last bit between processors; these may not."""
    config = TINY.model_copy(update={"rope_theta": theta, "head_dim": head_dim})
    expected = []
    with localcontext() as context:
        context.prec = 60
        for pair in range(head_dim // 2):
            exponent = np.float32(2 * pair) / np.float32(head_dim)
            power = rounded((Decimal(theta).ln() * Decimal(float(exponent))).exp())
            expected.append(np.float32(1) / power)
    frequencies, factor = inverse_frequencies(config)
    assert factor == 1.0
    assert frequencies.dtype == np.float32
    np.testing.assert_array_equal(frequencies.view(np.uint32), np.array(expected, np.float32).view(np.uint32))
