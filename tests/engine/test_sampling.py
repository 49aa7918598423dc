"""Sampling: filters keep exactly what their definition says; noise depends on nothing but the request."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orcd_jax.engine import sampling
from orcd_jax.engine.sampling import SamplingRows, gumbel_noise

choose = jax.jit(sampling.choose)
jitted_keep_likely = jax.jit(sampling.keep_likely)


def rows(
    n: int = 1, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 0
) -> SamplingRows:
    return SamplingRows(
        temperature=jnp.full((n,), temperature, jnp.float32),
        top_k=jnp.full((n,), top_k, jnp.int32),
        top_p=jnp.full((n,), top_p, jnp.float32),
        min_p=jnp.full((n,), min_p, jnp.float32),
        seed=jnp.tile(jnp.asarray([[seed >> 32, seed & 0xFFFFFFFF]], jnp.uint32), (n, 1)),
        sample=jnp.zeros((n,), jnp.uint32),
    )


def at(n: int, position: int = 7) -> jax.Array:
    return jnp.full((n,), position, jnp.int32)


def random_logits(n: int, vocab: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(0, 3, (n, vocab)), jnp.float32)


def test_temperature_zero_is_arg_max_with_the_lowest_id_on_a_tie() -> None:
    logits = jnp.asarray([[0.0, 5.0, 5.0, -1.0]], jnp.float32)
    assert choose(logits, at(1), rows(temperature=0.0)).tolist() == [1]


@pytest.mark.requirement("WORKER-4710")
@pytest.mark.requirement("WORKER-4711")
def test_a_draw_depends_on_seed_and_position_and_on_nothing_else() -> None:
    logits = random_logits(1, 500)
    eight = jnp.tile(logits, (8, 1))
    drawn = choose(eight, at(8), rows(8, seed=3)).tolist()
    assert set(drawn) == set(choose(logits, at(1), rows(seed=3)).tolist())
    by_seed = {choose(logits, at(1), rows(seed=s, temperature=2.0)).tolist()[0] for s in range(20)}
    by_position = {choose(logits, at(1, p), rows(seed=3, temperature=2.0)).tolist()[0] for p in range(20)}
    assert len(by_seed) > 5
    assert len(by_position) > 5


@pytest.mark.requirement("WORKER-4504")
def test_a_greedy_row_keeps_its_token_beside_a_random_row() -> None:
    logits = random_logits(4, 300)
    mixed = SamplingRows(
        **{f: getattr(rows(4), f) for f in ("top_k", "top_p", "min_p", "seed", "sample")},
        temperature=jnp.asarray([0.0, 1.0, 0.0, 2.0], jnp.float32),
    )
    alone = [int(choose(logits[i : i + 1], at(1), rows(temperature=float(t)))[0]) for i, t in enumerate((0, 1, 0, 2))]
    assert choose(logits, at(4), mixed).tolist() == alone


@pytest.mark.requirement("WORKER-4710")
@pytest.mark.requirement("WORKER-4711")
@pytest.mark.parametrize("other", [2**32 + 5, 2**63 + 5, 2**64 - 1])
def test_all_64_bits_of_the_seed_count(other: int) -> None:
    low = gumbel_noise(rows(seed=5).seed, rows().sample, at(1), 64)
    high = gumbel_noise(rows(seed=other).seed, rows().sample, at(1), 64)
    assert not np.array_equal(low, high)


@pytest.mark.requirement("WORKER-4711")
def test_noise_of_a_token_does_not_depend_on_the_vocabulary_size() -> None:
    parameters = rows(seed=11)
    small = gumbel_noise(parameters.seed, parameters.sample, at(1), 100)
    large = gumbel_noise(parameters.seed, parameters.sample, at(1), 1000)
    np.testing.assert_array_equal(small[0], large[0, :100])


def test_noise_is_gumbel_and_always_finite() -> None:
    noise = np.asarray(gumbel_noise(rows(8, seed=1).seed, rows(8).sample, jnp.arange(8, dtype=jnp.int32), 50_000))
    assert np.isfinite(noise).all()
    assert abs(noise.mean() - 0.5772) < 0.01
    assert abs(noise.std() - 1.2825) < 0.01


def test_draws_follow_the_softmax_of_the_logits() -> None:
    logits = jnp.asarray([[1.0, 0.0, 2.0, -1.0]], jnp.float32)
    n = 20_000
    positions = jnp.arange(n, dtype=jnp.int32)
    drawn = np.bincount(choose(jnp.tile(logits, (n, 1)), positions, rows(n)), minlength=4) / n
    np.testing.assert_allclose(drawn, np.asarray(jax.nn.softmax(logits[0])), atol=0.012)


def kept(logits: jax.Array, **parameters: float) -> set[int]:
    likely = jitted_keep_likely(logits, rows(**parameters))  # type: ignore[arg-type]
    return set(np.flatnonzero(np.isfinite(likely[0])).tolist())


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=12),
    top_k=st.integers(0, 14),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 0.9),
)
def test_filters_keep_what_sorting_says(values: list[float], top_k: int, top_p: float, min_p: float) -> None:
    """Against plain Python over sorted float64, away from exact thresholds."""
    logits = np.asarray(values, np.float32)
    padded = np.full((1, 12), -1e9, np.float32)
    padded[0, : len(values)] = logits
    alive = set(range(len(values)))
    if 0 < top_k < len(values):
        edge = np.sort(logits)[-top_k]
        alive = {i for i in alive if logits[i] >= edge}
    if top_p < 1:
        exact = {i: float(np.exp(np.float64(logits[i]) - max(map(float, logits)))) for i in alive}
        total = sum(exact.values())
        order = sorted({float(logits[i]) for i in alive}, reverse=True)
        mass, keep = 0.0, set[int]()
        for value in order:
            if keep and abs(mass / total - top_p) < 1e-4:
                return  # float32 may round either way here
            if mass / total >= top_p:
                break
            same = {i for i in alive if float(logits[i]) == value}
            keep |= same
            mass += sum(exact[i] for i in same)
        alive = keep
    if min_p > 0:
        gaps = [float(logits[i]) - max(map(float, logits)) - np.log(min_p) for i in alive]
        if any(abs(g) < 1e-4 for g in gaps):
            return
        alive = {i for i, g in zip(alive, gaps, strict=True) if g >= 0}
    got = kept(jnp.asarray(padded), top_k=top_k, top_p=top_p, min_p=min_p)
    assert {i for i in got if i < len(values)} == alive


@pytest.mark.parametrize("temperature", [1e-6, 8e-38, 5e-38, 1.2e-38])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = jnp.asarray([[5.0, 20.0, 30.0, -1.0]], jnp.float32)
    assert choose(logits, at(1), rows(temperature=temperature, seed=9)).tolist() == [2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_logit_that_is_not_a_number_is_told_and_stays_in_its_row(temperature: float) -> None:
    logits = jnp.asarray([[1.0, jnp.nan, 3.0], [1.0, 9.0, 3.0]], jnp.float32)
    assert choose(logits, at(2), rows(2, temperature=temperature, seed=1)).tolist()[0] == -1
    assert choose(logits, at(2), rows(2, temperature=temperature, seed=1)).tolist()[1] >= 0


def test_top_k_keeps_ties_with_the_kth() -> None:
    assert kept(jnp.asarray([[3.0, 1.0, 2.0, 2.0, 0.0]], jnp.float32), top_k=2) == {0, 2, 3}


def test_top_p_always_keeps_the_likeliest() -> None:
    assert kept(jnp.asarray([[3.0, 1.0, 2.0]], jnp.float32), top_p=1e-6) == {0}
