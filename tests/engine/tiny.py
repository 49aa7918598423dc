"""Tiny loud models and a logits-level driver of the programs, shared by the engine's tests."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import numpy as np
from jaxtyping import Array
from numpy.typing import NDArray

from orcd_jax.engine.prefill_call import PrefillCall, PrefillCallBuilder
from orcd_jax.engine.programs import forward_blocks, forward_rows
from orcd_jax.engine.state import DecodeState, EngineShape, kv_groups, zero_state
from orcd_jax.models.config import LlamaConfig
from orcd_jax.models.registry import Params, abstract_params, bind
from orcd_jax.models.rope import inverse_frequencies

TINY = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_size=48,
    norm_eps=1e-5,
    rope_theta=10_000.0,
    tied_embeddings=False,
    context_max=256,
    dtype="float32",
)
SHAPE = EngineShape(rows=4, block_tokens=8, prefill_blocks=2, page_tokens=4, pages=40, pages_per_job=16)


def loud_params(config: LlamaConfig, seed: int = 0) -> Params:
    """Random arrays with a standard deviation of 0.3, norms near 1 but not 1, biases not 0."""
    generator = np.random.default_rng(seed)
    params: dict[str, jax.Array] = {}
    for path, leaf in abstract_params(config).items():
        values = generator.normal(0.0, 0.3, leaf.shape) + (1.0 if path.rsplit(".", 1)[-1] == "norm" else 0.0)
        params[path] = jax.numpy.asarray(values, leaf.dtype)
    params["rope_frequencies"] = jax.numpy.asarray(inverse_frequencies(config)[0])
    return params


Init = Callable[[], DecodeState]
Forward = Callable[[Params, DecodeState, object], tuple[DecodeState, Array]]


@functools.lru_cache(maxsize=32)
def _compiled(config: LlamaConfig, shape: EngineShape) -> tuple[Init, Forward, Forward]:
    def blocks(params: Params, state: DecodeState, call: PrefillCall) -> tuple[DecodeState, Array]:
        kv, hidden = forward_blocks(config, params, state.kv, call)
        logits = bind(config, params).logits(hidden.reshape(-1, config.hidden_size))
        return replace(state, kv=kv), logits.reshape(*hidden.shape[:2], -1)

    def rows(params: Params, state: DecodeState, run: Array) -> tuple[DecodeState, Array]:
        kv, hidden = forward_rows(config, params, state, run)
        return replace(state, kv=kv), bind(config, params).logits(hidden)

    return jax.jit(lambda: zero_state(config, shape)), jax.jit(blocks), jax.jit(rows)


class LogitsDriver:
    """Runs sequences through the paged path of the programs and keeps the logits of every position."""

    def __init__(self, config: LlamaConfig, shape: EngineShape, params: Params) -> None:
        self.config, self.shape, self.params = config, shape, params
        init, self._blocks, self._rows = _compiled(config, shape)
        self.state: DecodeState = init()

    def prefill(self, blocks: Sequence[tuple[Sequence[int], int, Sequence[int]]]) -> list[NDArray[np.float32]]:
        """One call. Each block is (its tokens, its start, its job's pages); returns each block's logits."""
        builder = PrefillCallBuilder(self.shape, len(kv_groups(self.config)))
        for tokens, start, pages in blocks:
            builder.add(tokens, start, pages)
        self.state, logits = self._blocks(self.params, self.state, builder.build())
        return [np.asarray(logits[i, : len(tokens)]) for i, (tokens, _, _) in enumerate(blocks)]

    def decode(self, rows: dict[int, tuple[int, int, Sequence[int]]]) -> dict[int, NDArray[np.float32]]:
        """One step. Each row is (token, position, its job's pages); returns each row's logits."""
        tokens = np.zeros((self.shape.rows,), np.int32)
        positions = np.zeros((self.shape.rows,), np.int32)
        table = np.zeros((self.shape.rows, self.shape.pages_per_job), np.int32)
        run = np.zeros((self.shape.rows,), np.bool_)
        for row, (token, position, pages) in rows.items():
            tokens[row], positions[row], run[row] = token, position, True
            table[row, : len(pages)] = pages
        state = replace(
            self.state,
            tokens=jax.numpy.asarray(tokens),
            positions=jax.numpy.asarray(positions),
            tables=(jax.numpy.asarray(table),),
        )
        self.state, logits = self._rows(self.params, state, run)
        return {row: np.asarray(logits[row]) for row in rows}

    def sequence(self, tokens: Sequence[int], pages: Sequence[int], prefill: int, row: int = 0) -> NDArray[np.float32]:
        """All logits of one sequence: the first ``prefill`` tokens in blocks, the others a decode step each."""
        length, out = self.shape.block_tokens, []
        blocks = [(tokens[s : min(s + length, prefill)], s, pages) for s in range(0, prefill, length)]
        for first in range(0, len(blocks), self.shape.prefill_blocks):
            out += self.prefill(blocks[first : first + self.shape.prefill_blocks])
        for position in range(prefill, len(tokens)):
            out.append(self.decode({row: (tokens[position], position, pages)})[row][None])
        return np.concatenate(out)
