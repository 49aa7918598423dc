"""The reference attention over pages equals dense softmax attention, at every edge a page or a chunk has."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orcd_jax.kernels.paged_attention import CHUNK_TOKENS, attend_pages, write_pages

KV, GROUP, DIM, PAGE = 2, 3, 8, 16


def case(
    lengths: list[int], queries: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sequences whose last ``queries`` tokens ask; pages are scattered and everything unwritten is NaN."""
    rng = np.random.default_rng(seed)
    most = -(-max(lengths) // PAGE)
    pages = len(lengths) * most + 3
    keys = np.full((pages, KV, PAGE, DIM), np.nan, np.float32)
    values = keys.copy()
    table = rng.permutation(pages)[: len(lengths) * most].reshape(len(lengths), most).astype(np.int32)
    dense = []
    for i, n in enumerate(lengths):
        k, v = rng.normal(size=(2, n, KV, DIM)).astype(np.float32)
        for at in range(n):
            keys[table[i, at // PAGE], :, at % PAGE] = k[at]
            values[table[i, at // PAGE], :, at % PAGE] = v[at]
        dense.append((k, v))
    q = rng.normal(size=(len(lengths), queries, KV, GROUP, DIM)).astype(np.float32)
    positions = np.stack([np.arange(n - queries, n, dtype=np.int32) for n in lengths])
    expected = np.zeros_like(q)
    for i, (k, v) in enumerate(dense):
        for j in range(queries):
            seen = positions[i, j] + 1
            scores = np.einsum("kgd,skd->kgs", q[i, j].astype(np.float64), k[:seen]) / np.sqrt(DIM)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            expected[i, j] = np.einsum("kgs,skd->kgd", weights / weights.sum(-1, keepdims=True), v[:seen])
    return q, keys, values, table, positions, expected


EDGES = [1, PAGE - 1, PAGE, PAGE + 1, CHUNK_TOKENS - 1, CHUNK_TOKENS, CHUNK_TOKENS + 1, 2 * CHUNK_TOKENS + 5]


@pytest.mark.parametrize("length", EDGES)
def test_one_query_equals_dense_attention(length: int) -> None:
    q, keys, values, table, positions, expected = case([length, 3, 700], queries=1)
    np.testing.assert_allclose(jax.jit(attend_pages)(q, keys, values, table, positions), expected, atol=2e-6)


def test_a_block_of_queries_equals_dense_causal_attention() -> None:
    q, keys, values, table, positions, expected = case([40, 33, 300], queries=33)
    np.testing.assert_allclose(jax.jit(attend_pages)(q, keys, values, table, positions), expected, atol=2e-6)


def test_a_query_that_sees_nothing_gets_zero_and_disturbs_nobody() -> None:
    q, keys, values, table, positions, expected = case([40, 20], queries=1)
    positions[1] = -1
    got = np.asarray(jax.jit(attend_pages)(q, keys, values, table, positions))
    np.testing.assert_allclose(got[0], expected[0], atol=2e-6)
    assert not got[1].any()


def test_bfloat16_stays_within_its_rounding() -> None:
    q, keys, values, table, positions, expected = case([300, 77], queries=1)
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in (q, keys, values)]
    got = np.asarray(
        attend_pages(narrow[0], narrow[1], narrow[2], jnp.asarray(table), jnp.asarray(positions)).astype(jnp.float32)
    )
    np.testing.assert_allclose(got, expected, atol=0.02)


@pytest.mark.requirement("WORKER-4413")
def test_writes_beyond_the_pool_are_dropped() -> None:
    pages = jnp.zeros((2, KV, PAGE, DIM), jnp.float32)
    new = jnp.ones((3, KV, DIM), jnp.float32)
    written = np.asarray(write_pages(pages, new, jnp.asarray([1, 2, 9], jnp.int32), jnp.asarray([4, 0, 0], jnp.int32)))
    assert written.sum() == KV * DIM
    assert (written[1, :, 4] == 1).all()
