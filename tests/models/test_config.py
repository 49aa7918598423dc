"""A configuration that cannot be a model is refused where it is read."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from orcd_jax.models.config import LlamaConfig, RopeScaling
from tests.engine.tiny import TINY


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_kv_heads": 3}, "not a multiple"),
        ({"head_dim": 7}, "odd"),
        ({"hidden_size": 0}, "greater than or equal to 1"),
        ({"norm_eps": float("nan")}, "finite number"),
        ({"rope_theta": -1.0}, "greater than 1"),
        ({"rope_theta": 1.0}, "greater than 1"),
        ({"rope_theta": float("inf")}, "finite number"),
        ({"dtype": "float16"}, "float32"),
        ({"surprise": 1}, "Extra inputs"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        LlamaConfig.model_validate({**TINY.model_dump(), **change})


def test_llama3_scaling_needs_its_original_context() -> None:
    with pytest.raises(ValidationError, match="needs original_context"):
        RopeScaling(kind="llama3", factor=8.0)


def test_llama3_scaling_needs_an_ordered_band() -> None:
    with pytest.raises(ValidationError, match="high_freq_factor > low_freq_factor"):
        RopeScaling(kind="llama3", factor=8.0, original_context=64, low_freq_factor=4.0)
