"""SHA-256 (FIPS 180-4) of many messages at once: one lane of a vector each, in the order of its sections 4 to 6."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from jax import lax
from jaxtyping import Array, UInt32

Vector = UInt32[Array, " lanes"]


def compress(state: tuple[Vector, ...], words: tuple[Vector, ...], table: Array) -> tuple[Vector, ...]:
    """The state after one block of 16 words; ``table`` holds ``CONSTANTS``.

    64 rounds as a loop over 16: unrolled, they take ten times longer to compile.
    """

    def group(
        index: Array, carry: tuple[tuple[Vector, ...], tuple[Vector, ...]]
    ) -> tuple[tuple[Vector, ...], tuple[Vector, ...]]:
        mixed, now = carry
        constants = [table[index * 16 + at] for at in range(16)]
        return _rounds(mixed, now, constants), lax.cond(index < 3, _next_words, lambda same: same, now)

    mixed, _ = lax.fori_loop(0, 4, group, (state, words))
    return tuple(one + other for one, other in zip(state, mixed, strict=True))


def _rounds(
    state: tuple[Vector, ...], words: Sequence[Vector], constants: Sequence[UInt32[Array, ""]]
) -> tuple[Vector, ...]:
    a, b, c, d, e, f, g, h = state
    for word, constant in zip(words, constants, strict=True):
        first = h + (_rotate(e, 6) ^ _rotate(e, 11) ^ _rotate(e, 25)) + (g ^ (e & (f ^ g))) + constant + word
        second = (_rotate(a, 2) ^ _rotate(a, 13) ^ _rotate(a, 22)) + ((a & b) | (c & (a | b)))
        a, b, c, d, e, f, g, h = first + second, a, b, c, d + first, e, f, g
    return a, b, c, d, e, f, g, h


def _next_words(words: Sequence[Vector]) -> tuple[Vector, ...]:
    """The next 16 words of the message schedule."""
    w = list(words)
    for at in range(16):
        early, late = w[(at + 1) % 16], w[(at + 14) % 16]
        w[at] = (
            w[at]
            + (_rotate(early, 7) ^ _rotate(early, 18) ^ (early >> np.uint32(3)))
            + w[(at + 9) % 16]
            + (_rotate(late, 17) ^ _rotate(late, 19) ^ (late >> np.uint32(10)))
        )
    return tuple(w)


def _rotate(value: Vector, bits: int) -> Vector:
    return (value >> np.uint32(bits)) | (value << np.uint32(32 - bits))


def swap_bytes(value: Vector) -> Vector:
    """Between the words of a little-endian memory and those of SHA-256, which are big-endian."""
    return (
        (value << np.uint32(24))
        | ((value & np.uint32(0xFF00)) << np.uint32(8))
        | ((value >> np.uint32(8)) & np.uint32(0xFF00))
        | (value >> np.uint32(24))
    )


def _root_bits(number: int, degree: int) -> int:
    """The first 32 bits of the fractional part of a square or cube root, exactly."""
    scaled = number << (32 * degree)
    low, high = 0, 1 << 64  # the root of a small number, shifted by 32 bits
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**degree <= scaled else (low, middle - 1)
    return low & 0xFFFFFFFF


def _first_primes(count: int) -> list[int]:
    primes: list[int] = []
    candidates = itertools.count(2)
    while len(primes) < count:
        candidate = next(candidates)
        if all(candidate % prime for prime in primes):
            primes.append(candidate)
    return primes


_PRIMES = _first_primes(64)
INITIAL = np.array([_root_bits(prime, 2) for prime in _PRIMES[:8]], np.uint32)
"""The state before the first block."""

CONSTANTS = np.array([_root_bits(prime, 3) for prime in _PRIMES], np.uint32)
"""Of the 64 rounds."""
