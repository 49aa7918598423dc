"""SHA-256 trees of arrays where they lie: a Pallas (Triton) kernel with one lane for each 4 096-byte chunk.

The tree is that of ``docs/checkpoint.md``: SHA-256 each chunk of a slice, the last padded with zeros; concatenate the
digests; repeat until one is left. The reference is ``hashlib``: ``checkpoint.digest.tree_root`` on a host, and the
tests.

The kernel reads the elements of every dtype in place, 16 bytes a load: a copy of the weights in a dtype that is easier
to hash would cost time and memory. One launch hashes one level of the trees of all tensors it is given, because a
launch takes as long as 65 blocks one after the other, however few chunks it has. ``tools/bench_digest.py`` measures it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Int, Shaped, UInt32
from numpy.typing import NDArray

from orcd_jax.kernels.sha256_rounds import CONSTANTS, INITIAL, Vector, compress, swap_bytes

CHUNK_BYTES = 4096
BLOCK_BYTES = 64
DIGEST_WORDS = 8
LANES = 128
"""Chunks one program of the kernel hashes: 32 for each of its warps."""

MAX_ELEMENTS = 2**31 - CHUNK_BYTES
"""Of one array: offsets in the kernel are int32, and the last chunk's may pass the end."""

Grid = tuple[int | None, int]
"""How a tensor is cut: (axis, how many equal slices), or (None, 1)."""

T = TypeVar("T")

_BLOCKS = CHUNK_BYTES // BLOCK_BYTES
_LOAD_BYTES = 16  # the widest load of a lane


def tree_roots(
    array: Shaped[Array, " *shape"], axis: int | None, slices: int, *, lanes: int = LANES, interpret: bool = False
) -> UInt32[Array, "slices 8"]:
    """The tree roots of the equal slices of ``array`` along ``axis``: :func:`forest_roots` of one tensor."""
    return forest_roots([array], [(axis, slices)], lanes=lanes, interpret=interpret)


def forest_roots(
    arrays: Sequence[Shaped[Array, " *shape"]], grids: Sequence[Grid], *, lanes: int = LANES, interpret: bool = False
) -> UInt32[Array, "roots 8"]:
    """The roots of the hash trees of every slice of every array. For use under ``jax.jit``.

    Besides the arrays it needs memory for the digests of all chunks, 1/128 of their bytes, and of the levels above.

    Args:
      arrays: of any shape and of dtypes of 8, 16 or 32 bits.
      grids: how each is cut.
      lanes: chunks a program hashes, a power of two.
      interpret: run the kernel's steps as XLA operations, on any platform; slow, for tests.

    Returns:
      One row a slice, in the order of the arrays; in little-endian memory a row is the 32 bytes of the root.

    Raises:
      ValueError: a dtype of another size, an axis that its slices do not divide, or too many elements.
    """
    sources = [array.reshape(-1) if array.size else jnp.zeros((1,), array.dtype) for array in arrays]
    tensors = [
        _Tensor.cut(source, array.shape, array.dtype, grid)
        for source, (array, grid) in enumerate(zip(arrays, grids, strict=True))
    ]
    roots: list[Array | None] = [None] * len(arrays)
    growing = list(range(len(arrays)))  # whose tree has not come to its root
    while growing:
        digests = _hash_chunks(sources, tensors, lanes, interpret)
        rows = itertools.accumulate((tensor.rows for tensor in tensors), initial=0)
        above = []
        for index, tensor, row in zip(growing, tensors, rows, strict=False):
            if tensor.chunks == 1:
                roots[index] = digests[row : row + tensor.slices]
            else:
                above.append((index, _Tensor.of_digests(row, tensor)))
        sources, growing, tensors = [digests.reshape(-1)], [index for index, _ in above], [one for _, one in above]
    return jnp.concatenate([root for root in roots if root is not None])


