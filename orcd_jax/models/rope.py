"""Rotary position frequencies and their scaling variants, computed once on the host at conversion.

The formulas are those of Hugging Face ``transformers`` (``modeling_rope_utils``), in float32 as there, because
published weights were trained and evaluated with frequencies rounded that way.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from orcd_jax.models.config import LlamaConfig, RopeScaling

Frequencies = NDArray[np.float32]


def inverse_frequencies(config: LlamaConfig) -> tuple[Frequencies, float]:
    """Angle per position of each rotated pair.

    Returns:
      ``[head_dim / 2]`` float32 radians a position, and the factor that cosines and sines are multiplied by (1 but
      for yarn).
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    # Powers in float64, then rounded: float32 powers differ in the last bit from processor to processor, and with them
    # the digest of the same model. Everything else here is exact by IEEE 754.
    theta = float(np.float32(config.rope_theta))
    powers = np.array([math.pow(theta, exponent) for exponent in exponents.tolist()], np.float64).astype(np.float32)
    plain = (np.float32(1.0) / powers).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return plain, 1.0
    match scaling.kind:
        case "linear":
            return (plain / np.float32(scaling.factor)).astype(np.float32), 1.0
        case "llama3":
            return _llama3(plain, scaling), 1.0
        case "yarn":
            return _yarn(plain, scaling, config), attention_factor(config)


def attention_factor(config: LlamaConfig) -> float:
    """What cosines and sines are multiplied by: for yarn ``0.1 ln(factor) + 1`` unless the model gives one."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0


def _llama3(plain: Frequencies, scaling: RopeScaling) -> Frequencies:
    """Divides long wavelengths by the factor, keeps short ones, blends between (Llama 3.1)."""
    context = float(_context(scaling))
    wavelengths = 2 * math.pi / plain
    blend = (context / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0).astype(np.float32)
    stretched: Frequencies = (1 - blend) * plain / np.float32(scaling.factor) + blend * plain
    return stretched.astype(np.float32)


def _yarn(plain: Frequencies, scaling: RopeScaling, config: LlamaConfig) -> Frequencies:
    """Interpolates the pairs that turn fewer than ``beta_slow`` times in the original context (arXiv:2309.00071)."""
    context, half = _context(scaling), config.head_dim // 2

    def pair_that_turns(times: float) -> float:
        return config.head_dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    if low == high:
        high += 0.001
    interpolated = np.clip((np.arange(half, dtype=np.float32) - low) / (high - low), 0, 1).astype(np.float32)
    stretched: Frequencies = plain / np.float32(scaling.factor) * interpolated + plain * (1 - interpolated)
    return stretched.astype(np.float32)


def _context(scaling: RopeScaling) -> int:
    if scaling.original_context is None:
        raise ValueError(f"rope scaling {scaling.kind} without original_context")  # RopeScaling refuses this
    return scaling.original_context
