"""Whatever decides a Llama's logits: when it is wrong, parity with ``transformers`` is visibly gone.

Proves that the parity tests can see each configuration field and each array, and that no field was forgotten.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from orcd_jax.engine.state import EngineShape
from orcd_jax.models.config import LlamaConfig, RopeScaling
from orcd_jax.models.registry import Params, abstract_params
from orcd_jax.models.rope import inverse_frequencies
from tests.engine.tiny import LogitsDriver
from tests.parity import transformers_llama
from tests.parity.transformers_llama import LINEAR, LLAMA3, YARN, variant

pytestmark = pytest.mark.parity

SHAPE = EngineShape(rows=1, block_tokens=48, prefill_blocks=1, page_tokens=16, pages=3, pages_per_job=3)
TOKENS = [int(t) for t in np.random.default_rng(11).integers(0, 256, 48)]
TOLERANCE = 1e-4  # the widest bound of the float32 parity tests, as a share of the largest logit
BASE = variant(num_layers=1)
BIASED = variant(num_layers=1, attention_bias=True, mlp_bias=True)
YARN_OWN_FACTOR = YARN.model_copy(update={"attention_factor": 0.6})


@functools.cache
def reference(config: LlamaConfig) -> tuple[NDArray[np.float32], Params]:
    """transformers' logits of a random model of this configuration, and its weights in our layout."""
    with tempfile.TemporaryDirectory() as directory:
        transformers_llama.save_loud_model(config, Path(directory))
        model = transformers_llama.load(Path(directory), "float32")
        arrays = transformers_llama.placed(model, config)
        return transformers_llama.logits(model, TOKENS), {path: jnp.asarray(a) for path, a in arrays.items()}


def distance(config: LlamaConfig, params: Params, expected: NDArray[np.float32]) -> float:
    """Largest difference of any logit, as a share of the largest logit."""
    ours = LogitsDriver(config, SHAPE, params).prefill([(TOKENS, 0, [2, 0, 1])])[0]
    return float(np.abs(ours - expected).max() / np.abs(expected).max())


def scaled(kind: RopeScaling) -> LlamaConfig:
    return variant(num_layers=1, head_dim=16, rope_scaling=kind)


# What is right, and what it is taken for. Rotary frequencies are recomputed from the wrong configuration.
WRONG_CONFIG: dict[str, tuple[LlamaConfig, dict[str, object]]] = {
    "norm_eps": (BASE, {"norm_eps": BASE.norm_eps * 1.1}),
    "rope_theta": (BASE, {"rope_theta": BASE.rope_theta * 1.1}),
    "rope_scaling": (scaled(LINEAR), {"rope_scaling": None}),
    "attention_bias": (BIASED, {"attention_bias": False}),
    "mlp_bias": (BIASED, {"mlp_bias": False}),
    "tied_embeddings": (BASE, {"tied_embeddings": True}),
}
WRONG_SCALING: dict[str, tuple[RopeScaling, RopeScaling]] = {
    "kind": (YARN, LINEAR),
    "factor": (LINEAR, LINEAR.model_copy(update={"factor": 2.6})),
    "factor of llama3": (LLAMA3, LLAMA3.model_copy(update={"factor": 4.2})),
    "factor of yarn": (YARN_OWN_FACTOR, YARN_OWN_FACTOR.model_copy(update={"factor": 4.2})),
    "original_context": (LLAMA3, LLAMA3.model_copy(update={"original_context": 34})),
    "original_context of yarn": (YARN, YARN.model_copy(update={"original_context": 64})),
    "low_freq_factor": (LLAMA3, LLAMA3.model_copy(update={"low_freq_factor": 1.1})),
    "high_freq_factor": (LLAMA3, LLAMA3.model_copy(update={"high_freq_factor": 4.2})),
    "beta_fast": (YARN, YARN.model_copy(update={"beta_fast": 2.0})),
    "beta_slow": (YARN, YARN.model_copy(update={"beta_slow": 1.0})),
    "attention_factor": (YARN_OWN_FACTOR, YARN_OWN_FACTOR.model_copy(update={"attention_factor": 0.61})),
    "attention_factor left out": (YARN, YARN.model_copy(update={"attention_factor": 1.0})),
    "truncate": (YARN, YARN.model_copy(update={"truncate": False})),
}
# A wrong value of these does not fit the arrays, so that it cannot pass unseen.
SHAPES = {
    "vocab_size": 264,
    "hidden_size": 36,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 10,
    "mlp_size": 45,
    "tied_embeddings": True,
    "attention_bias": True,
    "mlp_bias": True,
    "dtype": "bfloat16",
}
INERT = {
    "architecture": "names the family",
    "context_max": "a limit the scheduler holds, not a term of any formula",
}


