"""What the engine's state and programs need at given sizes: exact where it can be, else a closed-form upper bound.

Pure arithmetic without JAX. ``tests/residency/test_bounds.py`` compares it with the arrays and programs themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from orcd_jax.config import BLOCK_TOKENS
from orcd_jax.models.config import LlamaConfig

PAGE_TOKENS = 64
"""Tokens of one KV page."""

_STEPS_IN_FLIGHT = 2  # the engine dispatches step t + 1 before it reads the tokens of step t
_PROGRAM_BYTES = 2**20  # code and small outputs of one program
_CHUNK_TOKENS = 256  # of kernels.paged_attention
_LOGITS_COPIES = 7  # float32 [rows, vocab] arrays in sampling: at most 6 were measured
_MATMUL_BYTES = {"cuda": 32 * 2**20, "cpu": 0}  # scratch memory that cuBLAS asks for on Hopper
_ROW_BYTES = 36  # of a row in the state: token, position, six sampling parameters of which the seed has two words

Platform = Literal["cuda", "cpu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a worker is asked to hold at once: its flags of these names.

    Attributes:
      slots_total: jobs that run together.
      max_context: most tokens of one job, prompt and answer together.
      prefill_tokens: prompt tokens computed in one call; rounded down to whole blocks, at least one.
    """

    slots_total: int
    max_context: int
    prefill_tokens: int

    def __post_init__(self) -> None:
        if min(self.slots_total, self.max_context, self.prefill_tokens) < 1:
            raise ValueError(f"every size must be at least 1: {self}")

    @property
    def prefill_blocks(self) -> int:
        """Blocks of one prefill call."""
        return max(1, self.prefill_tokens // BLOCK_TOKENS)

    @property
    def pages_per_job(self) -> int:
        """Most KV pages of one job."""
        return -(-self.max_context // PAGE_TOKENS)

    @property
    def pages(self) -> int:
        """KV pages of all jobs: every one may be of full context."""
        return self.slots_total * self.pages_per_job


def state_bytes(config: LlamaConfig, sizes: Sizes) -> int:
    """Bytes of the decode state: keys and values of every page of every layer, page tables, rows."""
    kv = 2 * config.num_layers * sizes.pages * config.num_kv_heads * PAGE_TOKENS * config.head_dim * _width(config)
    return kv + 4 * sizes.pages + _ROW_BYTES * sizes.slots_total


def call_bytes(sizes: Sizes) -> int:
    """Bytes of the largest input that one step brings: a prefill call's tokens, page tables and numbers of a block."""
    return max(sizes.prefill_blocks * 4 * (BLOCK_TOKENS + sizes.pages_per_job + 10), sizes.slots_total)


def workspace_peak(sizes: Sizes, *, steps: Sequence[int], others: Sequence[int], code_bytes: int = 0) -> int:
    """Workspace of all programs together, from that of each.

    Two steps may be dispatched and not yet over, and a slice of the digest between them. (On CUDA XLA frees
    temporaries in the order of the stream, so that they do not add up; nothing promises it.)

    Args:
      sizes: of the worker.
      steps: temporaries and outputs of each program that a step may be.
      others: the same of every other program; never two of them at a time.
      code_bytes: code of all programs, where it is not in these.
    """
    return _STEPS_IN_FLIGHT * (max(steps) + call_bytes(sizes)) + max(others, default=0) + code_bytes


def float32_copies(config: LlamaConfig, tensors: Sequence[int], sizes: Sizes, platform: Platform) -> int:
    """Bytes that one program on a CPU may take besides: it has no bfloat16, so XLA may widen every page and weight."""
    if platform == "cuda" or config.dtype == "float32":
        return 0
    return 2 * (state_bytes(config, sizes) + sum(tensors))


def program_bounds(config: LlamaConfig, tensors: Sequence[int], sizes: Sizes, platform: Platform) -> dict[str, int]:
    """Upper bound of each program's temporaries, code and outputs that are not its donated input, in bytes.

    On a CPU :func:`float32_copies` come on top.

    Returns:
      By name: ``prefill`` and ``decode`` are steps; ``digest`` reads the weights; all others need less than these.
    """
    rows, blocks = sizes.slots_total, sizes.prefill_blocks
    fixed = _PROGRAM_BYTES + _MATMUL_BYTES[platform]
    wide = 4 if platform == "cpu" else _width(config)
    chunk = min(_CHUNK_TOKENS, sizes.pages_per_job * PAGE_TOKENS)

    def logits(count: int) -> int:
        return _LOGITS_COPIES * count * config.vocab_size * 4

    return {
        "prefill": fixed + _activations(config, blocks * BLOCK_TOKENS, blocks, chunk, wide) + logits(blocks),
        "decode": fixed + _activations(config, rows, rows, chunk, wide) + logits(rows),
        # kernels.sha256 reads the weights in place and writes 32 bytes for each 4 096 of them and of each level above:
        # less than a 127th in all. Twice that.
        "digest": _PROGRAM_BYTES + sum(tensors) // 64,
    }


def _activations(config: LlamaConfig, tokens: int, sequences: int, chunk: int, wide: int) -> int:
    """Bytes that a forward pass of ``tokens`` tokens of ``sequences`` sequences holds, logits excepted.

    On a GPU XLA may fuse the additions of the residual stream into their readers, and so keep what every layer added.
    """
    c = config
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    residual = (2 * c.num_layers + 2) * c.hidden_size * wide
    angles = (c.num_layers + 1) * c.head_dim * 4
    projected = (queries + 2 * keys) * (wide + 4) + 2 * queries * wide  # fused qkv, rotated; grouped by head
    scores = c.num_heads * (chunk * (8 + wide) + 16)  # scores, weights, weights in the model's dtype; maxima, sums
    accumulated = 3 * queries * 4
    mlp = c.hidden_size * (wide + 4) + 4 * c.mlp_size * wide  # gate, up, gated
    gathered = 4 * sequences * keys * chunk * wide  # keys and values of a chunk, before and after the transpose
    attention = tokens * (projected + scores + accumulated) + gathered
    return tokens * (residual + angles) + max(attention, tokens * mlp)


def _width(config: LlamaConfig) -> int:
    """Bytes of one element."""
    return 4 if config.dtype == "float32" else 2
