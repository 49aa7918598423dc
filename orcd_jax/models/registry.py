"""From a configuration to a model: its module, its abstract arrays, its shard grid, what it demands of a worker.

One abstract tree serves conversion, memory planning, restore and compilation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Mapping

import jax
from flax import nnx

from orcd_jax.models.config import LlamaConfig
from orcd_jax.models.llama import Llama

Params = Mapping[str, jax.Array]
"""A model's arrays by dotted path: what crosses ``jax.jit``, what a checkpoint holds."""

MODELS: dict[str, type[Llama]] = {"llama": Llama}
POSITIONAL = ("rope", "rope_linear", "rope_llama3", "rope_yarn")
ATTENTION = ("mha", "gqa", "mqa")


def abstract_params(config: LlamaConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every array of the model, by path. Allocates nothing."""
    _, leaves = _describe(config)
    return {
        path: jax.ShapeDtypeStruct(leaf.get_value().shape, leaf.get_value().dtype) for path, (_, leaf) in leaves.items()
    }


def bind(config: LlamaConfig, params: Params) -> Llama:
    """The model with these arrays in place, for use inside a trace."""
    graph, leaves = _describe(config)
    placed = {path: leaf.replace(params[name]) for name, (path, leaf) in leaves.items()}
    model: Llama = nnx.merge(graph, nnx.from_flat_state(placed))  # type: ignore[arg-type]  # typed for variables only
    return model


@functools.lru_cache(maxsize=8)
def _describe(
    config: LlamaConfig,
) -> tuple[nnx.GraphDef[Llama], dict[str, tuple[tuple[Hashable, ...], nnx.Variable[jax.ShapeDtypeStruct]]]]:
    abstract = nnx.eval_shape(lambda: MODELS[config.architecture](config))
    graph, state = nnx.split(abstract)
    return graph, {".".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(state)}


# Which axis of each weight a tensor-parallel split cuts; names are a path's last component. All others are replicated.
_SHARD_AXIS = {
    "embed": 0,
    "head": 0,
    "qkv": 0,
    "qkv_bias": 0,
    "out": 0,
    "gate_up": 1,
    "gate_up_bias": 1,
    "down": 0,
}


def shard_grid(config: LlamaConfig, path: str) -> tuple[int | None, int]:
    """The canonical shard grid of one array: (axis, count).

    The count is the finest split every sharded array of a layer allows, ``gcd(kv_heads, mlp_size)``; an array it does
    not divide (an odd vocabulary) is whole: (None, 1).
    """
    axis = _SHARD_AXIS.get(path.rsplit(".", 1)[-1])
    count = math.gcd(config.num_kv_heads, config.mlp_size)
    if axis is None or count == 1:
        return None, 1
    if _describe(config)[1][path][1].get_value().shape[axis] % count:
        return None, 1
    return axis, count


def positional_kind(config: LlamaConfig) -> str:
    """The MCD's word for how positions enter the model."""
    return "rope" if config.rope_scaling is None else f"rope_{config.rope_scaling.kind}"


def attention_kind(config: LlamaConfig) -> str:
    """The MCD's word for how query heads share KV heads."""
    if config.num_kv_heads == config.num_heads:
        return "mha"
    return "mqa" if config.num_kv_heads == 1 else "gqa"
