"""From a configuration to abstract arrays: nothing allocated, every leaf in device layout, shards contiguous."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orcd_jax.models.config import LlamaConfig
from orcd_jax.models.registry import abstract_params, attention_kind, bind, positional_kind, shard_grid
from tests.engine.tiny import TINY

LLAMA_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_size=14_336,
    norm_eps=1e-5,
    rope_theta=500_000.0,
    tied_embeddings=False,
    context_max=131_072,
    dtype="bfloat16",
)


def test_describing_an_8b_model_allocates_nothing_and_counts_its_bytes() -> None:
    leaves = abstract_params(LLAMA_8B)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves.values())
    weights = sum(int(np.prod(x.shape)) for path, x in leaves.items() if path != "rope_frequencies")
    assert weights == 8_030_261_248


def test_every_leaf_has_its_device_layout() -> None:
    config = TINY.model_copy(update={"attention_bias": True, "mlp_bias": True, "num_layers": 1})
    shapes = {path: leaf.shape for path, leaf in abstract_params(config).items()}
    assert shapes == {
        "embed": (97, 32),
        "layers.0.attention.norm": (32,),
        "layers.0.attention.qkv": (2, 32, 32),
        "layers.0.attention.qkv_bias": (2, 32),
        "layers.0.attention.out": (2, 16, 32),
        "layers.0.attention.out_bias": (32,),
        "layers.0.mlp.norm": (32,),
        "layers.0.mlp.gate_up": (2, 48, 32),
        "layers.0.mlp.gate_up_bias": (2, 48),
        "layers.0.mlp.down": (48, 32),
        "layers.0.mlp.down_bias": (32,),
        "norm": (32,),
        "head": (97, 32),
        "rope_frequencies": (4,),
    }


def test_a_tied_model_has_no_head() -> None:
    assert "head" not in abstract_params(TINY.model_copy(update={"tied_embeddings": True}))


@pytest.mark.parametrize(
    ("path", "grid"),
    [
        ("embed", (0, 8)),
        ("head", (0, 8)),
        ("layers.0.attention.qkv", (0, 8)),
        ("layers.0.attention.out", (0, 8)),
        ("layers.0.mlp.gate_up", (1, 8)),
        ("layers.0.mlp.down", (0, 8)),
        ("layers.0.mlp.norm", (None, 1)),
        ("rope_frequencies", (None, 1)),
    ],
)
def test_the_shard_grid_is_the_finest_split_of_the_kv_heads(path: str, grid: tuple[int | None, int]) -> None:
    assert shard_grid(LLAMA_8B, path) == grid


def test_an_array_the_grid_does_not_divide_is_whole() -> None:
    assert shard_grid(TINY, "embed") == (None, 1)
    assert shard_grid(TINY, "layers.1.mlp.down") == (0, 2)


def test_binding_puts_each_array_in_its_place() -> None:
    params = {
        path: jnp.full(leaf.shape, index, leaf.dtype)
        for index, (path, leaf) in enumerate(abstract_params(TINY).items())
    }
    model = bind(TINY, params)
    at = list(params).index("layers.1.mlp.down")
    assert float(model.layers[1].mlp.down[...][0, 0]) == at


@pytest.mark.parametrize(("kv_heads", "kind"), [(4, "mha"), (2, "gqa"), (1, "mqa")])
def test_the_attention_kind_follows_from_the_heads(kv_heads: int, kind: str) -> None:
    assert attention_kind(TINY.model_copy(update={"num_kv_heads": kv_heads})) == kind


def test_the_positional_kind_names_the_scaling() -> None:
    assert positional_kind(TINY) == "rope"
