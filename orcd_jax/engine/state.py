"""The device state of a running engine: one pytree, one owner, donated to every program and replaced by its result."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from orcd_jax.engine.sampling import SamplingRows
from orcd_jax.models.config import LlamaConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineShape:
    """The fixed sizes every program is compiled for.

    Attributes:
      rows: places of ``decode``: jobs that run together.
      block_tokens: tokens of one prefill block, on the job's own grid from position 0.
      prefill_blocks: blocks of one ``prefill`` call, of one or several jobs.
      page_tokens: tokens of one KV page; divides block_tokens.
      pages: KV pages of each group.
      pages_per_job: most pages one job can hold: its most tokens / page_tokens, rounded up.
      context: most tokens of one job, prompt and output together, when that is less than its pages hold.
    """

    rows: int
    block_tokens: int = 128
    prefill_blocks: int
    page_tokens: int = 64
    pages: int
    pages_per_job: int
    context: int | None = None

    def __post_init__(self) -> None:
        sizes = (self.rows, self.block_tokens, self.prefill_blocks, self.page_tokens, self.pages, self.pages_per_job)
        if min(sizes) < 1:
            raise ValueError(f"every engine size must be at least 1: {self}")
        if self.block_tokens % self.page_tokens:
            raise ValueError(f"page_tokens {self.page_tokens} does not divide block_tokens {self.block_tokens}")

    @property
    def max_context(self) -> int:
        """Most tokens of one job, prompt and output together."""
        most = self.pages_per_job * self.page_tokens
        return most if self.context is None else min(self.context, most)


@dataclass(frozen=True, slots=True)
class KvGroup:
    """Layers that share page tables: same (window, kv_heads, head_dim, dtype)."""

    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int
    dtype: str
    window: int | None = None


def kv_groups(config: LlamaConfig) -> tuple[KvGroup, ...]:
    """The groups of a model's layers. A Llama has one."""
    return (
        KvGroup(
            layers=tuple(range(config.num_layers)),
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=config.dtype,
        ),
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class KvPages:
    """One group's pages, an array a layer: XLA updates separate arrays in place where a stacked one would be copied."""

    keys: tuple[Float[Array, "P K S H"], ...]
    values: tuple[Float[Array, "P K S H"], ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class DecodeState:
    """Everything that changes from step to step.

    Attributes:
      kv: pages of each group.
      tables: page table of each group: ``[rows, pages_per_job]``.
      tokens: each row's newest token, not yet in the KV cache.
      positions: that token's position.
      sampling: each row's parameters.
    """

    kv: tuple[KvPages, ...]
    tables: tuple[Int[Array, "rows M"], ...]
    tokens: Int[Array, " rows"]
    positions: Int[Array, " rows"]
    sampling: SamplingRows


def zero_state(config: LlamaConfig, shape: EngineShape) -> DecodeState:
    """An engine state in which no job has run. The ``init`` program traces it: its buffers are born on the device."""
    groups = kv_groups(config)

    def pages(group: KvGroup) -> tuple[Array, ...]:
        size = (shape.pages, group.kv_heads, shape.page_tokens, group.head_dim)
        return tuple(jnp.zeros(size, group.dtype) for _ in group.layers)

    rows = shape.rows
    return DecodeState(
        kv=tuple(KvPages(keys=pages(group), values=pages(group)) for group in groups),
        tables=tuple(jnp.zeros((rows, shape.pages_per_job), jnp.int32) for _ in groups),
        tokens=jnp.zeros((rows,), jnp.int32),
        positions=jnp.zeros((rows,), jnp.int32),
        sampling=SamplingRows(
            temperature=jnp.zeros((rows,), jnp.float32),
            top_k=jnp.zeros((rows,), jnp.int32),
            top_p=jnp.ones((rows,), jnp.float32),
            min_p=jnp.zeros((rows,), jnp.float32),
            seed=jnp.zeros((rows, 2), jnp.uint32),
            sample=jnp.zeros((rows,), jnp.uint32),
        ),
    )
