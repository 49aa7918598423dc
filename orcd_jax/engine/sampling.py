"""Choosing the next token, inside the compiled step: bit-exact per row whatever the other rows hold.

The noise of one candidate is a function of (seed, sample, position, token id) alone: Gumbel noise from threefry2x32
counters (Salmon et al., SC'11), keyed by the request's 64-bit seed, folded with sample index and position, counted by
token id. So a request's draw does not depend on its row, its neighbours, the batch or the vocabulary's padding.

Filters search their threshold by bisection over the order of float32 values, not by sorting: 32 reductions of the
vocabulary, no scatter, ties kept together.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class SamplingRows:
    """Sampling parameters of ``N`` rows, on the device. See ``request.SamplingParams`` for their meaning."""

    temperature: Float[Array, " N"]
    top_k: Int[Array, " N"]
    top_p: Float[Array, " N"]
    min_p: Float[Array, " N"]
    seed: UInt32[Array, "N 2"]
    sample: UInt32[Array, " N"]


def choose(logits: Float[Array, "N V"], positions: Int[Array, " N"], rows: SamplingRows) -> Int[Array, " N"]:
    """The next token of each row.

    Args:
      logits: float32.
      positions: the position the chosen token will have.
      rows: parameters; ``temperature`` 0 takes the arg max, lowest id on a tie.

    Returns:
      Token ids; -1 where a logit is not a number, so that a broken model is noticed.
    """
    random = rows.temperature > 0
    highest = logits.max(axis=-1, keepdims=True)

    def draw(logits: Array) -> Array:
        # From the highest down: the quotient of a tiny temperature may only overflow to -inf.
        scaled = (logits - highest) / jnp.where(random, rows.temperature, jnp.float32(1))[:, None]
        scores = keep_likely(scaled, rows)
        noisy = scores + gumbel_noise(rows.seed, rows.sample, positions, logits.shape[1])
        return jnp.where(random[:, None], noisy, logits)

    tokens = jnp.argmax(jax.lax.cond(random.any(), draw, lambda x: x, logits), axis=-1).astype(jnp.int32)
    return jnp.where(jnp.isnan(highest[:, 0]), jnp.int32(-1), tokens)


def gumbel_noise(
    seed: UInt32[Array, "N 2"], sample: UInt32[Array, " N"], positions: Int[Array, " N"], vocab_size: int
) -> Float[Array, "N V"]:
    """Standard Gumbel noise for each (row, token id); always finite."""

    def one(words: Array, sample: Array, position: Array) -> Array:
        key = jax.random.wrap_key_data(words, impl="threefry2x32")
        key = jax.random.fold_in(jax.random.fold_in(key, sample), position.astype(jnp.uint32))
        return jax.random.bits(key, (vocab_size,), jnp.uint32)

    bits = jax.vmap(one)(seed, sample, positions)
    # 23 bits and a half step: uniform is in (0, 1) strictly, so both logarithms are finite.
    uniform = ((bits >> jnp.uint32(9)).astype(jnp.float32) + jnp.float32(0.5)) * jnp.float32(2.0**-23)
    return -jnp.log(-jnp.log(uniform))


def keep_likely(scaled: Float[Array, "N V"], rows: SamplingRows) -> Float[Array, "N V"]:
    """Applies top_k, then top_p, then min_p to logits already divided by the temperature; the rest becomes -inf."""
    random = rows.temperature > 0
    by_k = random & (rows.top_k > 0)
    by_p = random & (rows.top_p < 1)

    def top_k(x: Array) -> Array:
        wanted = jnp.where(by_k, rows.top_k, x.shape[1]).astype(jnp.float32)[:, None]
        return _keep_while(x, jnp.ones_like(x), wanted)

    def top_p(x: Array) -> Array:
        probability = jax.nn.softmax(x, axis=-1)
        wanted = jnp.where(by_p, rows.top_p, jnp.float32(0))[:, None]
        return jnp.where(by_p[:, None], _keep_while(x, probability, wanted), x)

    scaled = jax.lax.cond(by_k.any(), top_k, lambda x: x, scaled)
    scaled = jax.lax.cond(by_p.any(), top_p, lambda x: x, scaled)
    floor = scaled.max(axis=-1, keepdims=True) + jnp.log(rows.min_p)[:, None]
    return jnp.where((rows.min_p > 0)[:, None] & (scaled < floor), -jnp.inf, scaled)


def _keep_while(
    x: Float[Array, "N V"], weight: Float[Array, "N V"], wanted: Float[Array, "N 1"]
) -> Float[Array, "N V"]:
    """Keeps the largest values of each row, as few as have a summed weight of at least ``wanted`` (ties together).

    Finds the largest threshold ``t`` with ``sum(weight[x >= t]) >= wanted``, one bit of ``t`` at a time.
    """
    order = _ordered(x)

    def next_bit(index: Array, threshold: Array) -> Array:
        candidate = threshold | (jnp.uint32(1) << (jnp.uint32(31) - index.astype(jnp.uint32)))
        mass = jnp.where(order >= candidate, weight, jnp.float32(0)).sum(axis=-1, keepdims=True)
        return jnp.where(mass >= wanted, candidate, threshold)

    threshold = jax.lax.fori_loop(0, 32, next_bit, jnp.zeros((x.shape[0], 1), jnp.uint32))
    kept: Bool[Array, "N V"] = order >= threshold
    return jnp.where(kept, x, -jnp.inf)


def _ordered(x: Float[Array, "N V"]) -> UInt32[Array, "N V"]:
    """Maps float32 to uint32 so that the order of the numbers is kept; both zeros are one number."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, jnp.float32(0), x), jnp.uint32)
    return jnp.where(bits >> jnp.uint32(31) == 1, ~bits, bits | jnp.uint32(1 << 31))
