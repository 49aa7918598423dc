"""The closed list of compiled programs: ``init``, ``prefill``, ``decode``, ``wipe``. The only ``jax.jit`` of the step.

Shapes are fixed by :class:`EngineShape`, so each program is compiled once, before the worker is ready. State is
donated: whoever calls ``prefill`` or ``decode`` must forget the state it passed and keep the one returned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import NDArray

from orcd_jax.engine.prefill_call import PrefillCall, PrefillCallBuilder
from orcd_jax.engine.sampling import SamplingRows, choose
from orcd_jax.engine.state import DecodeState, EngineShape, KvGroup, KvPages, kv_groups, zero_state
from orcd_jax.kernels.paged_attention import attend_pages, write_pages
from orcd_jax.models.config import LlamaConfig
from orcd_jax.models.registry import Params, abstract_params, bind


class PagedKv:
    """Trace-time access to the pages: gives the model its ``attend`` and collects the updated pages.

    Owns the traced page arrays of one call; never outlives the trace.
    """

    def __init__(
        self,
        groups: tuple[KvGroup, ...],
        pages: tuple[KvPages, ...],
        tables: tuple[Int[Array, "N M"], ...],
        positions: Int[Array, "N Q"],
    ) -> None:
        self._group_of = {layer: (index, at) for index, g in enumerate(groups) for at, layer in enumerate(g.layers)}
        self._keys = [list(group.keys) for group in pages]
        self._values = [list(group.values) for group in pages]
        self._tables = tables
        self._positions = positions  # negative: an idle token, which writes nothing and sees nothing

    def attend(
        self, layer: int, q: Float[Array, "T K G H"], k: Float[Array, "T K H"], v: Float[Array, "T K H"]
    ) -> Float[Array, "T K G H"]:
        """Stores the call's keys and values of one layer, then attends over each sequence's pages."""
        group, at = self._group_of[layer]
        keys, values, table = self._keys[group][at], self._values[group][at], self._tables[group]
        page_tokens = keys.shape[2]
        place = jnp.maximum(self._positions, 0)
        page = jnp.take_along_axis(table, place // page_tokens, axis=1, mode="clip")
        page = jnp.where(self._positions >= 0, page, keys.shape[0]).reshape(-1)
        offset = (place % page_tokens).reshape(-1)
        keys = self._keys[group][at] = write_pages(keys, k, page, offset)
        values = self._values[group][at] = write_pages(values, v, page, offset)
        queries = q.reshape(*self._positions.shape, *q.shape[1:])
        return attend_pages(queries, keys, values, table, self._positions).reshape(q.shape)

    def pages(self) -> tuple[KvPages, ...]:
        """The pages after every layer has attended."""
        return tuple(
            KvPages(keys=tuple(keys), values=tuple(values))
            for keys, values in zip(self._keys, self._values, strict=True)
        )


def forward_blocks(
    config: LlamaConfig, params: Params, kv: tuple[KvPages, ...], call: PrefillCall
) -> tuple[tuple[KvPages, ...], Float[Array, "B L D"]]:
    """Runs every block of a call; returns the updated pages and the residual stream of each token."""
    blocks, length = call.tokens.shape
    at = jnp.arange(length, dtype=jnp.int32)[None, :]
    positions = jnp.where(at < call.count[:, None], call.start[:, None] + at, -1)
    paged = PagedKv(kv_groups(config), kv, call.tables, positions)
    hidden = bind(config, params).hidden(call.tokens.reshape(-1), jnp.maximum(positions, 0).reshape(-1), paged.attend)
    return paged.pages(), hidden.reshape(blocks, length, -1)


def forward_rows(
    config: LlamaConfig, params: Params, state: DecodeState, run: Bool[Array, " rows"]
) -> tuple[tuple[KvPages, ...], Float[Array, "rows D"]]:
    """Runs one token of every row of ``run``; returns the updated pages and the residual stream of each row."""
    positions = jnp.where(run, state.positions, -1)[:, None]
    paged = PagedKv(kv_groups(config), state.kv, state.tables, positions)
    hidden = bind(config, params).hidden(state.tokens, jnp.maximum(positions[:, 0], 0), paged.attend)
    return paged.pages(), hidden


def prefill(
    config: LlamaConfig, params: Params, state: DecodeState, call: PrefillCall
) -> tuple[DecodeState, Int[Array, " B"]]:
    """Reads prompts into the cache. A block with a ``row`` also samples its job's first token and installs the row.

    Returns the new state and one token a block, meaningful where ``row`` is a real row.
    """
    kv, hidden = forward_blocks(config, params, state.kv, call)
    last = jnp.take_along_axis(hidden, jnp.maximum(call.count - 1, 0)[:, None, None], axis=1)[:, 0]
    sampled_at = call.start + call.count
    first = choose(bind(config, params).logits(last), sampled_at, call.sampling)

    def install(rows: Array, value: Array) -> Array:
        return rows.at[call.row].set(value, mode="drop")

    new = DecodeState(
        kv=kv,
        tables=tuple(install(t, v) for t, v in zip(state.tables, call.tables, strict=True)),
        tokens=install(state.tokens, first),
        positions=install(state.positions, sampled_at),
        sampling=jax.tree.map(install, state.sampling, call.sampling),
    )
    return new, first


def decode(
    config: LlamaConfig, params: Params, state: DecodeState, run: Bool[Array, " rows"]
) -> tuple[DecodeState, Int[Array, " rows"]]:
    """One token for every row of ``run``; other rows are left exactly as they are."""
    kv, hidden = forward_rows(config, params, state, run)
    tokens = choose(bind(config, params).logits(hidden), state.positions + 1, _greedy_unless(run, state.sampling))
    new = DecodeState(
        kv=kv,
        tables=state.tables,
        tokens=jnp.where(run, tokens, state.tokens),
        positions=jnp.where(run, state.positions + 1, state.positions),
        sampling=state.sampling,
    )
    return new, tokens


def _greedy_unless(run: Bool[Array, " rows"], rows: SamplingRows) -> SamplingRows:
    """Idle rows sample greedily, so that a finished job's parameters do not cost a draw."""
    return SamplingRows(
        temperature=jnp.where(run, rows.temperature, jnp.float32(0)),
        top_k=rows.top_k,
        top_p=rows.top_p,
        min_p=rows.min_p,
        seed=rows.seed,
        sample=rows.sample,
    )


