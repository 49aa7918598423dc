"""The compiled programs: paging, placement and neighbours change no bit; prefill, decode and prefill size agree."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from orcd_jax.engine.prefill_call import PrefillCallBuilder
from orcd_jax.engine.programs import Programs
from orcd_jax.engine.request import SamplingParams
from orcd_jax.engine.sampling import SamplingRows, choose
from orcd_jax.engine.state import EngineShape
from tests.engine.tiny import SHAPE, TINY, LogitsDriver, loud_params

Floats = NDArray[np.float64]
PARAMS = loud_params(TINY)
TOKENS = [int(t) for t in np.random.default_rng(1).integers(0, TINY.vocab_size, 45)]
IN_ORDER = list(range(16))
PROGRAMS = functools.cache(lambda device: Programs(TINY, SHAPE, device))


def reference_logits(tokens: list[int]) -> Floats:
    """A dense float64 Llama in numpy, written from the formulas and sharing no code with the package."""
    p = {k: np.asarray(v, np.float64) for k, v in PARAMS.items()}
    c, n = TINY, len(tokens)
    group, hd = c.num_heads // c.num_kv_heads, c.head_dim

    def norm(x: Floats, scale: Floats) -> Floats:
        normed: Floats = x / np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps) * scale
        return normed

    angle = np.arange(n)[:, None] * (1.0 / c.rope_theta ** (np.arange(0, hd, 2) / hd))[None]
    cos, sin = np.cos(angle), np.sin(angle)

    def rope(x: Floats) -> Floats:
        a, b = x[:, : hd // 2], x[:, hd // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = p["embed"][tokens]
    for i in range(c.num_layers):
        a, m = f"layers.{i}.attention.", f"layers.{i}.mlp."
        h, out = norm(x, p[a + "norm"]), np.zeros_like(x)
        for kv in range(c.num_kv_heads):
            w = p[a + "qkv"][kv].reshape(group + 2, hd, -1)
            key, value = rope(h @ w[group].T), h @ w[group + 1].T
            for g in range(group):
                scores = rope(h @ w[g].T) @ key.T / np.sqrt(hd)
                scores = np.where(np.tri(n, dtype=bool), scores, -np.inf)
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                attended = weights / weights.sum(-1, keepdims=True) @ value
                out = out + attended @ p[a + "out"][kv][g * hd : (g + 1) * hd]
        x = x + out
        h = norm(x, p[m + "norm"])
        gate, up = h @ p[m + "gate_up"][0].T, h @ p[m + "gate_up"][1].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ p[m + "down"]
    logits: Floats = norm(x, p["norm"]) @ p["head"].T
    return logits


@pytest.mark.requirement("WORKER-4700")
def test_prefill_and_decode_equal_a_dense_forward_pass() -> None:
    logits = LogitsDriver(TINY, SHAPE, PARAMS).sequence(TOKENS, IN_ORDER, prefill=21)
    np.testing.assert_allclose(logits, reference_logits(TOKENS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("prefill", [1, 7, 8, 9, 16, 40, 45])
def test_any_prefill_size_gives_the_same_logits_to_rounding(prefill: int) -> None:
    logits = LogitsDriver(TINY, SHAPE, PARAMS).sequence(TOKENS, IN_ORDER, prefill=prefill)
    np.testing.assert_allclose(logits, reference_logits(TOKENS), rtol=0, atol=1e-4)


@pytest.mark.requirement("WORKER-4504")
@pytest.mark.requirement("WORKER-5000")
def test_shuffled_page_ids_change_no_bit() -> None:
    shuffled = [int(p) for p in np.random.default_rng(2).permutation(SHAPE.pages)[:16]]
    in_order = LogitsDriver(TINY, SHAPE, PARAMS).sequence(TOKENS, IN_ORDER, prefill=21)
    moved = LogitsDriver(TINY, SHAPE, PARAMS).sequence(TOKENS, shuffled, prefill=21)
    np.testing.assert_array_equal(in_order, moved)


@pytest.mark.requirement("WORKER-4504")
@pytest.mark.requirement("WORKER-5000")
def test_a_pool_smaller_than_rows_times_context_changes_no_bit() -> None:
    small = replace(SHAPE, pages=13)
    full = LogitsDriver(TINY, SHAPE, PARAMS).sequence(TOKENS, IN_ORDER, prefill=21)
    tight = LogitsDriver(TINY, small, PARAMS).sequence(TOKENS, list(range(12, -1, -1)), prefill=21)
    np.testing.assert_array_equal(full, tight)


@pytest.mark.requirement("WORKER-4504")
@pytest.mark.requirement("WORKER-4000")
@pytest.mark.requirement("WORKER-5000")
@pytest.mark.parametrize("row", [0, 1, 3])
def test_neighbours_and_place_change_no_bit(row: int) -> None:
    alone = LogitsDriver(TINY, SHAPE, PARAMS)
    expected = alone.sequence(TOKENS[:20], IN_ORDER[:5], prefill=19)[-2:]

    crowded = LogitsDriver(TINY, SHAPE, PARAMS)
    other = [int(t) for t in np.random.default_rng(3).integers(0, TINY.vocab_size, 30)]
    theirs, ours = list(range(20, 30)), [7, 3, 9, 1, 5]
    crowded.prefill([(other[:8], 0, theirs), (TOKENS[:8], 0, ours)])
    crowded.prefill([(TOKENS[8:16], 8, ours), (other[8:16], 8, theirs)])
    last = crowded.prefill([(other[16:20], 16, theirs), (TOKENS[16:19], 16, ours)])[1][-1]
    step = crowded.decode({row: (TOKENS[19], 19, ours), (row + 1) % SHAPE.rows: (other[20], 20, theirs)})[row]
    np.testing.assert_array_equal(np.stack([last, step]), expected)


@pytest.mark.requirement("WORKER-4504")
@pytest.mark.requirement("WORKER-5000")
def test_a_much_longer_neighbour_changes_no_bit() -> None:
    shape = EngineShape(rows=2, block_tokens=128, prefill_blocks=1, page_tokens=64, pages=24, pages_per_job=12)
    config = TINY.model_copy(update={"context_max": 1024})
    long = [int(t) for t in np.random.default_rng(4).integers(0, config.vocab_size, 640)]
    pages, theirs = [23], list(range(12))

    alone = LogitsDriver(config, shape, PARAMS)
    alone.prefill([(TOKENS, 0, pages)])
    expected = alone.decode({0: (5, 45, pages)})[0]

    crowded = LogitsDriver(config, shape, PARAMS)
    crowded.prefill([(TOKENS, 0, pages)])
    for start in range(0, 640, 128):
        crowded.prefill([(long[start : start + 128], start, theirs)])
    np.testing.assert_array_equal(crowded.decode({0: (5, 45, pages), 1: (6, 640, theirs)})[0], expected)


@pytest.mark.requirement("WORKER-4702")
def test_a_job_reads_nothing_it_did_not_write() -> None:
    clean = LogitsDriver(TINY, SHAPE, PARAMS).sequence(TOKENS, IN_ORDER, prefill=21)
    poisoned = LogitsDriver(TINY, SHAPE, PARAMS)
    poisoned.state = replace(
        poisoned.state, kv=jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), poisoned.state.kv)
    )
    np.testing.assert_array_equal(poisoned.sequence(TOKENS, IN_ORDER, prefill=21), clean)


@pytest.mark.requirement("WORKER-4702")
def test_idle_blocks_and_rows_write_nothing(device: jax.Device) -> None:
    programs = PROGRAMS(device)
    state = programs.init()
    before = jax.tree.map(np.asarray, state)
    state, _ = programs.prefill(PARAMS, state, PrefillCallBuilder(SHAPE, 1).build())
    state, _ = programs.decode(PARAMS, state, np.zeros((SHAPE.rows,), np.bool_))
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, state))


@pytest.mark.requirement("WORKER-4013")
def test_state_is_donated_and_reused_in_place(device: jax.Device) -> None:
    programs = PROGRAMS(device)
    state = programs.init()
    page = state.kv[0].keys[0]
    at = page.unsafe_buffer_pointer()
    new, _ = programs.decode(PARAMS, state, np.zeros((SHAPE.rows,), np.bool_))
    assert page.is_deleted()
    assert new.kv[0].keys[0].unsafe_buffer_pointer() == at


def test_prefill_installs_the_row_that_decode_continues(device: jax.Device) -> None:
    """Greedy tokens through the real programs equal the arg max of the dense forward pass, step by step."""
    programs, prompt = PROGRAMS(device), TOKENS[:13]
    state, got = programs.init(), []
    builder, pages = PrefillCallBuilder(SHAPE, 1), [9, 2, 7, 4, 30, 11]
    builder.add(prompt[:8], 0, pages)
    builder.add(prompt[8:], 8, pages, row=2)
    state, tokens = programs.prefill(PARAMS, state, builder.build())
    got.append(int(tokens[1]))
    run = np.arange(SHAPE.rows) == 2
    for _ in range(6):
        state, tokens = programs.decode(PARAMS, state, run)
        got.append(int(tokens[2]))
    expected = list(prompt)
    for _ in got:
        expected.append(int(reference_logits(expected)[-1].argmax()))
    assert got == expected[13:]


@pytest.mark.requirement("WORKER-4700")
@pytest.mark.requirement("WORKER-4012")
@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 2}, {"top_p": 0.2}, {"min_p": 0.6}], ids=["no filter", "top_k", "top_p", "min_p"]
)
def test_a_sampled_row_is_drawn_by_its_own_parameters_at_its_own_positions(
    filters: dict[str, float], device: jax.Device
) -> None:
    """Logits of the dense forward pass, and what ``sampling`` (tested by itself) draws from them at each position."""
    programs, prompt = PROGRAMS(device), TOKENS[:13]
    params = SamplingParams(temperature=1.9, seed=2**40 + 17, **filters)  # type: ignore[arg-type]
    builder, pages = PrefillCallBuilder(SHAPE, 1), [9, 2, 7, 4, 30, 11]
    builder.add(prompt[:8], 0, pages)
    builder.add(prompt[8:], 8, pages, row=2, sampling=params)
    call = builder.build()
    state, tokens = programs.prefill(PARAMS, programs.init(), call)
    got, run = [int(tokens[1])], np.arange(SHAPE.rows) == 2
    for _ in range(7):
        state, tokens = programs.decode(PARAMS, state, run)
        got.append(int(tokens[2]))

    def drawn(sampling: SamplingParams) -> list[int]:
        rows = SamplingRows(
            temperature=jnp.asarray([sampling.temperature], jnp.float32),
            top_k=jnp.asarray([sampling.top_k], jnp.int32),
            top_p=jnp.asarray([sampling.top_p], jnp.float32),
            min_p=jnp.asarray([sampling.min_p], jnp.float32),
            seed=jnp.asarray([[sampling.seed >> 32, sampling.seed & 0xFFFFFFFF]], jnp.uint32),
            sample=jnp.zeros((1,), jnp.uint32),
        )
        sequence = list(prompt)
        for _ in got:
            logits = jnp.asarray(reference_logits(sequence)[-1:], jnp.float32)
            sequence.append(int(choose(logits, jnp.asarray([len(sequence)], jnp.int32), rows)[0]))
        return sequence[len(prompt) :]

    assert got == drawn(params)
    unfiltered = drawn(replace(params, top_k=0, top_p=1.0, min_p=0.0))
    assert (got == unfiltered) is (not filters)  # each filter matters here
