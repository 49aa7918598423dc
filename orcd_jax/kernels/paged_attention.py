"""Attention over paged KV: the reference in plain JAX, used on every platform until a kernel replaces it.

Pages are ``[pages, kv_heads, page_tokens, head_dim]``: one head's page is contiguous. A page table row lists a job's
pages in order, so a token at position ``p`` lives in page ``table[p // page_tokens]`` at offset ``p % page_tokens``.

Batch invariance: every sequence is reduced over the same chunks of ``CHUNK_TOKENS`` keys in the same order. How many
chunks run depends on the longest sequence of the call, but a chunk past a sequence's end is an exact no-op for it
(maximum unchanged, weights exactly 0, rescaling exactly 1), so neighbours cannot change a bit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CHUNK_TOKENS = 256
_MASKED = -1e30  # finite: (-inf) - (-inf) would be NaN


def write_pages(
    pages: Float[Array, "P K S H"], new: Float[Array, "T K H"], page: Int[Array, " T"], offset: Int[Array, " T"]
) -> Float[Array, "P K S H"]:
    """Stores each token's vector at its place. A page id of ``P`` or more stores nothing (an idle token)."""
    return pages.at[page, :, offset].set(new, mode="drop")


def attend_pages(
    q: Float[Array, "N Q K G H"],
    keys: Float[Array, "P K S H"],
    values: Float[Array, "P K S H"],
    table: Int[Array, "N M"],
    positions: Int[Array, "N Q"],
) -> Float[Array, "N Q K G H"]:
    """Causal attention of ``Q`` queries of each of ``N`` sequences over the sequence's pages.

    Softmax in float32, online over chunks (arXiv:2112.05682). What lies past a query's position is never read into
    the result, even if it is NaN.

    Args:
      q: queries, not yet scaled.
      keys: one layer's pages.
      values: likewise.
      table: page ids; entries past a sequence's end may hold anything.
      positions: each query's position; it sees keys at positions up to and including its own. Negative: sees nothing,
        and its output is 0.
    """
    sequences, queries, kv_heads, group, head_dim = q.shape
    page_tokens = keys.shape[2]
    pages_a_chunk = max(1, min(CHUNK_TOKENS // page_tokens, table.shape[1]))
    chunk = pages_a_chunk * page_tokens
    padded = jnp.pad(table, ((0, 0), (0, -table.shape[1] % pages_a_chunk)))
    grouped = q.transpose(0, 2, 3, 1, 4).reshape(sequences, kv_heads, group * queries, head_dim)
    limits = jnp.tile(positions[:, None, None, :], (1, 1, group, 1)).reshape(sequences, 1, group * queries, 1)
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    def gather(source: Array, ids: Array) -> Array:
        taken: Array = source.at[ids].get(mode="clip")  # [N, C, K, S, H]
        return taken.transpose(0, 2, 1, 3, 4).reshape(sequences, kv_heads, chunk, head_dim)

    Carry = tuple[Array, Array, Array]

    def body(index: Array, carry: Carry) -> Carry:
        highest, total, out = carry
        ids = jax.lax.dynamic_slice_in_dim(padded, index * pages_a_chunk, pages_a_chunk, axis=1)
        at = index * chunk + jnp.arange(chunk, dtype=jnp.int32)
        seen = at[None, None, None, :] <= limits
        scores = jnp.einsum(
            "nkqd,nksd->nkqs", grouped, gather(keys, ids), precision=precision, preferred_element_type=jnp.float32
        )
        scores = jnp.where(seen, scores * jnp.float32(head_dim**-0.5), jnp.float32(_MASKED))
        peak = jnp.maximum(highest, scores.max(axis=-1, keepdims=True))
        weights = jnp.where(seen, jnp.exp(scores - peak), jnp.float32(0))
        keep = jnp.exp(highest - peak)
        written = jnp.where(
            (at[None, :] <= positions.max(axis=1, keepdims=True))[:, None, :, None], gather(values, ids), 0
        )
        added = jnp.einsum(
            "nkqs,nksd->nkqd",
            weights.astype(q.dtype),
            written,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return peak, total * keep + weights.sum(axis=-1, keepdims=True), out * keep + added

    rows = (sequences, kv_heads, group * queries)
    start: Carry = (
        jnp.full((*rows, 1), _MASKED, jnp.float32),
        jnp.zeros((*rows, 1), jnp.float32),
        jnp.zeros((*rows, head_dim), jnp.float32),
    )
    chunks = jnp.minimum((positions.max() + chunk) // chunk, padded.shape[1] // pages_a_chunk)
    _, total, out = jax.lax.fori_loop(jnp.int32(0), chunks.astype(jnp.int32), body, start)
    normed = out / jnp.where(total > 0, total, jnp.float32(1))
    per_query: Array = normed.reshape(sequences, kv_heads, group, queries, head_dim).transpose(0, 3, 1, 2, 4)
    return per_query.astype(q.dtype)
