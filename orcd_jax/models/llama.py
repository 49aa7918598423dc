"""The Llama family: pre-normed grouped attention and SwiGLU, rotary positions, tied or untied head."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from orcd_jax.models.config import LlamaConfig
from orcd_jax.models.layers import Attend, GatedMlp, GroupedAttention, Table, dot_transposed, rms_norm, rope_angles
from orcd_jax.models.rope import attention_factor


class Layer(nnx.Module):
    """One block: attention, then MLP, each added to the residual stream."""

    def __init__(self, config: LlamaConfig, dtype: jnp.dtype) -> None:
        self.attention = GroupedAttention(config, dtype)
        self.mlp = GatedMlp(config, dtype)


class Llama(nnx.Module):
    """A Llama-style decoder. Built under ``nnx.eval_shape`` only: it describes arrays and never owns any."""

    def __init__(self, config: LlamaConfig) -> None:
        dtype = jnp.dtype(config.dtype)
        self.config = config
        self.embed = nnx.Param(jnp.zeros((config.vocab_size, config.hidden_size), dtype))
        self.layers = nnx.List([Layer(config, dtype) for _ in range(config.num_layers)])
        self.norm = nnx.Param(jnp.zeros((config.hidden_size,), dtype))
        if not config.tied_embeddings:
            self.head = nnx.Param(jnp.zeros((config.vocab_size, config.hidden_size), dtype))
        self.rope_frequencies = Table(jnp.zeros((config.head_dim // 2,), jnp.float32))

    def hidden(self, tokens: Int[Array, " T"], positions: Int[Array, " T"], attend: Attend) -> Float[Array, "T D"]:
        """The residual stream after the last layer, before the final norm.

        Args:
          tokens: ids; out-of-range ones are clamped on the device (the host has refused them before).
          positions: each token's place in its own sequence, from 0.
          attend: stores keys and values and attends; called once a layer, in order.
        """
        x = self.embed[...].at[tokens].get(mode="clip")
        angles = rope_angles(self.rope_frequencies[...], positions, attention_factor(self.config))
        for index, layer in enumerate(self.layers):
            x = x + layer.attention(x, angles, index, attend)
            x = x + layer.mlp(x)
        return x

    def logits(self, hidden: Float[Array, "T D"]) -> Float[Array, "T V"]:
        """Scores of every token of the vocabulary, float32."""
        weight = self.embed if self.config.tied_embeddings else self.head
        return dot_transposed(rms_norm(hidden, self.norm[...], self.config.norm_eps), weight[...]).astype(jnp.float32)
