"""Layers shared by every family: small Flax modules over arrays in device layout.

``T`` is tokens of one call, whatever they belong to; ``D`` hidden size, ``K`` KV heads, ``G`` query heads per KV
head, ``H`` head_dim, ``F`` MLP size, ``V`` vocabulary. The sharded axis of a weight is outermost, so any shard is
contiguous: column-parallel weights are [..., out, in], row-parallel ones [in, out].
"""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from orcd_jax.models.config import LlamaConfig


class Attend(Protocol):
    """Stores a layer's new keys and values and attends over everything the tokens may see.

    Implemented over paged KV by ``orcd_jax.engine.programs``.
    """

    def __call__(
        self, layer: int, q: Float[Array, "T K G H"], k: Float[Array, "T K H"], v: Float[Array, "T K H"]
    ) -> Float[Array, "T K G H"]:
        """Attention output for every token of the call, in ``q``'s dtype."""
        ...


class Table(nnx.Variable[jax.Array]):
    """An array that is not learned (rotary frequencies) but is sealed with the weights and passed as an argument."""


def dot(x: Float[Array, "T I"], weight: Float[Array, "I O"]) -> Float[Array, "T O"]:
    """``x @ weight``. float32 is computed in float32 everywhere: no TF32 on GPUs."""
    return jax.lax.dot(x, weight, precision=_precision(x))


def dot_transposed(x: Float[Array, "T I"], weight: Float[Array, "O I"]) -> Float[Array, "T O"]:
    """``x @ weight.T`` without a transpose in memory: both operands contract their last axis."""
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), precision=_precision(x))


def _precision(x: Array) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def rms_norm(x: Float[Array, "T D"], scale: Float[Array, " D"], epsilon: float) -> Float[Array, "T D"]:
    """RMSNorm (arXiv:1910.07467). The mean is taken in float32: bfloat16 squares lose small components."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + jnp.float32(epsilon))
    return normed.astype(x.dtype) * scale[None, :]


def rotate(
    x: Float[Array, "T N H"], cosines: Float[Array, "T H/2"], sines: Float[Array, "T H/2"]
) -> Float[Array, "T N H"]:
    """Rotary positions in the half-split form (pairs are x[i], x[i + H/2]), in float32 (arXiv:2104.09864)."""
    half = x.shape[-1] // 2
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    c, s = cosines[:, None, :], sines[:, None, :]
    return jnp.concatenate([first * c - second * s, second * c + first * s], axis=-1).astype(x.dtype)


def rope_angles(
    frequencies: Float[Array, " H/2"], positions: Int[Array, " T"], factor: float
) -> tuple[Float[Array, "T H/2"], Float[Array, "T H/2"]]:
    """Cosines and sines of ``position * frequency``, times yarn's attention factor."""
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.cos(angles) * jnp.float32(factor), jnp.sin(angles) * jnp.float32(factor)


class GroupedAttention(nnx.Module):
    """Pre-normed attention with ``G`` query heads per KV head; one fused projection for q, k and v."""

    def __init__(self, config: LlamaConfig, dtype: jnp.dtype) -> None:
        kv_heads, group, head_dim, hidden = (
            config.num_kv_heads,
            config.query_heads_per_kv,
            config.head_dim,
            config.hidden_size,
        )
        self.config = config
        self.norm = nnx.Param(jnp.zeros((hidden,), dtype))
        self.qkv = nnx.Param(jnp.zeros((kv_heads, (group + 2) * head_dim, hidden), dtype))
        self.out = nnx.Param(jnp.zeros((kv_heads, group * head_dim, hidden), dtype))
        if config.attention_bias:
            self.qkv_bias = nnx.Param(jnp.zeros((kv_heads, (group + 2) * head_dim), dtype))
            self.out_bias = nnx.Param(jnp.zeros((hidden,), dtype))

    def __call__(
        self,
        x: Float[Array, "T D"],
        angles: tuple[Float[Array, "T H/2"], Float[Array, "T H/2"]],
        layer: int,
        attend: Attend,
    ) -> Float[Array, "T D"]:
        """What the layer adds to the residual stream."""
        c, tokens = self.config, x.shape[0]
        kv_heads, group, head_dim = c.num_kv_heads, c.query_heads_per_kv, c.head_dim
        h = rms_norm(x, self.norm[...], c.norm_eps)
        qkv = dot_transposed(h, self.qkv[...].reshape(-1, c.hidden_size))
        if c.attention_bias:
            qkv = qkv + self.qkv_bias[...].reshape(1, -1)
        heads = qkv.reshape(tokens, kv_heads, group + 2, head_dim)
        q = heads[:, :, :group].reshape(tokens, kv_heads * group, head_dim)
        q = rotate(q, *angles).reshape(tokens, kv_heads, group, head_dim)
        k = rotate(heads[:, :, group], *angles)
        attended = attend(layer, q, k, heads[:, :, group + 1])
        out = dot(attended.reshape(tokens, -1), self.out[...].reshape(-1, c.hidden_size))
        return out + self.out_bias[...][None, :] if c.attention_bias else out


class GatedMlp(nnx.Module):
    """Pre-normed SwiGLU (arXiv:2002.05202): ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: LlamaConfig, dtype: jnp.dtype) -> None:
        hidden, width = config.hidden_size, config.mlp_size
        self.config = config
        self.norm = nnx.Param(jnp.zeros((hidden,), dtype))
        self.gate_up = nnx.Param(jnp.zeros((2, width, hidden), dtype))
        self.down = nnx.Param(jnp.zeros((width, hidden), dtype))
        if config.mlp_bias:
            self.gate_up_bias = nnx.Param(jnp.zeros((2, width), dtype))
            self.down_bias = nnx.Param(jnp.zeros((hidden,), dtype))

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """What the layer adds to the residual stream."""
        c = self.config
        h = rms_norm(x, self.norm[...], c.norm_eps)
        gate_up = dot_transposed(h, self.gate_up[...].reshape(-1, c.hidden_size))
        if c.mlp_bias:
            gate_up = gate_up + self.gate_up_bias[...].reshape(1, -1)
        gated = jax.nn.silu(gate_up[:, : c.mlp_size]) * gate_up[:, c.mlp_size :]
        out = dot(gated, self.down[...])
        return out + self.down_bias[...][None, :] if c.mlp_bias else out
