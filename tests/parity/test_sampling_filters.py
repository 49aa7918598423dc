"""Temperature, top-k, top-p and min-p keep the same tokens, with the same probabilities, as ``transformers``."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from orcd_jax.engine.sampling import SamplingRows, keep_likely

pytestmark = pytest.mark.parity

VOCABULARY = 503
SPREADS = (0.05, 1.0, 3.0, 12.0)  # from nearly flat to nearly certain
LOGITS = np.concatenate([np.random.default_rng(7).normal(0.0, spread, (4, VOCABULARY)) for spread in SPREADS]).astype(
    np.float32
)
SETTINGS = list(
    itertools.product((0.3, 1.0, 1.9), (0, 1, 5, 60, VOCABULARY, 10_000), (1.0, 0.95, 0.5, 0.02), (0.0, 0.05, 0.6))
)


def theirs(temperature: float, top_k: int, top_p: float, min_p: float) -> NDArray[np.float32]:
    """Scores after transformers' warpers, in the order in which its ``generate`` applies them; -inf is filtered."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    ids, scores = torch.zeros((len(LOGITS), 1), dtype=torch.long), torch.from_numpy(LOGITS.copy())
    return np.asarray(warpers(ids, scores).numpy(), np.float32)  # type: ignore[arg-type]


@jax.jit
def filtered(logits: jax.Array, rows: SamplingRows) -> jax.Array:
    return keep_likely(logits / rows.temperature[:, None], rows)


def ours(temperature: float, top_k: int, top_p: float, min_p: float) -> NDArray[np.float32]:
    count = len(LOGITS)
    rows = SamplingRows(
        temperature=jnp.full((count,), temperature, jnp.float32),
        top_k=jnp.full((count,), top_k, jnp.int32),
        top_p=jnp.full((count,), top_p, jnp.float32),
        min_p=jnp.full((count,), min_p, jnp.float32),
        seed=jnp.zeros((count, 2), jnp.uint32),
        sample=jnp.zeros((count,), jnp.uint32),
    )
    return np.asarray(filtered(jnp.asarray(LOGITS), rows))


def probabilities(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    weights = np.exp(scores.astype(np.float64) - scores.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


@pytest.mark.requirement("WORKER-4700")
@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), SETTINGS)
def test_the_same_tokens_are_kept_with_the_same_probabilities(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    expected, got = theirs(temperature, top_k, top_p, min_p), ours(temperature, top_k, top_p, min_p)
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected))
    np.testing.assert_allclose(probabilities(got), probabilities(expected), rtol=2e-5, atol=1e-9)


def test_the_settings_filter_much_and_little() -> None:
    kept = {int(count) for setting in SETTINGS for count in np.isfinite(theirs(*setting)).sum(axis=-1)}
    assert {1, VOCABULARY} <= kept
    assert len(kept) > 20