class Programs:
    """The compiled programs of one model on one device.

    Owns the executables; owns no weights and no state. Calling is asynchronous: results are futures.
    """

    NAMES = ("init", "prefill", "decode", "wipe")

    def __init__(
        self,
        config: LlamaConfig,
        shape: EngineShape,
        device: jax.Device,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Compiles everything; calls ``progress`` with each program's name before it is compiled."""
        self.config, self.shape = config, shape
        here = jax.sharding.SingleDeviceSharding(device)

        def on_device(tree: object) -> object:
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)

        params = on_device(abstract_params(config))
        state = on_device(jax.eval_shape(lambda: zero_state(config, shape)))
        call = on_device(PrefillCallBuilder(shape, len(kv_groups(config))).build())
        run = on_device(np.zeros((shape.rows,), np.bool_))
        progress("init")
        self._init = jax.jit(lambda: zero_state(config, shape), out_shardings=here).lower().compile()
        progress("prefill")
        self._prefill = (
            jax.jit(lambda p, s, c: prefill(config, p, s, c), donate_argnums=1).lower(params, state, call).compile()
        )
        progress("decode")
        self._decode = (
            jax.jit(lambda p, s, r: decode(config, p, s, r), donate_argnums=1).lower(params, state, run).compile()
        )
        progress("wipe")
        self._wipe = (
            jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s), donate_argnums=0, keep_unused=True)
            .lower(state)
            .compile()
        )
        self._device = device

    @property
    def compiled(self) -> Mapping[str, jax.stages.Compiled]:
        """The executables, by name."""
        return {"init": self._init, "prefill": self._prefill, "decode": self._decode, "wipe": self._wipe}

    def init(self) -> DecodeState:
        """A zeroed state on the device."""
        state: DecodeState = self._init()
        return state

    def prefill(self, params: Params, state: DecodeState, call: PrefillCall) -> tuple[DecodeState, jax.Array]:
        """DONATES ``state``. Returns the new one and ``[B]`` tokens."""
        new, tokens = self._prefill(params, state, jax.device_put(call, self._device))
        return new, tokens

    def decode(self, params: Params, state: DecodeState, run: NDArray[np.bool_]) -> tuple[DecodeState, jax.Array]:
        """DONATES ``state``. Returns the new one and ``[rows]`` tokens."""
        new, tokens = self._decode(params, state, jax.device_put(run, self._device))
        return new, tokens

    def wipe(self, state: DecodeState) -> None:
        """DONATES ``state``: zeroes it where it lies, and waits until that is done (WORKER-4702)."""
        jax.block_until_ready(self._wipe(state))
