"""Models and sizes as abstract shapes: nothing is allocated."""

from __future__ import annotations

import math

from orcd_jax.config import BLOCK_TOKENS
from orcd_jax.engine.state import EngineShape
from orcd_jax.models.config import LlamaConfig
from orcd_jax.models.registry import abstract_params
from orcd_jax.residency.bounds import PAGE_TOKENS, Sizes

TINY = LlamaConfig(
    vocab_size=1000,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    mlp_size=160,
    norm_eps=1e-5,
    rope_theta=10_000.0,
    tied_embeddings=False,
    context_max=8192,
    dtype="float32",
)
LLAMA_8B = TINY.model_copy(
    update={
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "mlp_size": 14_336,
        "context_max": 131_072,
        "dtype": "bfloat16",
    }
)


def config(**changes: object) -> LlamaConfig:
    """``TINY`` with some fields changed, validated again."""
    return LlamaConfig.model_validate({**dict(TINY), **changes})


def sizes(slots: int, context: int, prefill: int) -> Sizes:
    return Sizes(slots_total=slots, max_context=context, prefill_tokens=prefill)


def engine_shape(sizes: Sizes) -> EngineShape:
    """What the engine runs at these sizes: every row can hold a job of full context."""
    pages = -(-sizes.max_context // PAGE_TOKENS)
    return EngineShape(
        rows=sizes.slots_total,
        block_tokens=BLOCK_TOKENS,
        prefill_blocks=sizes.prefill_tokens // BLOCK_TOKENS,
        page_tokens=PAGE_TOKENS,
        pages=sizes.slots_total * pages,
        pages_per_job=pages,
        context=sizes.max_context,
    )


def tensors(config: LlamaConfig) -> list[int]:
    """Bytes of each array."""
    return [math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in abstract_params(config).values()]
