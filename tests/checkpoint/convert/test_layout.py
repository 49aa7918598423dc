"""Where each row of a source's matrices lies in device layout, one head and one row at a time.

The whole layout is compared with ``transformers`` in ``tests/models/test_llama_parity.py``; this needs no torch.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from orcd_jax.checkpoint.convert.layout import leaves
from orcd_jax.models.registry import abstract_params
from tests.checkpoint.tiny import config, random_weights

MADE = config(attention_bias=True, mlp_bias=True, num_layers=2)
WEIGHTS = random_weights(MADE)
HEADS, KV_HEADS, SIZE = MADE.num_heads, MADE.num_kv_heads, MADE.head_dim
GROUP = HEADS // KV_HEADS


def built(path: str) -> NDArray[np.generic]:
    leaf = leaves(MADE)[path]
    return leaf.build({name: WEIGHTS[name] for name in leaf.sources})


def weight(name: str, layer: int = 1) -> NDArray[np.generic]:
    return WEIGHTS[f"model.layers.{layer}.{name}"]


def rows(array: NDArray[np.generic], head: int) -> NDArray[np.generic]:
    return array[head * SIZE : (head + 1) * SIZE]


@pytest.mark.parametrize(("path", "kind"), [("qkv", "weight"), ("qkv_bias", "bias")])
def test_each_kv_head_has_its_queries_then_its_key_then_its_value(path: str, kind: str) -> None:
    fused = built(f"layers.1.attention.{path}")
    q, k, v = (weight(f"self_attn.{part}_proj.{kind}") for part in "qkv")
    for kv_head in range(KV_HEADS):
        expected = [rows(q, kv_head * GROUP + n) for n in range(GROUP)] + [rows(k, kv_head), rows(v, kv_head)]
        for place, head in enumerate(expected):
            np.testing.assert_array_equal(rows(fused[kv_head], place), head)


def test_the_output_projection_takes_the_heads_of_each_kv_head() -> None:
    out, stored = built("layers.1.attention.out"), weight("self_attn.o_proj.weight")
    for head in range(HEADS):
        kv_head, place = divmod(head, GROUP)
        np.testing.assert_array_equal(rows(out[kv_head], place), rows(stored.T, head))


@pytest.mark.parametrize(("path", "kind"), [("gate_up", "weight"), ("gate_up_bias", "bias")])
def test_gate_comes_before_up(path: str, kind: str) -> None:
    fused = built(f"layers.1.mlp.{path}")
    np.testing.assert_array_equal(fused[0], weight(f"mlp.gate_proj.{kind}"))
    np.testing.assert_array_equal(fused[1], weight(f"mlp.up_proj.{kind}"))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("attention.norm", "input_layernorm.weight"),
        ("attention.out_bias", "self_attn.o_proj.bias"),
        ("mlp.norm", "post_attention_layernorm.weight"),
        ("mlp.down_bias", "mlp.down_proj.bias"),
    ],
)
def test_vectors_stay_as_they_are(path: str, name: str) -> None:
    np.testing.assert_array_equal(built(f"layers.1.{path}"), weight(name))


def test_down_is_transposed() -> None:
    np.testing.assert_array_equal(built("layers.1.mlp.down"), weight("mlp.down_proj.weight").T)


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_built_is_what_the_model_declares(tied: bool) -> None:
    made = MADE.model_copy(update={"tied_embeddings": tied})
    declared = {path: leaf.shape for path, leaf in abstract_params(made).items()}
    assert {path: built(path).shape for path in leaves(made)} == declared


def test_every_source_tensor_is_used_once() -> None:
    used = [name for leaf in leaves(MADE).values() for name in leaf.sources]
    assert len(used) == len(set(used)) == len(WEIGHTS)
