"""Digests of files and tensors. Specified in ``docs/checkpoint.md``; anyone can recompute them with ``hashlib``.

A tensor is hashed as a tree of 4 096-byte chunks, so that a GPU can hash what lies in its memory with one small
kernel for every level. Here it is done on the host, where ``hashlib`` releases the GIL for a chunk of this size.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader

import numpy as np
from numpy.typing import NDArray

from orcd_jax.checkpoint.manifest import TensorEntry, canonical_json

CHUNK = 4096
"""Bytes of one leaf of the tree, and of one node's children: 128 digests of 32 bytes."""

_SPAN = CHUNK * 1024  # bytes one task of the pool hashes
_FILE_BLOCK = 4 * 1024 * 1024


def tree_root(data: memoryview | bytes) -> bytes:
    """The root of the hash tree over ``data``.

    Split into 4 096-byte chunks, the last padded with zeros (no bytes: one chunk of zeros); SHA-256 each; concatenate
    the 32-byte digests; repeat, at least once, until one digest is left.
    """
    level = memoryview(data).cast("B")
    while True:
        digests = _level(level)
        if len(digests) == hashlib.sha256().digest_size:
            return digests
        level = memoryview(digests)


def tensor_digest(
    array: NDArray[np.generic],
    *,
    path: str,
    shape: tuple[int, ...],
    dtype: str,
    kind: str,
    shard_axis: int | None,
    shards: int,
) -> str:
    r"""``SHA-256("orcd-tensor-v1\0" ‖ SHA-256(header) ‖ roots of the shards)``, in hex.

    Args:
      array: the elements; float32 or bfloat16, any memory order.
      path: the rest is the header, as in :class:`TensorEntry`.
      shape: of the tensor; ``array`` must have it.
      dtype: of the tensor; ``array`` must have it.
      kind: how the bytes encode weights.
      shard_axis: the axis the tensor is split along, or None.
      shards: into how many equal slices.

    Raises:
      ValueError: the array is not of this shape and dtype.
    """
    if array.shape != shape or array.dtype.name != dtype:
        raise ValueError(f"{path} is {array.dtype.name}{array.shape}, not {dtype}{shape}")
    header = {
        "path": path,
        "shape": shape,
        "dtype": dtype,
        "kind": kind,
        "shard_axis": shard_axis,
        "shards": shards,
        "chunk_bytes": CHUNK,
    }
    return _combined(header, (tree_root(_element_bytes(piece)) for piece in _slices(array, shard_axis, shards)))


def entry_digest(entry: TensorEntry, array: NDArray[np.generic]) -> str:
    """The digest ``array`` has as the tensor ``entry`` describes, whatever digest the entry holds.

    Raises:
      ValueError: the array is not of the entry's shape and dtype.
    """
    return tensor_digest(
        array,
        path=entry.path,
        shape=entry.shape,
        dtype=entry.dtype,
        kind=entry.kind,
        shard_axis=entry.shard_axis,
        shards=entry.shards,
    )


def roots_digest(entry: TensorEntry, roots: Iterable[bytes]) -> str:
    """The digest of the tensor ``entry`` describes when these are the tree roots of its shards, in order."""
    header = entry.model_dump(include={"path", "shape", "dtype", "kind", "shard_axis", "shards"})
    return _combined({**header, "chunk_bytes": CHUNK}, roots)


def file_digest(file: BufferedReader, on_bytes: Callable[[int], None]) -> tuple[int, str]:
    """Size and SHA-256 of a file's bytes. One that grows meanwhile is followed past its size by one block at most.

    Args:
      file: opened, at its start.
      on_bytes: called with the number of bytes of each block read.

    Raises:
      OSError: it cannot be read.
    """
    hasher, size = hashlib.sha256(), 0
    block = bytearray(_FILE_BLOCK)
    view = memoryview(block)
    expected = os.fstat(file.fileno()).st_size
    while size <= expected and (count := file.readinto(block)):
        hasher.update(view[:count])
        size += count
        on_bytes(count)
    return size, hasher.hexdigest()


def _combined(header: Mapping[str, object], roots: Iterable[bytes]) -> str:
    outer = hashlib.sha256(b"orcd-tensor-v1\0")
    outer.update(hashlib.sha256(canonical_json(header)).digest())
    for root in roots:
        outer.update(root)
    return outer.hexdigest()


def _slices(array: NDArray[np.generic], axis: int | None, shards: int) -> list[NDArray[np.generic]]:
    if axis is None:
        return [array]
    return list(np.split(array, shards, axis=axis))


def _element_bytes(array: NDArray[np.generic]) -> memoryview:
    """The elements, little-endian in C order. A view when they lie so already."""
    bits = np.dtype(f"u{array.dtype.itemsize}").newbyteorder(array.dtype.byteorder)
    plain = np.ascontiguousarray(array).view(bits).reshape(-1)
    return plain.astype(plain.dtype.newbyteorder("<"), copy=False).view(np.uint8).data


def _level(data: memoryview) -> bytes:
    """One level of the tree: the digests of all chunks of ``data``."""
    if len(data) <= _SPAN:
        return _chunk_digests(data)
    starts = range(0, len(data), _SPAN)
    return b"".join(_POOL.map(lambda start: _chunk_digests(data[start : start + _SPAN]), starts))


def _chunk_digests(data: memoryview) -> bytes:
    whole = len(data) - len(data) % CHUNK
    sha256 = hashlib.sha256
    digests = [sha256(data[start : start + CHUNK]).digest() for start in range(0, whole, CHUNK)]
    if whole < len(data) or not data:
        digests.append(sha256(bytes(data[whole:]).ljust(CHUNK, b"\0")).digest())
    return b"".join(digests)


_POOL = ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1), thread_name_prefix="digest")
