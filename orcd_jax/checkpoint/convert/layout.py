"""From Hugging Face's tensors to device layout: which arrays a checkpoint holds and how each is made.

The layout itself is declared by the modules in ``models`` (``docs/architecture.md`` explains it); this is the only
place that knows both it and the names of the source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orcd_jax.models.config import LlamaConfig
from orcd_jax.models.rope import inverse_frequencies

Tensors = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class Leaf:
    """How one array of the tree is made.

    Attributes:
      sources: name and shape of each source tensor it is made of.
      build: makes it from those tensors, by name; keeps their dtype.
    """

    sources: Mapping[str, tuple[int, ...]]
    build: Callable[[Tensors], NDArray[np.generic]]


def leaves(config: LlamaConfig) -> dict[str, Leaf]:
    """Every array of a Llama's checkpoint, by path."""
    c = config
    found = {
        "embed": _same("model.embed_tokens.weight", c.vocab_size, c.hidden_size),
        "norm": _same("model.norm.weight", c.hidden_size),
        "rope_frequencies": Leaf({}, lambda _: inverse_frequencies(c)[0]),
    }
    if not c.tied_embeddings:
        found["head"] = _same("lm_head.weight", c.vocab_size, c.hidden_size)
    for layer in range(c.num_layers):
        found |= _attention(c, f"layers.{layer}.attention", f"model.layers.{layer}")
        found |= _mlp(c, f"layers.{layer}.mlp", f"model.layers.{layer}")
    return found


def _attention(c: LlamaConfig, ours: str, theirs: str) -> dict[str, Leaf]:
    rows = {"q": c.num_heads * c.head_dim, "k": c.num_kv_heads * c.head_dim, "v": c.num_kv_heads * c.head_dim}

    def fused(kind: str, *rest: int) -> Leaf:
        names = {part: f"{theirs}.self_attn.{part}_proj.{kind}" for part in rows}

        def build(tensors: Tensors) -> NDArray[np.generic]:
            # Per KV head: its query heads, its key, its value; so a split over KV heads cuts whole heads.
            parts = [tensors[name].reshape(c.num_kv_heads, -1, *rest) for name in names.values()]
            return np.concatenate(parts, axis=1)

        return Leaf({name: (rows[part], *rest) for part, name in names.items()}, build)

    def out(tensors: Tensors) -> NDArray[np.generic]:
        (weight,) = tensors.values()
        return weight.T.reshape(c.num_kv_heads, c.query_heads_per_kv * c.head_dim, c.hidden_size)

    found = {
        f"{ours}.norm": _same(f"{theirs}.input_layernorm.weight", c.hidden_size),
        f"{ours}.qkv": fused("weight", c.hidden_size),
        f"{ours}.out": Leaf({f"{theirs}.self_attn.o_proj.weight": (c.hidden_size, rows["q"])}, out),
    }
    if c.attention_bias:
        found[f"{ours}.qkv_bias"] = fused("bias")
        found[f"{ours}.out_bias"] = _same(f"{theirs}.self_attn.o_proj.bias", c.hidden_size)
    return found


def _mlp(c: LlamaConfig, ours: str, theirs: str) -> dict[str, Leaf]:
    def stacked(kind: str, *rest: int) -> Leaf:
        gate, up = (f"{theirs}.mlp.{part}_proj.{kind}" for part in ("gate", "up"))
        shape = (c.mlp_size, *rest)
        return Leaf({gate: shape, up: shape}, lambda tensors: np.stack([tensors[gate], tensors[up]]))

    def transposed(tensors: Tensors) -> NDArray[np.generic]:
        (weight,) = tensors.values()
        return weight.T

    found = {
        f"{ours}.norm": _same(f"{theirs}.post_attention_layernorm.weight", c.hidden_size),
        f"{ours}.gate_up": stacked("weight", c.hidden_size),
        f"{ours}.down": Leaf({f"{theirs}.mlp.down_proj.weight": (c.hidden_size, c.mlp_size)}, transposed),
    }
    if c.mlp_bias:
        found[f"{ours}.gate_up_bias"] = stacked("bias")
        found[f"{ours}.down_bias"] = _same(f"{theirs}.mlp.down_proj.bias", c.hidden_size)
    return found


def _same(name: str, *shape: int) -> Leaf:
    return Leaf({name: shape}, lambda tensors: tensors[name])
