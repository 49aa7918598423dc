"""Digests equal those that anyone can compute from docs/checkpoint.md with ``hashlib``."""

from __future__ import annotations

import hashlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from orcd_jax.checkpoint.digest import CHUNK, entry_digest, file_digest, tensor_digest, tree_root
from orcd_jax.checkpoint.manifest import TensorEntry
from orcd_jax.checkpoint.regular_file import open_regular
from tests.checkpoint.tiny import root_by_hand, tensor_by_hand

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def values(*shape: int, dtype: np.dtype[np.generic] | type = np.float32, seed: int = 0) -> NDArray[np.generic]:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(dtype)


def digest(
    array: NDArray[np.generic], path: str = "a.b", kind: str = "dense", axis: int | None = None, shards: int = 1
) -> str:
    return tensor_digest(
        array, path=path, shape=array.shape, dtype=array.dtype.name, kind=kind, shard_axis=axis, shards=shards
    )


# -- the tree ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size",
    [
        0,
        1,
        CHUNK - 1,
        CHUNK,
        CHUNK + 1,
        3 * CHUNK + 17,
        128 * CHUNK,  # one whole node
        128 * CHUNK + 1,
        1024 * CHUNK,  # as much as one thread takes
        1024 * CHUNK + 1,
        2500 * CHUNK + 1001,  # several threads, the last with a part
    ],
)
def test_a_tree_root_is_the_one_by_hand(size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    assert tree_root(data) == root_by_hand(data)


@given(st.binary(max_size=3 * CHUNK))
def test_any_bytes_have_the_root_by_hand(data: bytes) -> None:
    assert tree_root(data) == root_by_hand(data)


def test_the_root_of_one_chunk_is_its_sha256() -> None:
    """Hashed at least once, and not again."""
    assert tree_root(b"x" * CHUNK) == hashlib.sha256(b"x" * CHUNK).digest()
    assert tree_root(b"") == hashlib.sha256(bytes(CHUNK)).digest()


@pytest.mark.parametrize("place", [0, CHUNK - 1, CHUNK, 1024 * CHUNK - 1, 1024 * CHUNK, 1030 * CHUNK])
def test_any_bit_changes_the_root(place: int) -> None:
    data = bytearray(1031 * CHUNK)
    before = tree_root(bytes(data))
    data[place] ^= 1
    assert tree_root(bytes(data)) != before


# -- tensors -----------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4113")
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
@pytest.mark.parametrize(("axis", "shards"), [(None, 1), (0, 1), (0, 3), (0, 6), (1, 2), (1, 10)])
def test_a_tensor_digest_is_the_one_by_hand(dtype: np.dtype[np.generic] | type, axis: int | None, shards: int) -> None:
    array = values(6, 10, 77, dtype=dtype)
    assert digest(array, axis=axis, shards=shards) == tensor_by_hand(array, "a.b", axis=axis, shards=shards)


@pytest.mark.requirement("WORKER-4113")
@settings(deadline=None, max_examples=50)
@given(st.data())
def test_any_tensor_has_the_digest_by_hand(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 9), max_size=4))
    axis = data.draw(st.sampled_from([None, *range(len(shape))]))
    shards = 1 if axis is None else data.draw(st.sampled_from([n for n in range(1, 10) if shape[axis] % n == 0]))
    dtype = data.draw(st.sampled_from([np.dtype(np.float32), BFLOAT16]))
    path = data.draw(st.from_regex(r"[a-z0-9_]+(\.[a-z0-9_]+)*", fullmatch=True))
    array = values(*shape, dtype=dtype, seed=data.draw(st.integers(0, 2**32)))
    assert digest(array, path, axis=axis, shards=shards) == tensor_by_hand(array, path, axis=axis, shards=shards)


@pytest.mark.parametrize(("axis", "shards"), [(None, 1), (0, 4), (1, 2)])
def test_the_order_in_memory_does_not_matter(axis: int | None, shards: int) -> None:
    plain = values(8, 6)
    expected = digest(plain, axis=axis, shards=shards)
    strided = np.empty((16, 18), np.float32)[::2, ::3]
    strided[...] = plain
    for same in (np.asfortranarray(plain), plain[::-1].copy()[::-1], strided):
        assert not same.flags.c_contiguous
        assert digest(same, axis=axis, shards=shards) == expected


def test_the_byte_order_in_memory_does_not_matter() -> None:
    plain = values(5, 3)
    assert digest(plain.astype(">f4")) == digest(plain)


def test_bits_count_not_values() -> None:
    """0.0 equals -0.0, and no NaN equals another; their digests tell them apart, and each equals its own."""
    bits = np.array([0, 0x8000_0000, 0x7FC0_0000, 0x7FC0_0001, 0xFFC0_0000], np.uint32)
    digests = [digest(bits[n : n + 1].view(np.float32)) for n in range(len(bits))]
    assert len(set(digests)) == len(bits)
    assert digests == [digest(bits[n : n + 1].view(np.float32)) for n in range(len(bits))]


def test_the_header_is_part_of_the_digest() -> None:
    """All these have the same bytes, zeros of one chunk; what differs is written in the header alone."""
    zeros = np.zeros((4, 6), np.float32)
    digests = [
        digest(zeros),
        digest(zeros, path="a.c"),
        digest(zeros, kind="other"),
        digest(zeros.reshape(6, 4)),
        digest(zeros.reshape(24)),
        digest(zeros.reshape(4, 6, 1)),
        digest(np.zeros((4, 7), np.float32)),
        digest(zeros.astype(BFLOAT16)),
        digest(zeros, axis=0),
        digest(zeros, axis=1),
        digest(zeros, axis=0, shards=2),
        digest(zeros, axis=1, shards=2),
    ]
    assert len(set(digests)) == len(digests)


def test_the_order_of_shards_is_part_of_the_digest() -> None:
    array = values(4, 3)
    assert digest(array, axis=0, shards=2) != digest(np.roll(array, 2, axis=0), axis=0, shards=2)


def test_another_shape_or_dtype_than_told_is_a_mistake() -> None:
    entry = TensorEntry(path="a.b", shape=(2, 3), dtype="float32", digest="0" * 64)
    assert entry_digest(entry, values(2, 3)) == tensor_by_hand(values(2, 3), "a.b")
    for wrong in (values(3, 2), values(6), values(2, 3, dtype=BFLOAT16)):
        with pytest.raises(ValueError, match=r"a\.b is .* not float32"):
            entry_digest(entry, wrong)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4 * 1024 * 1024, 9 * 1024 * 1024 + 5])
def test_a_file_digest_is_its_size_and_sha256_and_every_byte_is_reported(tmp_path: Path, size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    (tmp_path / "file").write_bytes(data)
    read: list[int] = []
    with open_regular(tmp_path / "file") as file:
        assert file_digest(file, read.append) == (size, hashlib.sha256(data).hexdigest())
    assert sum(read) == size