@dataclass(frozen=True, slots=True)
class _Tensor:
    """Where the bytes of one tensor's slices lie.

    Attributes:
      source: which of the launch's arrays holds it.
      item_bytes: of one element; the rest counts elements.
      origin: where it begins in that array.
      slices: how many there are.
      length: of one slice.
      run: of a slice lie together.
      stride: from one run of a slice to its next.
    """

    source: int
    item_bytes: int
    origin: int
    slices: int
    length: int
    run: int
    stride: int

    @classmethod
    def cut(cls, source: int, shape: tuple[int, ...], dtype: jnp.dtype, grid: Grid) -> _Tensor:
        """The slices of a whole array in C order."""
        axis, slices = grid
        size = math.prod(shape)
        if size > MAX_ELEMENTS:
            raise ValueError(f"{size} elements are more than one array may have, {MAX_ELEMENTS}")
        if axis is None and slices != 1:
            raise ValueError(f"{slices} slices along no axis")
        if axis is not None and (not 0 <= axis < len(shape) or slices < 1 or shape[axis] % slices):
            raise ValueError(f"{slices} slices do not divide axis {axis} of {shape}")
        stride = size if slices == 1 else math.prod(shape[axis:])  # one slice is one run
        return cls(source, _item_bytes(dtype), 0, slices, size // slices, stride // slices, stride)

    @classmethod
    def of_digests(cls, row: int, below: _Tensor) -> _Tensor:
        """The digests of all chunks of a tensor, from ``row`` of the level's digests on, as a tensor of words."""
        words = below.chunks * DIGEST_WORDS
        return cls(0, 4, row * DIGEST_WORDS, below.slices, words, words, words * below.slices)

    @property
    def chunks(self) -> int:
        """Of one slice; one where there are no bytes."""
        return max(1, -(-self.length * self.item_bytes // CHUNK_BYTES))

    @property
    def rows(self) -> int:
        """Digests of all its chunks."""
        return self.slices * self.chunks


@dataclass(frozen=True, slots=True)
class _Reader:
    """How the kernel reads the chunks of one kind. Tensors that are read alike share the code.

    Attributes:
      source: which of the launch's arrays.
      item_bytes: of one element.
      runs: (run, stride) of a slice that is more than one run.
      together: every block of 64 bytes is whole, lies together and begins at a multiple of 16 bytes.
    """

    source: int
    item_bytes: int
    runs: tuple[int, int] | None
    together: bool

    def words(self, source: jax.Ref, chunks: _Chunks, block: Int[Array, ""]) -> list[Vector]:
        """The 16 words, as they lie in memory, of one block of each lane's chunk."""
        begin = chunks.first + block * (BLOCK_BYTES // self.item_bytes)
        return self._wide(source, chunks, begin) if self.together else self._narrow(source, chunks, begin)

    def _wide(self, source: jax.Ref, chunks: _Chunks, begin: Int[Array, " lanes"]) -> list[Vector]:
        """Loads 16 bytes at a time, whatever the dtype.

        A lane's load is one row of a tile. The elements of a word are put together, and the words taken out, by sums
        over the row of which all other terms are zeros: that costs nothing, since a row is in one thread's registers.
        """
        size = self.item_bytes
        per_word, width = 4 // size, _LOAD_BYTES // size
        column = lax.broadcasted_iota(jnp.int32, (begin.shape[0], width), 1)
        place = pl.multiple_of(self._place(chunks, begin)[:, None], (width, width))  # or Triton loads less at a time
        words = []
        for at in range(0, BLOCK_BYTES // size, width):
            bits = _bits(pltriton.load(source.at[place + at + column]))
            bits = bits << (column % per_word * (8 * size)).astype(jnp.uint32)
            for word in range(_LOAD_BYTES // 4):
                mine = jnp.where(column // per_word == word, bits, jnp.uint32(0))
                words.append(jnp.sum(mine, axis=1, dtype=jnp.uint32))
        return words

    def _narrow(self, source: jax.Ref, chunks: _Chunks, begin: Int[Array, " lanes"]) -> list[Vector]:
        """Loads element by element, with zeros past the end of the slice. Slower: for what little is odd."""
        size = self.item_bytes
        words = []
        for at in range(0, BLOCK_BYTES // size, 4 // size):
            word = jnp.zeros_like(begin, jnp.uint32)
            for byte in range(0, 4, size):
                element = begin + at + byte // size
                inside = element < chunks.length
                bits = _bits(pltriton.load(source.at[self._place(chunks, element)], mask=inside))
                word = word | (jnp.where(inside, bits, jnp.uint32(0)) << np.uint32(8 * byte))
            words.append(word)
        return words

    def _place(self, chunks: _Chunks, element: Int[Array, " lanes"]) -> Int[Array, " lanes"]:
        """Where elements of the lanes' slices lie in the array."""
        if self.runs is None:
            return chunks.origin + element
        run, stride = self.runs
        return chunks.origin + element // run * stride + element % run


class _Chunks(NamedTuple):
    """One program's chunks: what each lane hashes, and where its digest belongs.

    Attributes:
      origin: where the slice begins in the array, in elements.
      first: element of the slice that is the chunk's first.
      length: of the slice, in elements.
      row: of the digest.
    """

    origin: Int[Array, " lanes"]
    first: Int[Array, " lanes"]
    length: Int[Array, " lanes"]
    row: Int[Array, " lanes"]


@dataclass(frozen=True, slots=True)
class _Segment:
    """What some programs of a launch hash: ``chunks`` of each slice of a tensor, from ``first`` on.

    ``row`` is where the digest of the tensor's first chunk is stored.
    """

    tensor: _Tensor
    first: int
    chunks: int
    row: int

    @property
    def reader(self) -> _Reader:
        """Whole chunks are read otherwise than the last of a slice, if that is not whole."""
        tensor = self.tensor
        runs = None if tensor.run == tensor.length else (tensor.run, tensor.stride)
        aligned = tensor.slices == 1 or tensor.run * tensor.item_bytes % BLOCK_BYTES == 0
        whole = (self.first + self.chunks) * CHUNK_BYTES <= tensor.length * tensor.item_bytes
        return _Reader(tensor.source, tensor.item_bytes, runs, aligned and whole)

    def programs(self, lanes: int) -> int:
        """How many programs it takes."""
        return -(-self.tensor.slices * self.chunks // lanes)

    def place(self, program: Int[Array, ""], lanes: int) -> _Chunks:
        """Each lane's chunk, of one of its programs. A lane too many does again what the last one does."""
        tensor = self.tensor
        lane = program * lanes + lax.broadcasted_iota(jnp.int32, (lanes,), 0)
        lane = jnp.minimum(lane, tensor.slices * self.chunks - 1)
        slice_, chunk = lane // self.chunks, self.first + lane % self.chunks
        return _Chunks(
            origin=tensor.origin + slice_ * tensor.run,
            first=chunk * (CHUNK_BYTES // tensor.item_bytes),
            length=jnp.full((lanes,), tensor.length, jnp.int32),
            row=self.row + slice_ * tensor.chunks + chunk,
        )


def _segments(tensors: Sequence[_Tensor]) -> list[_Segment]:
    """Of one level of all trees; those that are read alike follow each other."""
    segments: dict[_Reader, list[_Segment]] = {}
    row = 0
    for tensor in tensors:
        whole = tensor.length * tensor.item_bytes // CHUNK_BYTES
        for first, chunks in ((0, whole), (whole, tensor.chunks - whole)):
            if chunks:
                segment = _Segment(tensor, first, chunks, row)
                segments.setdefault(segment.reader, []).append(segment)
        row += tensor.rows
    return list(itertools.chain.from_iterable(segments.values()))


def _hash_chunks(
    sources: Sequence[Array], tensors: Sequence[_Tensor], lanes: int, interpret: bool
) -> UInt32[Array, "rows 8"]:
    """One level: the SHA-256 of every chunk of every tensor, a tensor's slices in order."""
    segments = _segments(tensors)
    digests: Array = pl.pallas_call(
        functools.partial(_kernel, segments=segments, lanes=lanes),
        out_shape=jax.ShapeDtypeStruct((sum(tensor.rows for tensor in tensors), DIGEST_WORDS), jnp.uint32),
        grid=(sum(segment.programs(lanes) for segment in segments),),
        compiler_params=pltriton.CompilerParams(num_warps=max(1, lanes // 32), num_stages=1),
        interpret=interpret,
        name="sha256_chunks",
    )(jnp.asarray(CONSTANTS), *sources)
    return digests


def _kernel(table, *refs, segments: Sequence[_Segment], lanes: int) -> None:  # type: ignore[no-untyped-def]  # Refs
    *sources, digests = refs
    program = pl.program_id(0)
    places: list[tuple[int, Callable[[], _Chunks]]] = []
    readers: dict[_Reader, int] = {}  # with the program that is the first to use it
    start = 0
    for segment in segments:
        places.append((start, functools.partial(segment.place, program - start, lanes)))
        readers.setdefault(segment.reader, start)
        start += segment.programs(lanes)
    chunks = _choose(program, places)

    def load(block: Array) -> tuple[Vector, ...]:
        words = _choose(
            program,
            [
                (start, functools.partial(reader.words, sources[reader.source], chunks, block))
                for reader, start in readers.items()
            ],
        )
        return tuple(swap_bytes(word) for word in words)

    def hash_block(block: Array, state: tuple[Vector, ...]) -> tuple[Vector, ...]:
        words = lax.cond(block < _BLOCKS, load, lambda _: _vectors(_LAST_BLOCK, lanes), block)
        return compress(state, words, table)

    state = lax.fori_loop(0, _BLOCKS + 1, hash_block, _vectors(INITIAL, lanes))
    for column, value in enumerate(state):
        digests[chunks.row, jnp.full((lanes,), column, jnp.int32)] = swap_bytes(value)


def _vectors(values: NDArray[np.uint32], lanes: int) -> tuple[Vector, ...]:
    return tuple(jnp.full((lanes,), value) for value in values)


def _choose(program: Int[Array, ""], choices: Sequence[tuple[int, Callable[[], T]]]) -> T:
    """What the choice of this program returns; each begins with a program and ends where the next begins."""
    if len(choices) == 1:
        return choices[0][1]()
    half = len(choices) // 2
    result: T = lax.cond(
        program < choices[half][0], lambda: _choose(program, choices[:half]), lambda: _choose(program, choices[half:])
    )
    return result


def _bits(value: Shaped[Array, " *shape"]) -> UInt32[Array, " *shape"]:
    """The bits of each element, whatever its dtype."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[value.dtype.itemsize]
    return lax.bitcast_convert_type(value, unsigned).astype(jnp.uint32)


def _item_bytes(dtype: jnp.dtype) -> int:
    numeric = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    bits = 0 if not numeric else (jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo)(dtype).bits
    if bits not in (8, 16, 32):
        raise ValueError(f"{dtype} is not a dtype of 8, 16 or 32 bits")
    return bits // 8


_LAST_BLOCK = np.array([0x8000_0000, *[0] * 14, CHUNK_BYTES * 8], np.uint32)
"""Of every chunk: a one, zeros, the chunk's length in bits."""
