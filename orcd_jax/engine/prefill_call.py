"""The input of one ``prefill`` call: what the program sees, and the host-side builder that fills it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import jax
import numpy as np
from jaxtyping import Array, Int

from orcd_jax.engine.request import SamplingParams
from orcd_jax.engine.sampling import SamplingRows
from orcd_jax.engine.state import EngineShape


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class PrefillCall:
    """The work of one ``prefill`` call: ``B`` blocks of ``L`` tokens, each of some job, on that job's own grid.

    Attributes:
      tokens: ids; past ``count`` they are ignored.
      start: position of each block's first token, a multiple of ``L``.
      count: tokens in each block; 0 is an idle block.
      row: the row to install when this block holds the job's last prompt token; ``rows`` or more: none.
      tables: page table of each block's job, one array a KV group.
      sampling: the job's parameters.
    """

    tokens: Int[Array, "B L"]
    start: Int[Array, " B"]
    count: Int[Array, " B"]
    row: Int[Array, " B"]
    tables: tuple[Int[Array, "B M"], ...]
    sampling: SamplingRows


class PrefillCallBuilder:
    """Owns the host arrays of one call while blocks are added to it; blocks not added stay idle."""

    def __init__(self, shape: EngineShape, groups: int) -> None:
        blocks = shape.prefill_blocks
        self._used = 0
        self._tokens = np.zeros((blocks, shape.block_tokens), np.int32)
        self._start = np.zeros((blocks,), np.int32)
        self._count = np.zeros((blocks,), np.int32)
        self._row = np.full((blocks,), shape.rows, np.int32)
        self._tables = tuple(np.zeros((blocks, shape.pages_per_job), np.int32) for _ in range(groups))
        self._temperature = np.zeros((blocks,), np.float32)
        self._top_k = np.zeros((blocks,), np.int32)
        self._top_p = np.ones((blocks,), np.float32)
        self._min_p = np.zeros((blocks,), np.float32)
        self._seed = np.zeros((blocks, 2), np.uint32)
        self._sample = np.zeros((blocks,), np.uint32)

    def add(
        self,
        tokens: Sequence[int],
        start: int,
        pages: Sequence[int],
        *,
        row: int | None = None,
        sampling: SamplingParams | None = None,
    ) -> int:
        """Adds a block and returns its index.

        Args:
          tokens: at most ``block_tokens`` ids.
          start: position of the first of them.
          pages: page ids of the whole job.
          row: where the job goes on, when this is its last block.
          sampling: how its first token is chosen; greedy when absent.
        """
        index, params = self._used, sampling or SamplingParams()
        self._used += 1
        self._tokens[index, : len(tokens)] = tokens
        self._start[index], self._count[index] = start, len(tokens)
        if row is not None:
            self._row[index] = row
        for table in self._tables:
            table[index, : len(pages)] = pages
        self._temperature[index], self._top_k[index] = params.temperature, params.top_k
        self._top_p[index], self._min_p[index] = params.top_p, params.min_p
        self._seed[index] = (params.seed >> 32, params.seed & 0xFFFFFFFF)
        return index

    def build(self) -> PrefillCall:
        """The call. Its leaves are host arrays: ``Programs.prefill`` puts them on the device."""

        def leaf(value: object) -> Array:
            return cast("Array", value)

        return PrefillCall(
            tokens=leaf(self._tokens),
            start=leaf(self._start),
            count=leaf(self._count),
            row=leaf(self._row),
            tables=tuple(leaf(table) for table in self._tables),
            sampling=SamplingRows(
                temperature=leaf(self._temperature),
                top_k=leaf(self._top_k),
                top_p=leaf(self._top_p),
                min_p=leaf(self._min_p),
                seed=leaf(self._seed),
                sample=leaf(self._sample),
            ),
        )