def test_every_field_of_the_configuration_is_accounted_for() -> None:
    seen = set(WRONG_CONFIG) | set(SHAPES) | set(INERT)
    assert seen == set(LlamaConfig.model_fields)
    assert {name.split(" ")[0] for name in WRONG_SCALING} == set(RopeScaling.model_fields)


@pytest.mark.parametrize("index", range(6))
def test_what_is_right_has_parity(index: int) -> None:
    config = [BASE, BIASED, *map(scaled, (LINEAR, LLAMA3, YARN, YARN_OWN_FACTOR))][index]
    expected, params = reference(config)
    assert distance(config, params, expected) < TOLERANCE


@pytest.mark.parametrize("name", WRONG_CONFIG)
def test_a_wrong_field_breaks_parity(name: str) -> None:
    config, changes = WRONG_CONFIG[name]
    expected, params = reference(config)
    wrong = config.model_copy(update=changes)
    kept = {path: params[path] for path in abstract_params(wrong)}
    assert distance(wrong, {**kept, **frequencies(wrong)}, expected) > 10 * TOLERANCE


@pytest.mark.parametrize("name", WRONG_SCALING)
def test_a_wrong_field_of_the_rope_scaling_breaks_parity(name: str) -> None:
    right, wrong_scaling = WRONG_SCALING[name]
    expected, params = reference(scaled(right))
    wrong = scaled(wrong_scaling)
    assert distance(wrong, {**params, **frequencies(wrong)}, expected) > 10 * TOLERANCE


@pytest.mark.parametrize("name", SHAPES)
def test_a_wrong_size_does_not_fit_the_arrays(name: str) -> None:
    wrong = BASE.model_copy(update={name: SHAPES[name]})
    assert abstract_params(wrong) != abstract_params(BASE)


@pytest.mark.parametrize("path", sorted(abstract_params(BIASED)))
def test_each_array_reaches_the_logits(path: str) -> None:
    """Five per cent more in one array is seen."""
    expected, params = reference(BIASED)
    assert distance(BIASED, {**params, path: params[path] * 1.05}, expected) > 10 * TOLERANCE


def swapped(array: NDArray[np.float32], first: int, second: int) -> NDArray[np.float32]:
    order = np.arange(len(array))
    order[[first, second]] = order[[second, first]]
    return array[order]


def _heads(change: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> Callable[[Params], Params]:
    """A change of qkv, seen as [kv_heads, heads of the group and k and v, head_dim, hidden]."""

    def apply(params: Params) -> Params:
        path = "layers.0.attention.qkv"
        qkv = np.asarray(params[path]).reshape(BASE.num_kv_heads, -1, BASE.head_dim, BASE.hidden_size)
        return {**params, path: jnp.asarray(change(qkv).reshape(params[path].shape))}

    return apply


def _interleaved(qkv: NDArray[np.float32]) -> NDArray[np.float32]:
    """Query and key rows in the pairwise order that GGUF files store."""
    order = np.arange(BASE.head_dim).reshape(2, -1).T.reshape(-1)
    return np.concatenate([qkv[:, :-1][:, :, order], qkv[:, -1:]], axis=1)


def _up_for_gate(params: Params) -> Params:
    path = "layers.0.mlp.gate_up"
    return {**params, path: params[path][::-1]}


MISPLACED: dict[str, Callable[[Params], Params]] = {
    "the two KV heads": _heads(lambda qkv: swapped(qkv, 0, 1)),
    "two query heads of one group": _heads(lambda qkv: np.stack([swapped(head, 0, 1) for head in qkv])),
    "keys for values": _heads(lambda qkv: np.stack([swapped(head, 2, 3) for head in qkv])),
    "interleaved rotary pairs": _heads(_interleaved),
    "up for gate": _up_for_gate,
}


@pytest.mark.parametrize("name", MISPLACED)
def test_misplaced_weights_break_parity(name: str) -> None:
    expected, params = reference(BASE)
    assert distance(BASE, MISPLACED[name](params), expected) > 10 * TOLERANCE


@pytest.mark.parametrize("path", ["layers.0.attention.norm", "layers.0.mlp.down", "norm"])
def test_the_reference_itself_is_loud(path: str) -> None:
    """Weights near transformers' own initialisation would hide mistakes."""
    _, params = reference(BASE)
    assert float(jnp.std(params[path])) > 0.2


def frequencies(config: LlamaConfig) -> Params:
    return {"rope_frequencies": jnp.asarray(inverse_frequencies(config)[0])}
